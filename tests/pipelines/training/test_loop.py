"""The training loop: resuming, accumulation, precision, and how it stops."""

import json
import math
import os
import shutil
import signal
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import pipelines.training.loop
from pipelines.config import PriorRunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.checkpoints import load_state
from pipelines.run.folder import load_run, locked
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError
from pipelines.training.loop import make_accelerator
from pipelines.training.losses import Loss
from pipelines.training.optimizer import learning_rate
from tests import workers
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
from tokenizer.quantizers import StochasticQuantizerConfig
from tokenizer.storage.errors import InputError

ACCUMULATION = {"gradient_accumulation_steps": 2}


def train(config: RunConfigs) -> None:
    if isinstance(config, PriorRunConfig):
        train_prior(config)
    else:
        train_tokenizer(config)


def make_run(kind: str, run_dir: Path, tiny_run: Path, cache_dir: Path, **training: object):
    """A run to be; a prior finds the trained tokenizer beside it."""
    if kind != "prior":
        preset = "tiny-baseline" if kind == "baseline" else "tiny"
        return tokenizer_run(run_dir, cache_dir, preset, **training)
    shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    return prior_run(run_dir, **training)


# The learning rate


@given(st.integers(1, 50), st.integers(1, 50))
def test_the_rate_rises_to_its_peak_and_a_cosine_ends_at_zero(warmup: int, rest: int) -> None:
    total = warmup + rest
    config = TrainingConfig(total_steps=total, warmup_steps=warmup, learning_rate=0.3)
    rates = [learning_rate(config, step) for step in range(total + 1)]
    assert rates[:warmup] == pytest.approx([0.3 * (n + 1) / warmup for n in range(warmup)])
    cosine = [0.15 + 0.15 * math.cos(math.pi * n / rest) for n in range(rest + 1)]
    assert rates[warmup:] == pytest.approx(cosine, abs=1e-12)


def test_a_constant_rate_stays_at_its_peak() -> None:
    config = TrainingConfig(total_steps=9, warmup_steps=0, schedule="constant")
    assert {learning_rate(config, step) for step in range(9)} == {config.learning_rate}


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
    kind: str, training: dict[str, int], tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    runs = [
        make_run(kind, tmp_path / name, tiny_run, cache_dir, total_steps=5, **training)
        for name in ("whole", "broken")
    ]
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
def test_a_killed_run_resumes_bit_for_bit(
    kind: str, tmp_path: Path, tiny_run: Path, cache_dir: Path, processes: ForkServerContext
) -> None:
    runs = [
        make_run(kind, tmp_path / name, tiny_run, cache_dir, total_steps=6)
        for name in ("whole", "killed")
    ]
    output = tmp_path / "output.txt"
    process = processes.Process(target=workers.train_and_die, args=(runs[1], 4, output))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, output.read_text()
    state = load_state(runs[1].output_dir / "state")
    assert state is not None
    assert state.step == 4
    for run in runs:
        train(run)
    assert_same_run(runs[0].output_dir, runs[1].output_dir)


