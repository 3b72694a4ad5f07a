"""Fine-tuning of a decoder: the codes stay, and all that was built on them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.command_configs import EvaluateConfig, ExtractorConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.decoder_run import DecoderRunConfig, decoder_run, parse_decoder_run
from pipelines.evaluate import evaluate
from pipelines.finetune_decoder import finetune_decoder
from pipelines.model_folders import load_tokenizer
from pipelines.recipe import AdversarialConfig
from pipelines.run.folder import load_run, write_run_config
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests.tiny_runs import (
    CrashError,
    assert_same_run,
    crash,
    logged,
    tokenizer_run,
    train_with,
)
from tokenizer import InputError, Tokenizer

V1 = Path(__file__).parents[1] / "fixtures" / "v1"


def tuning(run_dir: Path, head_width: int = 0, **training: Any) -> DecoderRunConfig:
    """A fine-tuning of four steps, unless `training` says otherwise."""
    run = decoder_run(run_dir)
    networks = run.tokenizer.networks.model_copy(update={"head_width": head_width})
    return run.model_copy(
        update={
            "tokenizer": run.tokenizer.model_copy(update={"networks": networks}),
            "training": run.training.model_copy(update={"total_steps": 4, **training}),
        }
    )


@pytest.fixture
def run_dir(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def in_use(tuned: Path) -> tuple[Tokenizer, Tokenizer]:
    """The run's own tokenizer, and the one that is used."""
    return Tokenizer.from_pretrained(tuned / "tokenizer" / "model"), load_tokenizer(tuned, None)


