"""A conditioner from outside the package, through all that uses conditions."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipelines import ImageGenerationPipeline
from pipelines.train_prior import train_prior
from prior import Condition, Conditioner, Prior
from tests.tiny_runs import prior_run
from tokenizer.storage.errors import InputError


class Attributes(Conditioner):
    """The bits of a number: summed in a vector, and each a token."""

    num_tokens = 3
    has_null = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(3, width))
        self.unknown = nn.Parameter(torch.randn(3, width))
        self.to_vector = nn.Linear(3, width)
        self.to_tokens = nn.Linear(1, width)

    def forward(self, inputs: Tensor) -> Condition:
        bits = (inputs.unsqueeze(1) >> torch.arange(3, device=inputs.device)) % 2
        bits = bits.to(self.positions.dtype)
        tokens = self.to_tokens(bits.unsqueeze(2)) + self.positions
        vector = self.to_vector(bits)
        if self.training:
            is_hidden = torch.rand(len(inputs), 1, device=inputs.device) < 0.2
            null = self.null(len(inputs))
            vector = torch.where(is_hidden, null.vector, vector)
            tokens = torch.where(is_hidden.unsqueeze(2), null.tokens, tokens)
        return Condition(vector, tokens)

    def null(self, batch: int) -> Condition:
        return Condition(self.unknown.sum(0).expand(batch, -1), self.unknown.expand(batch, -1, -1))


@pytest.fixture(scope="module")
def pipeline(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageGenerationPipeline:
    """A pipeline whose prior was trained with it by the stage, saved and loaded."""
    folder = tmp_path_factory.mktemp("conditioned")
    (folder / "tokenizer").symlink_to(tiny_run / "tokenizer")
    changes = {"is_class_conditional": False, "guidance_scale": 2.0}
    config = prior_run(folder, total_steps=4).model_copy(update=changes)
    conditioner = Attributes(config.prior.width)
    before = conditioner.to_vector.weight.clone()
    train_prior(config, conditioner=conditioner)
    assert not torch.equal(conditioner.to_vector.weight, before)
    with pytest.raises(InputError, match="conditioner must be given"):
        ImageGenerationPipeline.from_pretrained(folder)
    return ImageGenerationPipeline.from_pretrained(folder, conditioner=conditioner)


def test_it_is_short_and_its_copy_gives_the_same_likelihoods(
    pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    assert len(inspect.getsource(Attributes).splitlines()) <= 40
    indices, numbers = pipeline.encode(torch.rand(4, 3, 16, 16) * 2 - 1), torch.arange(4)
    log_prob = pipeline.prior.log_prob(indices, numbers)
    assert not torch.isclose(pipeline.prior.log_prob(indices, numbers + 1), log_prob).any()
    pipeline.save_pretrained(tmp_path)
    copy = Prior.from_pretrained(tmp_path / "prior", conditioner=Attributes(16))
    assert torch.equal(copy.log_prob(indices, numbers), log_prob)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_pipeline_draws_images_that_depend_on_their_condition_alone(
    pipeline: ImageGenerationPipeline, guidance_scale: float
) -> None:
    def drawn(numbers: Tensor | None, batch_size: int) -> Tensor:
        options = {"guidance_scale": guidance_scale, "batch_size": batch_size, "progress": False}
        images = pipeline(8, condition=numbers, output="tensor", **options)
        assert isinstance(images, Tensor)
        return images

    numbers = torch.arange(8)
    images = drawn(numbers, 8)
    assert torch.equal(drawn(numbers, 3), images)
    changed = drawn(numbers.masked_fill(numbers == 5, 2), 8) != images
    assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [5]
    if guidance_scale == 1:
        assert not torch.equal(drawn(None, 8), images)
    with pytest.raises(InputError, match="condition must have one row for 8 images, got 7"):
        drawn(numbers[1:], 8)
    with pytest.raises(InputError, match="labels must be None beside condition"):
        pipeline(8, 0, condition=numbers, progress=False)
