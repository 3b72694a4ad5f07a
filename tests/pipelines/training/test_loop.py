"""The training loop: resuming, accumulation, precision, and how it stops."""

import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pipelines.training.loop
import pipelines.training.networks
from pipelines.config import PriorRunConfig, TokenizerRecipe, TokenizerRunConfig, TrainingConfig
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.checkpoints import load_state
from pipelines.run.folder import check_output_dir
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError
from pipelines.training.losses import Loss
from tests.tiny_runs import (
    CrashError,
    RunConfigs,
    assert_same_run,
    crash,
    first_gradients,
    logged,
    make_stage,
    prior_run,
    tokenizer_run,
    train_with,
    weight_files,
)
from tokenizer.storage.errors import InputError

ACCUMULATION = {"gradient_accumulation_steps": 2}


NewRun = Callable[..., RunConfigs]


@pytest.fixture
def new_run(tmp_path: Path, tiny_run: Path, cache_dir: Path) -> NewRun:
    """Configures a run in a folder of that name; a prior finds the trained tokenizer beside it."""

    def configure(kind: str, name: str = "run", **training: object) -> RunConfigs:
        if kind == "prior":
            shutil.copytree(tiny_run / "tokenizer", tmp_path / name / "tokenizer")
            return prior_run(tmp_path / name, **training)
        preset = "tiny-baseline" if kind == "baseline" else "tiny"
        return tokenizer_run(tmp_path / name, cache_dir, preset, **training)

    return configure


def train(config: RunConfigs) -> None:
    if isinstance(config, PriorRunConfig):
        train_prior(config)
    else:
        train_tokenizer(config)


# Further training, and other beginnings


@pytest.mark.parametrize("kind", ["stochastic", "prior"])
def test_a_finished_run_is_extended_as_a_run_that_knew_it_from_the_start(
    kind: str, new_run: NewRun
) -> None:
    """Interrupted or not; before it is finished, or to fewer steps, nothing is done."""
    extended, known = new_run(kind, "extended"), new_run(kind, "known", total_steps=7)
    longer = extended.model_copy(update={"extend_to": 7})
    with pytest.raises(InputError, match=r"^extend_to must be None: .* holds no finished run"):
        train(longer)
    with pytest.raises(CrashError):
        train_with(extended, 3, crash)
    with pytest.raises(InputError, match=r"^extend_to must be None until .* its 4 steps"):
        train(longer)
    train(extended)
    with pytest.raises(InputError, match=r"^extend_to must be > 4, .* got 4"):
        train(extended.model_copy(update={"extend_to": 4}))
    saved = check_output_dir(longer)
    with pytest.raises(CrashError):
        train_with(saved, 5, crash)
    train(longer)
    update = {"training": known.training.model_copy(update={"extended_at": (4,)})}
    train(known.model_copy(update=update))
    assert_same_run(extended.output_dir, known.output_dir)
    with pytest.raises(InputError, match=r"total_steps is 7, got 4; .* and --extend-to"):
        train(extended)


def test_an_extension_warms_up_anew_and_keeps_the_temperature() -> None:
    whole = TrainingConfig(total_steps=10, warmup_steps=2)
    extended = whole.model_copy(update={"total_steps": 25, "extended_at": (10, 15)})
    rates = [extended.learning_rate_at(step) for step in range(25)]
    assert rates[:10] == [whole.learning_rate_at(step) for step in range(10)]
    shorter = whole.model_copy(update={"total_steps": 5})
    assert rates[10:15] == [shorter.learning_rate_at(step) for step in range(5)]
    assert rates[15:] == rates[:10]
    recipe = TokenizerRecipe()
    temperatures = [recipe.temperature(step, extended.first_total_steps) for step in range(25)]
    assert temperatures[9:] == [recipe.final_temperature] * 16


@pytest.mark.parametrize("kind", ["stochastic", "prior"])
def test_a_stage_begins_with_the_weights_of_another_run(
    kind: str, tiny_run: Path, new_run: NewRun
) -> None:
    """On other data, too; with a rate of nearly zero it keeps them. Other shapes are refused."""
    config = new_run(kind, learning_rate=1e-30, total_steps=1, ema_decay=0.0)
    config = config.model_copy(update={"initialize_from": tiny_run})
    if isinstance(config, TokenizerRunConfig):
        data = config.data.model_copy(update={"seed": 5})
        config = config.model_copy(update={"data": data})
    train(config)
    found, given = (
        load_file(folder / config.output_dir.name / "model" / "model.safetensors")
        for folder in (config.run_dir, tiny_run)
    )
    for name, tensor in given.items():
        torch.testing.assert_close(found[name], tensor)
    part = "tokenizer" if isinstance(config, TokenizerRunConfig) else "prior"
    other = config.model_copy(update={"run_dir": config.run_dir / "none"})
    if isinstance(other, TokenizerRunConfig):
        networks = other.tokenizer.networks.model_copy(update={"width": 4})
        changed: object = other.tokenizer.model_copy(update={"networks": networks})
    else:
        shutil.copytree(tiny_run / "tokenizer", other.run_dir / "tokenizer")
        changed = other.prior.model_copy(update={"width": 8})  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"^initialize_from: .* shape"):
        train(other.model_copy(update={part: changed}))
    with pytest.raises(InputError, match=r"^initialize_from: .* holds no"):
        train(other.model_copy(update={"initialize_from": config.run_dir / "nowhere"}))