def test_what_a_killed_run_was_writing_goes_when_the_run_goes_on(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    folder = tmp_path / "run" / "tokenizer"
    names = (".config.json.tmp12", ".metrics.jsonl.tmp12", "model/.model.safetensors.tmp12")
    for name in (*names, "model/.tmpdTdGVh"):
        (folder / name).write_bytes(b"half")
    train(tokenizer_run(tmp_path / "run", cache_dir))
    assert not list(folder.rglob("*tmp*"))
    assert_same_run(folder, tiny_run / "tokenizer")


def test_the_same_command_after_the_end_changes_nothing(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    for config in (tokenizer_run(tmp_path / "run", cache_dir), prior_run(tmp_path / "run")):
        train(config)
    for stage in ("tokenizer", "prior"):
        assert_same_run(tmp_path / "run" / stage, tiny_run / stage)


def test_sigterm_saves_within_a_step_and_the_run_resumes(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    def terminate(loss: Loss) -> Loss:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    config = tokenizer_run(tmp_path, cache_dir)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped and saved at step 3"):
        train_with(config, 2, terminate)
    assert signal.getsignal(signal.SIGTERM) is handler
    state = load_state(config.output_dir / "state")
    assert state is not None
    assert state.step == 3
    train_tokenizer(config)
    assert_same_run(config.output_dir, tiny_run / "tokenizer")


def test_a_second_signal_stops_at_once(tmp_path: Path, cache_dir: Path) -> None:
    def terminate_twice(loss: Loss) -> Loss:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        return loss

    config = tokenizer_run(tmp_path, cache_dir)
    with pytest.raises(KeyboardInterrupt, match="at once"):
        train_with(config, 2, terminate_twice)
    state = load_state(config.output_dir / "state")
    assert state is not None
    assert state.step == 2


def test_a_run_that_dies_while_saving_has_its_model_in_the_end(
    tmp_path: Path, tiny_run: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to use must not be missing where the state says that all is done."""
    config = tokenizer_run(tmp_path, cache_dir, validation_interval=4, checkpoint_interval=4)
    for name in ("save_state", "write_run_config"):
        with monkeypatch.context() as patch:
            real = getattr(pipelines.training.loop, name)

            def save_and_die(*arguments: object, real: object = real) -> None:
                real(*arguments)
                raise CrashError

            patch.setattr(pipelines.training.loop, name, save_and_die)
            with pytest.raises(CrashError):
                train_tokenizer(config)
    train_tokenizer(config)
    expected = weight_files(tiny_run / "tokenizer")
    assert weight_files(config.output_dir) == expected


# What else may lie in the folder


def test_a_run_may_go_on_with_smaller_micro_batches(
    tmp_path: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What takes less memory, and follows the same gradient but for rounding and noise."""
    config = tokenizer_run(tmp_path, cache_dir)
    with pytest.raises(CrashError):
        train_with(config, 3, crash)
    smaller = tokenizer_run(tmp_path, cache_dir, gradient_accumulation_steps=2)
    train_tokenizer(smaller)
    assert "training.gradient_accumulation_steps is 2 from here on, it was 1" in caplog.text
    assert [line["step"] for line in logged(config.output_dir)][-1] == 4
    saved = load_run(TokenizerRunConfig, config.output_dir / "config.json")
    assert saved == smaller


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("training.learning_rate", {"learning_rate": 0.5}),
        ("training.total_steps", {"total_steps": 5}),
        ("training.seed", {"seed": 1}),
    ],
)
def test_another_config_in_the_same_folder_is_refused_naming_the_field(
    field: str, changes: dict[str, float], tiny_run: Path, cache_dir: Path
) -> None:
    before = weight_files(tiny_run / "tokenizer")
    with pytest.raises(InputError, match=f"holds another run: its {field} is "):
        train_tokenizer(tokenizer_run(tiny_run, cache_dir, **changes))
    with pytest.raises(InputError, match=f"holds another run: its {field} is "):
        train_prior(prior_run(tiny_run, **changes))
    assert weight_files(tiny_run / "tokenizer") == before


def test_a_config_that_is_not_json_is_refused(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "tokenizer" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        train_tokenizer(tokenizer_run(tmp_path / "run", cache_dir))


def test_a_moved_run_goes_on(tmp_path: Path, cache_dir: Path, tiny_run: Path) -> None:
    with pytest.raises(CrashError):
        train_with(tokenizer_run(tmp_path / "here", cache_dir), 3, crash)
    (tmp_path / "here").rename(tmp_path / "there")
    train_tokenizer(tokenizer_run(tmp_path / "there", cache_dir))
    assert_same_run(tmp_path / "there" / "tokenizer", tiny_run / "tokenizer")


def test_a_damaged_state_is_refused(tmp_path: Path, tiny_run: Path, cache_dir: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    path = sorted((tmp_path / "run").glob("tokenizer/state/*/model.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
        train_tokenizer(tokenizer_run(tmp_path / "run", cache_dir))


def test_a_damaged_state_is_left_for_the_one_before_it_when_asked(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    config = tokenizer_run(tmp_path / "run", cache_dir)
    path = sorted(config.output_dir.glob("state/*/state.json"))[-1]
    path.write_bytes(b"")
    with pytest.raises(InputError, match="--resume-from step_00000002 to go on"):
        train_tokenizer(config)
    train_tokenizer(config.model_copy(update={"resume_from": "step_00000002"}))
    assert_same_run(config.output_dir, tiny_run / "tokenizer")


def test_a_run_does_not_change_over_to_other_images(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    """Images in a folder, say, may change while the configuration stays."""
    shutil.copytree(tiny_run, tmp_path / "run")
    config = tokenizer_run(tmp_path / "run", cache_dir)
    data = config.data.model_copy(update={"seed": 1})
    stage = make_stage(config.model_copy(update={"data": data}))
    with pytest.raises(InputError, match=r"run_dir: .* was trained with other training images"):
        pipelines.training.loop.train(stage, config, make_accelerator(config))


def test_a_prior_does_not_change_over_to_another_tokenizer(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    train_tokenizer(tokenizer_run(tmp_path / "run", cache_dir, seed=1))
    with pytest.raises(InputError, match="was trained with other tokenizer weights"):
        train_prior(prior_run(tmp_path / "run"))


# Before any work


def test_a_folder_that_cannot_be_written_is_refused(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark has folders that really cannot; an administrator may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match=f"run_dir: {tmp_path} cannot be written"):
        train_tokenizer(tokenizer_run(tmp_path / "some" / "run", cache_dir))


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    config = tokenizer_run(tmp_path / "run", cache_dir, gradient_accumulation_steps=3)
    with pytest.raises(InputError, match=r"training\.batch_size must be a multiple of .*, got 4"):
        train_tokenizer(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("field", "data"),
    [
        ("image size must be divisible by the coarsest downsampling 8, got 20", {"image_size": 20}),
        ("data.image_size must be >= 11", {"image_size": 8}),
        ("data.channels must equal tokenizer.channels 3, got 1", {"channels": 1}),
        ("data.root must be None where data.dataset is 'shapes'", {"root": Path("anywhere")}),
    ],
)
def test_data_that_does_not_fit_is_refused_before_work_starts(
    field: str, data: dict[str, object], tmp_path: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path / "run", cache_dir)
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    with pytest.raises(InputError, match=field):
        train_tokenizer(config)
    assert not (tmp_path / "run").exists()


def test_a_prior_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run_dir must hold a trained tokenizer"):
        train_prior(prior_run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_guidance_without_a_null_class_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "tokenizer")
    config = prior_run(tmp_path)
    for update in (
        {"is_class_conditional": False},
        {"prior": config.prior.model_copy(update={"label_dropout": 0.0})},
    ):
        with pytest.raises(InputError, match=r"guidance_scale must be 1 .*, got 2"):
            train_prior(config.model_copy(update={"guidance_scale": 2.0, **update}))
    assert not (tmp_path / "prior").exists()


def test_posterior_targets_need_a_posterior(tmp_path: Path, cache_dir: Path) -> None:
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, "tiny-baseline", total_steps=1))
    with pytest.raises(InputError, match="targets must be 'indices'"):
        train_prior(prior_run(tmp_path).model_copy(update={"targets": "posterior"}))


# Gradients, precision, divergence


def smooth(config: RunConfigs) -> RunConfigs:
    """The same run with nothing random in its loss and no code restarted."""
    if isinstance(config, PriorRunConfig):
        network = config.prior.model_copy(update={"dropout": 0.0, "label_dropout": 0.0})
        return config.model_copy(update={"prior": network})
    quantizer = config.tokenizer.quantizer.model_copy(update={"restart_threshold": 0.0})
    tokenizer = config.tokenizer.model_copy(update={"quantizer": quantizer})
    return config.model_copy(update={"tokenizer": tokenizer})


@pytest.mark.parametrize("kind", ["baseline", "prior"])
def test_two_micro_batches_give_the_gradient_of_the_whole_batch(
    kind: str, tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    """Not so for the stochastic tokenizer, whose log SSE is of the micro-batch."""
    gradients = []
    for steps in (1, 2):
        run_dir = tmp_path / str(steps)
        training = {"total_steps": 1, "max_gradient_norm": 1e6, "precision": "fp32"}
        config = smooth(
            make_run(
                kind, run_dir, tiny_run, cache_dir, gradient_accumulation_steps=steps, **training
            )
        )
        train(config)
        gradients.append(first_gradients(config.output_dir))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_both_stages_may_differ_in_precision_within_one_process(
    tmp_path: Path, cache_dir: Path
) -> None:
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, total_steps=2))
    config = prior_run(tmp_path, total_steps=2, precision="bf16")
    train_prior(config)
    assert make_accelerator(config).mixed_precision == "bf16"
    train_tokenizer(tokenizer_run(tmp_path / "bf16", cache_dir, total_steps=2, precision="bf16"))
    assert all(math.isfinite(line["loss"]) for line in logged(tmp_path / "bf16" / "tokenizer")[:2])


@pytest.mark.parametrize("log_interval", [1, 3])
def test_a_loss_that_is_not_finite_stops_with_step_and_term_and_keeps_the_checkpoint(
    log_interval: int, tmp_path: Path, cache_dir: Path
) -> None:
    def diverge(loss: Loss) -> Loss:
        terms = {**loss.terms, "quantization_error": torch.tensor(math.nan)}
        return Loss(loss.minimized * math.nan, terms)

    config = tokenizer_run(tmp_path, cache_dir, log_interval=log_interval, total_steps=9)
    with pytest.raises(CrashError):
        train_with(config, 2, crash)
    before = weight_files(config.output_dir)
    message = (
        r"step 3: quantization_error is nan.*; .*state/step_00000002; lower training\.learning"
    )
    with pytest.raises(DivergenceError, match=message):
        train_with(config, 2, diverge)
    assert weight_files(config.output_dir) == before


def test_a_gradient_that_is_not_finite_is_never_saved(tmp_path: Path, cache_dir: Path) -> None:
    config = tokenizer_run(tmp_path, cache_dir)
    with pytest.raises(DivergenceError, match=r"step 4: .*gradient_norm is nan"):
        train_with(config, 3, lambda loss: Loss(loss.minimized * math.nan, loss.terms))
    state = load_state(config.output_dir / "state")
    assert state is not None
    assert state.step == 2
    assert all(own.isfinite().all() for own in [*state.model.values(), *state.ema.values()])


# Options of speed


def test_feature_maps_may_lie_with_their_channels_last(
    tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path, cache_dir, channels_last=True)
    train_tokenizer(config)
    assert_close_weights(config.output_dir, tiny_run / "tokenizer")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
@pytest.mark.parametrize("ema_decay", [0.999, 0.0])
def test_compiled_training_saves_what_eager_training_saves(
    ema_decay: float, tmp_path: Path, cache_dir: Path
) -> None:
    """Names to the letter, weights to rounding; also where a run is interrupted."""
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


def test_compiling_without_a_compiler_is_refused(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"training\.compile must be False: .* no C\+\+ compiler"):
        train_tokenizer(tokenizer_run(tmp_path / "run", cache_dir, compile=True))
    assert not (tmp_path / "run").exists()


# What is learnt and what is left


def test_both_stages_overfit_a_batch(tmp_path: Path, cache_dir: Path) -> None:
    training = {
        "total_steps": 60,
        "learning_rate": 2e-2,
        "validation_interval": 60,
        "checkpoint_interval": 60,
        "log_interval": 10,
    }
    config = tokenizer_run(tmp_path, cache_dir, **training)
    data = config.data.model_copy(update={"num_images": 4})
    train_tokenizer(config.model_copy(update={"data": data}))
    errors = [line["rmse"] for line in logged(config.output_dir) if line["phase"] == "train"]
    assert errors[-1] < 0.8 * errors[0]
    prior = prior_run(tmp_path, **training)
    train_prior(prior)
    losses = [line["loss"] for line in logged(prior.output_dir) if line["phase"] == "train"]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_folder_holds_what_the_readme_says(tiny_run: Path) -> None:
    for stage in ("tokenizer", "prior"):
        names = {path.name for path in (tiny_run / stage).iterdir()} - {"codes", ".lock"}
        assert names == {"config.json", "metrics.jsonl", "model", "samples", "state", "tensorboard"}
        pictures = sorted(path.name for path in (tiny_run / stage / "samples").iterdir())
        assert pictures == ["step_00000002.png", "step_00000004.png"]
        assert list((tiny_run / stage / "tensorboard").glob("events*"))
        assert json.loads((tiny_run / stage / "config.json").read_text())["run_dir"] == str(
            tiny_run
        )


def test_the_rate_and_all_terms_are_logged(tiny_run: Path) -> None:
    first = json.loads((tiny_run / "tokenizer" / "metrics.jsonl").read_text().splitlines()[0])
    training = TOKENIZER_PRESETS["tiny"].training
    assert first["learning_rate"] == learning_rate(training, 0)
    assert {
        "loss",
        "reconstruction",
        "quantization_error",
        "posterior_entropy",
        "rmse",
        "temperature",
        "dequantization_variance",
        "gradient_norm",
        "images_per_second",
    } <= first.keys()
    assert len(first["dequantization_variance"]) == 3
    quantizer = TOKENIZER_PRESETS["tiny"].tokenizer.quantizer
    assert isinstance(quantizer, StochasticQuantizerConfig)
    latents = first["quantization_error"] - first["posterior_entropy"]
    total = first["reconstruction"] + quantizer.latent_weight * latents
    assert first["loss"] == pytest.approx(total, rel=1e-5)


def test_two_commands_do_not_train_in_one_folder(tmp_path: Path, cache_dir: Path) -> None:
    config = tokenizer_run(tmp_path, cache_dir)
    with (
        locked(config.output_dir),
        pytest.raises(InputError, match="another process is training in"),
    ):
        train_tokenizer(config)
    train_tokenizer(config)


@pytest.mark.parametrize("kind", ["stochastic", "prior"])
def test_a_finished_run_writes_its_model_once_more(
    kind: str, tmp_path: Path, tiny_run: Path, cache_dir: Path
) -> None:
    config = make_run(kind, tmp_path, tiny_run, cache_dir)
    train(config)
    path = config.output_dir / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    train(config)
    assert path.read_bytes() == whole


def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(
    tmp_path: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path, cache_dir)
    train(config)
    shutil.rmtree(config.output_dir / "state")
    with pytest.raises(
        InputError, match=r"run_dir: .*/state is gone, so that .* cannot go on; move"
    ):
        train(config)


def test_a_damaged_config_of_a_run_is_refused_with_a_way_out(
    tmp_path: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path, cache_dir)
    train(config)
    (config.output_dir / "config.json").write_text("{")
    with pytest.raises(InputError, match="remove it to go on with the options that you give"):
        train(config)


def test_a_prior_is_not_trained_on_other_images_than_its_tokenizer(
    tmp_path: Path, tiny_run: Path
) -> None:
    shutil.copytree(tiny_run / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "config.json"
    fields = json.loads(path.read_text())
    fields["data"]["seed"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(InputError, match="tokenizer was trained with other training images"):
        train(prior_run(tmp_path))
