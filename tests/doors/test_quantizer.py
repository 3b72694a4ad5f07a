"""A quantizer from outside the package is trained, saved and loaded."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.generation import ImageGenerationPipeline
from pipelines.tokenizer_pipeline import TokenizerPipeline
from pipelines.train_prior import train_prior
from pipelines.training.loop import make_accelerator, train
from pipelines.training.tokenizer_stage import TokenizerStage
from tests.tiny_runs import logged, prior_run, tokenizer_run
from tests.tokenizer.tiny import NETWORKS, random_images, summed_codes
from tokenizer import GroupConfig, InputError, Quantizer, QuantizerOutput, Tokenizer, rsq_vae
from tokenizer.quantizers.base import Mode

README = Path(__file__).parents[2] / "README.md"


class SignQuantizer(Quantizer):
    """Lookup-free quantization (arXiv 2310.05737): the bits of a code are signs of a projection."""

    def __init__(self, group: GroupConfig) -> None:
        super().__init__(group)
        self.places = nn.Buffer(2 ** torch.arange(group.codebook_sizes[0].bit_length() - 1))
        if set(group.codebook_sizes) != {2 ** len(self.places)}:
            raise InputError(f"codebook_sizes must be a power of 2, got {group.codebook_sizes}")
        sides, layers = (group.code_dim, len(self.places)), range(group.num_layers)
        self.project_in = nn.ModuleList(nn.Linear(*sides) for _ in layers)
        self.project_out = nn.ModuleList(nn.Linear(*sides[::-1]) for _ in layers)

    def codebook(self, layer: int) -> Tensor:
        indices = torch.arange(2 ** len(self.places), device=self.places.device)
        bits = indices.unsqueeze(1) // self.places % 2
        return self.project_out[layer](2.0 * bits - 1)

    def forward(
        self, latents: Tensor, mode: Mode, temperature: float = 1.0, generator: Any = None
    ) -> QuantizerOutput:
        residual = latents.movedim(1, -1).contiguous()
        quantized, indices, errors = torch.zeros_like(residual), [], []
        for layer in range(self.num_layers):
            values = self.project_in[layer](residual)
            signs = 2.0 * (values > 0) - 1
            errors.append((values - signs).square().mean((1, 2, 3)))
            indices.append(((values > 0) * self.places).sum(-1))
            vectors = self.codebook(layer)[indices[-1]]
            if mode == "mixture":
                vectors = self.project_out[layer](signs + values - values.detach())
            quantized, residual = quantized + vectors, residual - vectors
        error = torch.stack(errors).sum(0)
        entropies = torch.zeros(len(latents), self.num_layers).to(error)
        terms = {"commitment": error}
        return QuantizerOutput(quantized.movedim(-1, 1), torch.stack(indices, 1), entropies, terms)


@pytest.fixture
def random_codebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of the README, whose example runs as it is printed."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "(Quantizer)" in block)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(block, names)
    assert (tmp_path / "mine" / "config.json").exists()
    assert isinstance(names["tokenizer"].quantizers[0], names["RandomCodebook"])
    return names["RandomCodebook"]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_quantizer_from_outside_is_trained_saved_and_loaded(
    depth: int, tmp_path: Path, cache_dir: Path, random_codebook: Any
) -> None:
    quantizer = SignQuantizer if depth == 2 else random_codebook
    assert len(inspect.getsource(SignQuantizer).splitlines()) <= 40
    config = tokenizer_run(tmp_path / "run", cache_dir).model_copy(
        update={"tokenizer": rsq_vae(4, depth, 8, 4, networks=NETWORKS)}
    )
    accelerator = make_accelerator(config)
    stage = TokenizerStage(config, accelerator, quantizer=quantizer)
    train(stage, config, accelerator)
    lines = logged(config.output_dir)
    assert all(line["commitment"] > 0 for line in lines if line["phase"] == "train")
    assert all(len(line["perplexity"]) == depth for line in lines if line["phase"] == "validation")

    folder = config.output_dir / "model"
    tokenizer = Tokenizer.from_pretrained(folder, quantizer=quantizer)
    assert isinstance(tokenizer.quantizers[0], quantizer)
    assert not tokenizer.has_posterior
    images = random_images().float()
    (indices,) = tokenizer.encode(images)
    (latents,) = tokenizer.encode_with_latents(images).latents
    output = tokenizer.quantizers[0](latents, "nearest")
    assert torch.equal(output.quantized, summed_codes(tokenizer.quantizers[0], indices))
    assert torch.equal(tokenizer.decode([indices]), tokenizer.reconstruct(images))
    tokenizer.save_pretrained(tmp_path / "again")
    copy = Tokenizer.from_pretrained(tmp_path / "again", quantizer=quantizer)
    assert copy.content_hash() == tokenizer.content_hash()

    message = f"^tokenizer.quantizer '{quantizer.__name__}' is from outside .*$"
    with pytest.raises(InputError, match=message):
        Tokenizer.from_pretrained(folder)
    other = random_codebook if depth == 2 else SignQuantizer
    with pytest.raises(InputError, match=r"model\.safetensors lacks \d weights, the first is"):
        Tokenizer.from_pretrained(folder, quantizer=other)

    train_prior(prior_run(tmp_path / "run", total_steps=1), tokenizer=tokenizer)
    pipeline = ImageGenerationPipeline.from_pretrained(tmp_path / "run", quantizer=quantizer)
    pipeline.save_pretrained(tmp_path / "saved")
    for kind in (TokenizerPipeline, ImageGenerationPipeline):
        again = kind.from_pretrained(tmp_path / "saved", quantizer=quantizer)
        assert torch.equal(again.encode(images)[0], indices)
        with pytest.raises(InputError, match=message):
            kind.from_pretrained(tmp_path / "saved")