# Resuming


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        ("stochastic", {}),
        ("stochastic", ACCUMULATION),
        ("stochastic", {"channels_last": True}),
        ("baseline", ACCUMULATION | {"ema_decay": 0.0}),
        ("prior", {"ema_decay": 0.0}),
        ("prior", ACCUMULATION),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_run(
    kind: str, training: dict[str, int], new_run: NewRun
) -> None:
    runs = [new_run(kind, name, total_steps=5, **training) for name in ("whole", "broken")]
    train(runs[0])
    with pytest.raises(CrashError):
        train_with(runs[1], 0, crash)  # before any checkpoint
    with pytest.raises(CrashError):
        train_with(runs[1], 3, crash)  # after one
    train(runs[1])
    assert_same_run(runs[0].output_dir, runs[1].output_dir)
    lines = logged(runs[1].output_dir)
    assert [line["step"] for line in lines if line["phase"] == "train"] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in lines if line["phase"] == "validation"] == [2, 4, 5]


@pytest.mark.parametrize("kind", ["stochastic", "prior"])
def test_a_finished_run_is_left_alone_but_for_a_model_that_is_damaged(
    kind: str, tiny_run: Path, new_run: NewRun
) -> None:
    """And for what a killed run was writing."""
    config = new_run(kind)
    folder, whole = config.output_dir, tiny_run / config.output_dir.name
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = folder / "model" / "model.safetensors"
    before = path.stat().st_ino
    for name in (".config.json.tmp12", "model/.model.safetensors.tmp12", "model/.tmpdTdGVh"):
        (folder / name).write_bytes(b"half")
    train(config)
    assert not list(folder.rglob("*tmp*"))
    assert path.stat().st_ino == before
    path.write_bytes(path.read_bytes()[:-1])
    train(config)
    assert_same_run(folder, whole)
    make_stage(config).model.save_pretrained(path.parent)  # of the first step
    train(config)
    assert_same_run(folder, whole)


@pytest.mark.parametrize(
    ("num_signals", "message", "step"), [(1, "stopped and saved at step 3", 3), (2, "at once", 2)]
)
def test_sigterm_saves_within_a_step_or_stops_at_once_and_the_run_resumes_wherever_it_is(
    num_signals: int, message: str, step: int, tmp_path: Path, tiny_run: Path, new_run: NewRun
) -> None:
    def terminate(loss: Loss) -> Loss:
        for _ in range(num_signals):
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match=message):
        train_with(new_run("stochastic", "here"), 2, terminate)
    assert signal.getsignal(signal.SIGTERM) is handler
    state = load_state(tmp_path / "here" / "tokenizer" / "state")
    assert state is not None
    assert state.step == step
    (tmp_path / "here").rename(tmp_path / "there")
    train(new_run("stochastic", "there"))
    assert_same_run(tmp_path / "there" / "tokenizer", tiny_run / "tokenizer")


