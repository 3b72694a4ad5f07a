"""What only a GPU can show: the CUDA path gives what the CPU path gives."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipelines.generation import ImageGenerationPipeline
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from prior import Sampler, sample, sample_generators
from tests.image_files import noise
from tests.prior.small_priors import trained_prior
from tests.tiny_runs import RunConfigs, WrappedStage, make_stage, prior_run, tokenizer_run
from tokenizer import Tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_codes_on_a_gpu_are_those_of_the_cpu() -> None:
    tokenizer = Tokenizer(TOKENIZER_PRESETS["shapes32-sqvae2"].tokenizer)
    images = torch.rand(32, 3, 32, 32) * 2 - 1
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(0))
    expected = tokenizer.eval().encode(images)
    found = tokenizer.cuda().encode(images.cuda())
    for own, other in zip(found, expected, strict=True):
        # Convolutions sum in another order, so near ties may fall the other way.
        assert (own.cpu() == other).double().mean() > 0.99


def test_quantization_ignores_autocast_on_a_gpu() -> None:
    tokenizer = Tokenizer(TOKENIZER_PRESETS["tiny"].tokenizer).cuda().eval()
    quantizer = next(iter(tokenizer.top_down)).quantizer
    latents = torch.randn(8, 4, 2, 2, device="cuda")
    expected = quantizer(latents, "nearest")
    with torch.autocast("cuda", torch.bfloat16):
        found = quantizer(latents, "nearest")
    torch.testing.assert_close(found.quantized, expected.quantized, rtol=0, atol=0)


def test_both_stages_train_in_bf16_and_the_pipeline_draws_the_images_of_the_cpu(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    train_tokenizer(tokenizer_run(tmp_path, cache_dir, precision="bf16"))
    train_prior(prior_run(tmp_path, precision="bf16"))
    pipeline = ImageGenerationPipeline.from_pretrained(tmp_path)
    expected = pipeline(8, progress=False, output="tensor")
    found = pipeline.to("cuda")(8, progress=False, output="tensor")
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    difference = (found.int() - expected.int()).abs()
    assert (difference <= 2).double().mean() > 0.95
    assert_completions_keep_what_is_known(pipeline)


def assert_completions_keep_what_is_known(pipeline: ImageGenerationPipeline) -> None:
    picture, mask = noise(16, 16), np.zeros((16, 16), bool)
    mask[:8] = True
    redrawn = pipeline.inpaint(picture, mask, 3, output="np", progress=False)
    continued = pipeline.outpaint(picture, right=5, output="np", progress=False)
    for kept, expected in ((redrawn[2, 8:], picture[8:]), (continued[0, :, :16], picture)):
        np.testing.assert_array_equal(kept, expected)
    assert len(pipeline.variations(picture, 1, 2, progress=False)) == 2
    assert len(pipeline.interpolate(picture, noise(16, 16, seed=1), 3)) == 3
    assert pipeline.features(picture).pooled.device.type == "cuda"


class WatchingStage(WrappedStage):
    """From the first loss to the end of the last step, whatever waits for the GPU is an error."""

    def __init__(self, stage: Any, total_steps: int) -> None:
        super().__init__(stage)
        self._left = total_steps

    def loss(self, *arguments: Any) -> Loss:
        loss: Loss = self._stage.loss(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        return loss

    def after_step(self, accelerator: Accelerator) -> None:
        self._stage.after_step(accelerator)
        self._left -= 1
        if not self._left:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # of its being a prototype
@pytest.mark.parametrize("kind", ["tiny", "tiny-baseline", "prior"])
@pytest.mark.parametrize("options", [{}, {"precision": "bf16", "channels_last": True}])
def test_the_host_never_waits_between_two_lines_of_the_log(
    kind: str,
    options: dict[str, object],
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    training = {
        **options,
        "total_steps": 6,
        "log_interval": 6,
        "validation_interval": 6,
        "checkpoint_interval": 6,
    }
    config: RunConfigs = tokenizer_run(tmp_path, cache_dir, "tiny", **training)
    if kind == "prior":
        train_tokenizer(tokenizer_run(tmp_path, cache_dir))
        config = prior_run(tmp_path, **training)
    elif kind == "tiny-baseline":
        config = tokenizer_run(tmp_path, cache_dir, kind, **training)
    stage: Any = WatchingStage(make_stage(config), 6)
    try:
        train(stage, config, make_accelerator(config))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("condition", ["class", "custom"])
def test_captured_batches_are_those_of_fresh_samplers(condition: str) -> None:
    prior = copy.deepcopy(trained_prior("cell", condition=condition)).cuda()
    sampler = Sampler(prior, temperature=0.9, guidance_scale=1.5)
    for first in (0, 4, 8, 12):  # started, captured, replayed
        labels = (torch.arange(4, device="cuda") + first // 4) % 3
        drawn, fresh = (sample_generators(5, range(first, first + 4)) for _ in range(2))
        expected = sample(prior, labels, fresh, temperature=0.9, guidance_scale=1.5)
        for own, other in zip(sampler(labels, drawn), expected, strict=True):
            assert torch.equal(own, other)
