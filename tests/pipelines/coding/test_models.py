"""Files by stored counts and by the prior of stage two: short, exact, refused where they must."""

import functools
import itertools
import math
from pathlib import Path

import pytest
import torch

from pipelines import ImageGenerationPipeline
from pipelines.coding import layout
from pipelines.marginals import Marginals
from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from prior.sampling import sample, sample_generators
from tests.image_files import noise
from tests.tokenizer.tiny import HYBRID, make_tokenizer
from tokenizer import InputError, Tokenizer

SIDE = 16
NETWORK = PriorNetworkConfig(width=16, num_spatial_layers=1, num_depth_layers=1, num_heads=2)


def marginals_of(tokenizer: Tokenizer) -> Marginals:
    """As if of many images: some codes often, some never."""
    counts = tuple(
        tuple([10**6 // 4**code for code in range(size - 1)] + [0])
        for size in tokenizer.codebook_sizes
    )
    identity = tokenizer.identity_hash()
    return Marginals(counts=counts, tokenizer_hash=identity, images="", num_images=1)


@functools.cache
def pipeline_of(order: str, num_classes: int = 3) -> ImageGenerationPipeline:
    """An untrained prior that is far from uniform, over three layers in two groups."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(HYBRID).float()
    network = NETWORK.model_copy(
        update={"order": order, "label_dropout": 0.1 if num_classes > 1 else 0.0}
    )
    config = PriorConfig(
        network=network,
        code_maps=tokenizer.code_maps(SIDE, SIDE),
        num_classes=num_classes,
        tokenizer_hash=tokenizer.identity_hash(),
    )
    prior = Prior(config)
    prior.load_code_vectors(tokenizer.code_vectors())
    with torch.no_grad():
        for output in prior.outputs:
            output.weight.mul_(8)  # type: ignore[operator]
    pipeline = ImageGenerationPipeline(tokenizer, prior)
    pipeline.marginals = marginals_of(tokenizer)
    return pipeline


@pytest.mark.parametrize("order", ["coarse_to_fine", "cell"])
def test_a_file_by_the_prior_is_hardly_longer_than_its_cross_entropy_and_exact(order: str) -> None:
    pipeline = pipeline_of(order)
    codec = pipeline.codec()
    codes = sample(pipeline.prior, None, sample_generators(0, [0]))
    labels = torch.full((1,), pipeline.prior.config.num_classes)  # the null class
    with torch.no_grad():
        nats = pipeline.prior(codes, labels).loss.item()
    content = codec.encode(codes, SIDE, SIDE, "prior")
    assert len(content) <= 1.01 * nats / math.log(256) + 24
    found = codec.decode(content)
    assert all(map(torch.equal, found.indices, codes))
    assert (found.num_layers, found.width, found.height) == (5, SIDE, SIDE)


def test_a_file_by_stored_counts_is_hardly_longer_than_its_cross_entropy_and_exact() -> None:
    pipeline = pipeline_of("cell")
    codec = pipeline.codec()
    assert pipeline.marginals is not None
    for side in (16, 200):
        codes, bits = [], 0.0
        layers = iter(pipeline.marginals.counts)
        for own in pipeline.tokenizer.code_maps(side, side):
            shares = torch.tensor([next(layers) for _ in range(own.depth)]).double()
            shares /= shares.sum(1, keepdim=True)
            drawn = torch.multinomial(shares, own.height * own.width, replacement=True)
            bits -= shares.gather(1, drawn).log2().sum().item()
            codes.append(drawn.view(1, own.depth, own.height, own.width))
        content = codec.encode(codes, side, side, "marginals")
        # Three bytes for each layer beyond four, and one that stands for an empty last layer.
        assert len(content) <= 1.01 * bits / 8 + 27 + content.endswith(b"\0")
        assert all(map(torch.equal, codec.decode(content).indices, codes))
        for group in codes:
            group.fill_(group.max() + 1)  # codes that never came can be written, too
        content = codec.encode(codes, side, side, "marginals")
        assert all(map(torch.equal, codec.decode(content).indices, codes))


def test_a_file_by_the_prior_cut_behind_a_group_gives_its_layers() -> None:
    pipeline = pipeline_of("coarse_to_fine")
    picture = noise(SIDE, SIDE - 3)
    content = pipeline.compress(picture, model="prior")
    header, start = pipeline.codec().header(content)
    (end,) = itertools.accumulate(header.lengths)
    codes = pipeline.codec().decode(content).indices
    num_layers = pipeline.tokenizer.config.groups[0].num_layers
    expected = pipeline.decode(codes, num_layers, output="pt")[..., : SIDE - 3]  # type: ignore[index]
    found = pipeline.decompress(content[: start + end], "pt")
    assert torch.equal(found, expected)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cut within part 1 of 2"):
        pipeline.decompress(content[: start + end - 1])


def test_what_the_models_do_not_take_is_refused() -> None:
    pipeline, conditional = pipeline_of("cell"), pipeline_of("cell", num_classes=1)
    alone = make_tokenizer(HYBRID).float()
    content = pipeline.compress(noise(SIDE, SIDE), model="prior")
    with pytest.raises(InputError, match="16 by 16 pixels for the model 'prior', or up to 7 less"):
        pipeline.compress(noise(SIDE + 1, SIDE), model="prior")
    with pytest.raises(InputError, match="prior that has no null condition"):
        conditional.compress(noise(SIDE, SIDE), model="prior")
    with pytest.raises(InputError, match="of another tokenizer"):
        pipeline_of("coarse_to_fine").decompress(content)
    other = type(pipeline)(pipeline.tokenizer, pipeline.prior)
    assert other.compress(noise(8, 8)) == pipeline.compress(noise(8, 8), model="counts")
    with pytest.raises(InputError, match="of another tokenizer: this one has no 'marginals'"):
        other.decompress(pipeline.compress(noise(8, 8)))
    assert alone.code_prior is None


def test_files_of_the_first_version_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of("cell")
    content = pipeline.compress(noise(9, 9), model="counts")
    codec = pipeline.codec()
    header, start = codec.header(content)
    monkeypatch.setattr(layout, "VERSION", 1)
    monkeypatch.setattr(layout, "MODELS", ("counts", "own"))
    first = layout.pack(header, pipeline.tokenizer.identity_hash()) + content[start:]
    monkeypatch.undo()
    assert first != content
    assert all(map(torch.equal, codec.decode(first).indices, codec.decode(content).indices))


def test_counts_are_saved_beside_the_tokenizer_and_left_out_with_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = pipeline_of("cell")
    pipeline.save_pretrained(tmp_path)
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path)
    assert loaded.marginals == pipeline.marginals
    assert loaded.compress(noise(8, 8)) == pipeline.compress(noise(8, 8), model="marginals")
    torch.manual_seed(1)
    other = Tokenizer(HYBRID)
    assert Marginals.load(tmp_path / "tokenizer", other) is None
    assert "it is of other codes" in caplog.text
    (tmp_path / "tokenizer" / "marginals.json").write_text("{}")
    with pytest.raises(InputError, match=r"marginals\.json"):
        ImageGenerationPipeline.from_pretrained(tmp_path)
