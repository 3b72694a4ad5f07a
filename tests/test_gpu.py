"""What only a GPU can show: the CUDA path gives what the CPU path gives."""

from pathlib import Path

import pytest
import torch

from pipelines.generation import ImageGenerationPipeline
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests.tiny_runs import prior_run, tokenizer_run
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