@pytest.mark.parametrize("head_width", [0, 4])
def test_the_codes_and_the_prior_stay_and_the_decoder_alone_moves(
    run_dir: Path, head_width: int, images: torch.Tensor, tmp_path: Path
) -> None:
    before = ImageGenerationPipeline.from_pretrained(run_dir)
    finetune_decoder(tuning(run_dir, head_width))
    original, tuned = in_use(run_dir)
    for name, weight in original.state_dict().items():
        moved = not torch.equal(tuned.state_dict()[name], weight)
        assert moved == name.startswith("decoder."), name
    assert (tuned.decoder.head is not None) == bool(head_width)
    for ours, theirs in zip(tuned.encode(images), original.encode(images), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(tuned.reconstruct(images), original.reconstruct(images))
    pipeline = ImageGenerationPipeline.from_pretrained(run_dir)
    assert not np.array_equal(drawn(pipeline), drawn(before))
    pipeline.save_pretrained(tmp_path / "saved")  # and handed on
    assert np.array_equal(
        drawn(ImageGenerationPipeline.from_pretrained(tmp_path / "saved")), drawn(pipeline)
    )
    half = ImageGenerationPipeline.from_pretrained(run_dir, dtype=torch.bfloat16)
    assert half.tokenizer.former_identities()


def test_a_discriminator_may_teach_the_decoder(run_dir: Path, images: torch.Tensor) -> None:
    adversarial = AdversarialConfig(weight=0.5, width=4, num_downsamplings=2, lead_steps=2)
    config = tuning(run_dir)
    recipe = config.recipe.model_copy(update={"adversarial": adversarial})
    finetune_decoder(config.model_copy(update={"recipe": recipe}))
    lines = logged(run_dir / "decoder")
    weights = [line["tokenizer/adversarial_weight"] for line in lines if line["phase"] == "train"]
    assert [weight > 0 for weight in weights] == [False, False, True, True]
    original, tuned = in_use(run_dir)
    for ours, theirs in zip(tuned.encode(images), original.encode(images), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(tuned.reconstruct(images), original.reconstruct(images))


def test_the_discriminator_of_a_run_starts_anew_and_early_enough(run_dir: Path) -> None:
    run = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    adversarial = AdversarialConfig(weight=0.5, start_step=50, lead_steps=40)
    long = run.model_copy(
        update={
            "run_dir": run_dir,
            "training": run.training.model_copy(update={"total_steps": 100}),
            "recipe": run.recipe.model_copy(update={"adversarial": adversarial}),
        }
    )
    write_run_config(long)
    tuned = decoder_run(run_dir)
    assert (tuned.recipe.adversarial.start_step, tuned.recipe.adversarial.lead_steps) == (0, 2)


def drawn(pipeline: ImageGenerationPipeline) -> np.ndarray:
    images = pipeline(2, seed=0, progress=False, output="np")
    assert isinstance(images, np.ndarray)
    return images


def test_the_error_on_hard_codes_falls(run_dir: Path) -> None:
    finetune_decoder(tuning(run_dir, total_steps=40, learning_rate=1e-3, ema_decay=0.0))
    lines = (run_dir / "decoder" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["reconstruction"] for line in lines if '"train"' in line]
    assert losses[-1] < losses[0] - 10


def test_an_interrupted_run_goes_on_to_the_same_bits(run_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run_dir, tmp_path / "other"))
    finetune_decoder(tuning(run_dir, 4))
    interrupted = tuning(other, 4, checkpoint_interval=2)
    with pytest.raises(CrashError):
        train_with(interrupted, 3, crash)
    _, used = in_use(other)
    assert not used.former_identities()  # half a fine-tuning is not used
    finetune_decoder(interrupted)
    assert_same_run(run_dir / "decoder", other / "decoder")
    _, used = in_use(other)
    assert used.former_identities()


def test_a_prior_goes_on_with_its_codes_and_begins_with_the_same(run_dir: Path) -> None:
    finetune_decoder(tuning(run_dir))
    cached = sorted(run_dir.glob("prior/codes/*"))
    assert cached
    config = load_run(PriorRunConfig, run_dir / "prior" / "config.json")
    steps = config.training.total_steps + 1
    config = config.model_copy(update={"run_dir": run_dir, "extend_to": steps})
    train_prior(config, tokenizer=load_tokenizer(run_dir, None))
    assert sorted(run_dir.glob("prior/codes/*")) == cached
    ImageGenerationPipeline.from_pretrained(run_dir)


def test_a_prior_of_version_0_1_fits_and_its_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # run and cache are relative folders
    shutil.copytree(V1 / "tokenizer_run", "run")
    train_tokenizer(load_run(TokenizerRunConfig, Path("run/tokenizer/config.json")))
    shutil.copytree(V1 / "prior_run", "run", dirs_exist_ok=True)
    finetune_decoder(tuning(Path("run")))
    for dtype in (None, torch.bfloat16):
        pipeline = ImageGenerationPipeline.from_pretrained("run", dtype=dtype)
        assert pipeline.tokenizer.former_identities()
    pipeline.save_pretrained("saved")
    ImageGenerationPipeline.from_pretrained("saved")
    train_prior(
        load_run(PriorRunConfig, Path("run/prior/config.json")),
        tokenizer=load_tokenizer(Path("run"), None),
    )


def test_a_run_whose_codes_have_changed_is_refused(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tuning(run_dir)
    finetune_decoder(config)
    run = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    steps = run.training.total_steps + 1
    train_tokenizer(run.model_copy(update={"run_dir": run_dir, "extend_to": steps}))
    assert f"the decoder in {run_dir / 'decoder'} knows the codes of before" in caplog.text
    with pytest.raises(InputError, match=r"the codes of .* have changed since .*decoder began"):
        finetune_decoder(config)
    with pytest.raises(InputError, match="was fine-tuned for other codes than those of"):
        load_tokenizer(run_dir, None)
    shutil.rmtree(run_dir / "decoder")
    with pytest.raises(InputError, match="prior does not belong to tokenizer"):
        ImageGenerationPipeline.from_pretrained(run_dir)


def test_what_cannot_be_fine_tuned_is_refused_before_work(
    run_dir: Path, tmp_path: Path, cache_dir: Path
) -> None:
    def parse(*arguments: str) -> DecoderRunConfig:
        return parse_decoder_run("pipelines.finetune_decoder", arguments)

    with pytest.raises(InputError, match="RUN must be the folder of a run with a tokenizer"):
        parse(str(tmp_path))
    for option, match in (
        ("--tokenizer.networks.width=4", r"is left as it is: its tokenizer\.networks\.width is"),
        ("--initialize-from=other", "initialize_from must be None"),
    ):
        with pytest.raises(InputError, match=match):
            parse(str(run_dir), option)
    config = parse(str(run_dir), "--tokenizer.networks.head-width=8", "--training.seed=3")
    assert config.output_dir == run_dir / "decoder"
    run = load_run(TokenizerRunConfig, run_dir / "tokenizer" / "config.json")
    update = {"seed": 3, "total_steps": 1, "warmup_steps": 0}
    assert config.training == run.training.model_copy(update=update)
    with pytest.raises(CrashError):
        train_with(tokenizer_run(tmp_path / "begun", cache_dir, checkpoint_interval=1), 2, crash)
    with pytest.raises(InputError, match="RUN must hold a finished tokenizer"):
        finetune_decoder(tuning(tmp_path / "begun"))


def test_the_protocol_names_the_decoder(run_dir: Path) -> None:
    config = EvaluateConfig(
        run_dir=run_dir, what="reconstruction", num_images=8, extractor=ExtractorConfig(kind="none")
    )
    protocols = []
    for _ in range(2):
        result = evaluate(config)["reconstruction"]["PSNR"]
        protocols.append(result["protocol"]["settings"])
        if len(protocols) == 1:
            finetune_decoder(tuning(run_dir))
    assert protocols == [
        {"codes": "hard"},
        {"codes": "hard", "decoder": "fine-tuned on hard codes"},
    ]