def test_a_run_that_dies_while_saving_has_its_model_in_the_end(
    tiny_run: Path, new_run: NewRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to use must not be missing where the state says that all is done."""
    config = new_run("stochastic", validation_interval=4, checkpoint_interval=4)
    loop, saving = pipelines.training.loop, pipelines.training.saving
    for module, name in ((saving, "save_state"), (loop, "write_run_config")):
        with monkeypatch.context() as patch:
            real = getattr(module, name)

            def save_and_die(*arguments: object, real: object = real) -> None:
                real(*arguments)
                raise CrashError

            patch.setattr(module, name, save_and_die)
            with pytest.raises(CrashError):
                train(config)
    train(config)
    assert weight_files(config.output_dir) == weight_files(tiny_run / "tokenizer")


def test_a_run_may_go_on_with_smaller_micro_batches(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What takes less memory, and follows the same gradient but for rounding and noise."""
    with pytest.raises(CrashError):
        train_with(tokenizer_run(tmp_path, cache_dir), 3, crash)
    for _ in range(2):  # and from there on
        train(tokenizer_run(tmp_path, cache_dir, **ACCUMULATION))
    assert caplog.text.count("gradient_accumulation_steps is 2 from here on, it was 1") == 1
    assert logged(tmp_path / "tokenizer")[-1]["step"] == 4


# Gradients, precision, divergence


def smooth(config: RunConfigs) -> RunConfigs:
    """The same run with nothing random in its loss and no code restarted."""
    if isinstance(config, PriorRunConfig):
        network = config.prior.model_copy(update={"dropout": 0.0, "label_dropout": 0.0})
        return config.model_copy(update={"prior": network})
    quantizer = config.tokenizer.quantizer.model_copy(update={"restart_threshold": 0.0})
    tokenizer = config.tokenizer.model_copy(update={"quantizer": quantizer})
    recipe = TokenizerRecipe(likelihood="closed_form")  # not a mean over images
    return config.model_copy(update={"tokenizer": tokenizer, "recipe": recipe})


@pytest.mark.parametrize("kind", ["baseline", "prior"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind: str, new_run: NewRun) -> None:
    gradients = []
    training = {"total_steps": 1, "max_gradient_norm": 1e6}
    for parts in (1, 2, 4):
        config = smooth(new_run(kind, str(parts), gradient_accumulation_steps=parts, **training))
        train(config)
        gradients.append(first_gradients(config.output_dir))
    for other in gradients[1:]:
        assert gradients[0].keys() == other.keys()
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def poison_term(loss: Loss) -> Loss:
    return Loss(loss.minimized, {**loss.terms, "quantization_error": torch.tensor(math.nan)})


def poison_gradient(loss: Loss) -> Loss:
    return Loss(loss.minimized * math.nan, loss.terms)


@pytest.mark.parametrize("log_interval", [1, 3])
@pytest.mark.parametrize(
    ("poison", "name"), [(poison_term, "quantization_error"), (poison_gradient, ".*gradient_norm")]
)
def test_a_number_that_is_not_finite_stops_with_its_step_and_keeps_the_checkpoint(
    poison: Callable[[Loss], Loss], name: str, log_interval: int, tmp_path: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path, cache_dir, log_interval=log_interval, total_steps=9)
    with pytest.raises(CrashError):
        train_with(config, 2, crash)
    before = weight_files(config.output_dir)
    message = rf"step 3: {name} is nan.*; .*state/step_00000002; lower training\.learning"
    with pytest.raises(DivergenceError, match=message):
        train_with(config, 2, poison)
    assert weight_files(config.output_dir) == before


# Options of speed


def test_feature_maps_may_lie_with_their_channels_last(tiny_run: Path, new_run: NewRun) -> None:
    config = new_run("stochastic", channels_last=True)
    train(config)
    assert_close_weights(config.output_dir, tiny_run / "tokenizer")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("ema_decay", [0.999, 0.0])
def test_compiled_training_saves_what_eager_training_saves(
    ema_decay: float, tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names to the letter, weights to rounding; also where a run is interrupted.

    Graphs are captured but not turned into C++, which would take minutes.
    """
    monkeypatch.setattr(pipelines.training.networks, "COMPILER", "aot_eager")
    for stage in ("tokenizer", "prior"):
        for run_dir in (tmp_path / "eager", tmp_path / "compiled"):
            training = {"compile": run_dir.name == "compiled", "ema_decay": ema_decay}
            config: RunConfigs = tokenizer_run(run_dir, cache_dir, **training)
            if stage == "prior":
                shutil.rmtree(run_dir / "tokenizer")
                shutil.copytree(tmp_path / "start", run_dir / "tokenizer")
                config = smooth(prior_run(run_dir, **training))
            with pytest.raises(CrashError):
                train_with(config, 3, crash)
            train(config)
        assert_close_weights(tmp_path / "compiled" / stage, tmp_path / "eager" / stage)
        if stage == "tokenizer":
            shutil.copytree(tmp_path / "eager" / stage, tmp_path / "start")


def assert_close_weights(found: Path, expected: Path) -> None:
    """States and models of two stages: the same names, and values to rounding."""
    paths = [*expected.glob("state/*/*.safetensors"), expected / "model/model.safetensors"]
    for path in paths:
        ours, theirs = load_file(found / path.relative_to(expected)), load_file(path)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


# What is learnt and what is left


def test_both_stages_overfit_a_batch(tmp_path: Path, cache_dir: Path) -> None:
    training = dict.fromkeys(("total_steps", "validation_interval", "checkpoint_interval"), 60)
    training |= {"learning_rate": 2e-2, "log_interval": 10}
    config = tokenizer_run(tmp_path, cache_dir, **training)
    data = config.data.model_copy(update={"num_images": 4})
    train_tokenizer(config.model_copy(update={"data": data}))
    errors = [line["rmse"] for line in logged(config.output_dir) if line["phase"] == "train"]
    assert errors[-1] < 0.8 * errors[0]
    prior = prior_run(tmp_path, **training)
    train_prior(prior)
    losses = [line["loss"] for line in logged(prior.output_dir) if line["phase"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_folder_holds_what_the_readme_says_and_a_line_all_terms(tiny_run: Path) -> None:
    for stage in ("tokenizer", "prior"):
        names = {path.name for path in (tiny_run / stage).iterdir()} - {"codes", ".lock"}
        assert names == {"config.json", "metrics.jsonl", "model", "samples", "state", "tensorboard"}
        pictures = sorted(path.name for path in (tiny_run / stage / "samples").iterdir())
        assert pictures == ["step_00000002.png", "step_00000004.png"]
        assert list((tiny_run / stage / "tensorboard").glob("events*"))
    first = logged(tiny_run / "tokenizer")[0]
    assert first["learning_rate"] == TOKENIZER_PRESETS["tiny"].training.learning_rate_at(0)
    assert first.keys() >= {"posterior_entropy", "rmse", "temperature", "gradient_norm"}
    assert len(first["dequantization_variance"]) == 3
