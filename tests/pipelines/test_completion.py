"""Completions: what is known stays, and the rest follows the prior given the known codes."""

import functools
import inspect
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipelines import ImageGenerationPipeline
from pipelines.images import to_float, to_uint8
from pipelines.known import fill_from_nearest, first_layers, known_codes, windows
from tests.image_files import noise
from tests.prior.small_priors import make_prior
from tokenizer import Tokenizer
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig
from tokenizer.storage.errors import InputError

QUADRANT = np.zeros((16, 16), bool)
QUADRANT[:8, :8] = True


@functools.cache
def two_codes(order: str, size: int) -> ImageGenerationPipeline:
    """A pipeline of two codes per layer, started from data, whose prior is far from uniform."""
    torch.manual_seed(0)
    networks = NetworkConfig(width=8, max_width=8, num_blocks=1)
    tokenizer = Tokenizer(hq_vae((8, 4), (1, 1), 2, 4, networks=networks))
    images = torch.stack([to_float(picture(seed)[None])[0] for seed in range(32)])
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(0))
    prior = make_prior(tokenizer.code_maps(size, size), order, condition="none", sharpness=9.0)
    prior.config = prior.config.model_copy(update={"tokenizer_hash": tokenizer.content_hash()})
    # Thousands of images of a few codes each: a decoder called once for each kind is as good.
    decode, decoded = tokenizer.decode, {}

    def decode_once(indices: Any, num_layers: int | None = None) -> torch.Tensor:
        key = (*(tuple(group.flatten().tolist()) for group in indices), num_layers)
        if key not in decoded:
            decoded[key] = decode(indices, num_layers)
        return decoded[key]

    tokenizer.decode = decode_once
    return ImageGenerationPipeline(tokenizer, prior)


def picture(seed: int, side: int = 16) -> torch.Tensor:
    """Large dots of color, as bytes (C, H, W)."""
    return (
        torch.tensor(noise(4, 4, seed=seed))
        .repeat_interleave(side // 4, 0)
        .repeat_interleave(side // 4, 1)
        .movedim(-1, 0)
    )


def distance_to_exact(
    pipeline: ImageGenerationPipeline, drawn: torch.Tensor, known: list[torch.Tensor]
) -> float:
    """Total variation of drawn images, and the prior's conditional of all that they may be.

    Args:
        pipeline: with few enough codes to write down each completion.
        drawn: images as bytes, as they were decoded.
        known: the known codes of each, -1 elsewhere.
    """
    sizes = [group[0].numel() for group in known]
    row = torch.cat([group[0].flatten() for group in known])
    free = (row < 0).nonzero().flatten()
    rows = row.repeat(2 ** len(free), 1)
    rows[:, free] = torch.tensor(list(itertools.product(range(2), repeat=len(free))))
    completions = [
        part.view(-1, *group.shape[1:])
        for part, group in zip(rows.split(sizes, 1), known, strict=True)
    ]
    expected = pipeline.prior.log_prob(completions, None).double().softmax(0)
    images = to_uint8(pipeline.decode(completions))
    numbers = {image.numpy().tobytes(): number for number, image in enumerate(images)}
    assert len(numbers) == len(images), "two completions look alike"
    found = torch.tensor([numbers[image.numpy().tobytes()] for image in drawn])
    counts = torch.bincount(found, minlength=len(images))
    return (counts / len(drawn) - expected).abs().sum().item() / 2


@pytest.mark.parametrize(
    ("order", "num_candidates", "bounds"),
    [("cell", 32, (0, 0.07)), ("cell", 1, (0.15, 1)), ("coarse_to_fine", 32, (0, 0.07))],
)
def test_what_is_inpainted_follows_the_prior_given_the_known_codes(
    order: str,
    num_candidates: int,
    bounds: tuple[float, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipeline = two_codes(order, 16)
    image = picture(0)
    assert all(0 < group.float().mean() < 1 for group in pipeline.encode(image))
    mask = torch.tensor(QUADRANT)
    known = known_codes(pipeline.encode(fill_from_nearest(image[None], mask)), mask)
    decoded: list[torch.Tensor] = []
    inside = ImageGenerationPipeline._sample

    def sample(*arguments: Any) -> torch.Tensor:
        decoded.append(inside(*arguments))
        return decoded[-1]

    monkeypatch.setattr(ImageGenerationPipeline, "_sample", sample)
    options: dict[str, Any] = {"num_candidates": num_candidates, "batch_size": 8192}
    images = pipeline.inpaint(image, mask, 800, output="pt", progress=False, **options)
    assert bounds[0] <= distance_to_exact(pipeline, decoded[0], known) < bounds[1]
    # What is given is what was drawn under the mask, and the picture elsewhere.
    assert torch.equal(images[:, :, :8, :8], decoded[0][:, :, :8, :8])
    assert torch.equal(torch.where(mask, image, images), image.expand_as(images))


@pytest.mark.parametrize("order", ["cell", "coarse_to_fine"])
def test_variations_follow_the_prior_given_the_kept_layers(order: str) -> None:
    pipeline = two_codes(order, 8)
    image = picture(0, 8)
    known = first_layers(pipeline.encode(image), 1)
    images = pipeline.variations(image, 1, 1000, output="pt", progress=False, batch_size=8192)
    assert distance_to_exact(pipeline, images, known) < 0.07


@pytest.mark.parametrize("output", ["pil", "np", "pt"])
def test_pixels_outside_the_mask_are_those_of_the_picture(
    pipeline: ImageGenerationPipeline, output: Any
) -> None:
    picture = Image.fromarray(noise(40, 60))
    mask = np.zeros((40, 60), np.uint8)
    mask[5:20, 20:33] = 255
    images = pipeline.inpaint(picture, Image.fromarray(mask), 3, output=output, progress=False)
    arrays = np.stack([np.asarray(image) for image in images])
    arrays = np.moveaxis(arrays, 1, -1) if output == "pt" else arrays
    before = np.asarray(pipeline.decode(pipeline.encode(picture), output="np"))
    kept = np.asarray(((pipeline.preprocess(picture)[0] + 1) * 127.5).round().byte())
    is_same = (arrays == np.moveaxis(kept, 0, -1)).all((0, 3))
    is_masked = np.zeros((16, 16), bool)
    is_masked[2:8, 4:10] = True  # 2.5 of the picture's pixels in one, of which 10 are cropped
    assert is_same[~is_masked].all()
    assert not is_same[is_masked].all()
    assert not np.array_equal(before[0], arrays[0])


def test_what_lies_under_the_mask_has_no_part_in_a_completion(
    pipeline: ImageGenerationPipeline,
) -> None:
    picture = noise(16, 16)
    other = np.where(QUADRANT[..., None], noise(16, 16, seed=1), picture)
    draw = functools.partial(
        pipeline.inpaint, mask=QUADRANT, num_images=2, labels="star", output="pt", progress=False
    )
    expected = draw(picture)
    assert torch.equal(draw(other), expected)
    assert torch.equal(draw(picture, batch_size=1), expected)
    assert torch.equal(draw(picture, num_images=1), expected[:1])
    assert torch.equal(draw(picture, labels=["star", 5]), draw(picture, labels=[3, "cross"]))
    for changed in ({"seed": 1}, {"generator": torch.Generator().manual_seed(1)}):
        assert not torch.equal(draw(picture, **changed), expected)


def test_a_mask_of_everything_leaves_a_sample_and_one_of_nothing_the_picture(
    pipeline: ImageGenerationPipeline,
) -> None:
    picture = noise(16, 16)
    everything = np.ones((16, 16), bool)
    options: dict[str, Any] = {"labels": 2, "seed": 4, "output": "pt", "progress": False}
    found = pipeline.inpaint(picture, everything, 2, **options)
    assert torch.equal(found, pipeline(2, **options))
    kept = pipeline.inpaint(picture, ~everything, output="np", progress=False)
    np.testing.assert_array_equal(kept[0], picture)


def test_a_generator_gives_the_seed(pipeline: ImageGenerationPipeline) -> None:
    draw = functools.partial(pipeline, 2, output="pt", progress=False)
    generator = torch.Generator().manual_seed(5)
    first, second = draw(generator=generator), draw(generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(draw(generator=generator.manual_seed(5)), first)
    seed = int(torch.randint(2**63 - 1, (), generator=generator.manual_seed(5)))
    assert torch.equal(draw(seed=seed), first)


def test_a_picture_stays_within_what_is_drawn_around_it(pipeline: ImageGenerationPipeline) -> None:
    picture = noise(16, 16)
    sides: dict[str, Any] = {"left": 3, "top": 9}
    draw = functools.partial(pipeline.outpaint, picture, **sides, output="np", progress=False)
    images = draw(num_images=2)
    assert images.shape == (2, 25, 19, 3)
    for image in images:
        np.testing.assert_array_equal(image[9:, 3:], picture)
    assert not np.array_equal(images[0], images[1])
    np.testing.assert_array_equal(draw(), images[:1])
    assert not np.array_equal(draw(seed=1), images[:1])


@given(
    before=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    after=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_windows_cover_the_canvas_and_overlap_what_is_there(
    before: tuple[int, int], after: tuple[int, int]
) -> None:
    size = (8, 12)
    canvas = tuple(sum(sides) for sides in zip(before, size, after, strict=True))
    is_there = np.zeros(canvas, bool)
    is_there[before[0] : before[0] + 8, before[1] : before[1] + 12] = True
    for place in windows((canvas[0], canvas[1]), before, size):
        assert is_there[place].shape == size
        assert is_there[place].mean() >= 0.5
        is_there[place] = True
    assert is_there.all()


@given(seed=st.integers(0, 99), share=st.floats(0.01, 0.99))
def test_unknown_pixels_become_copies_of_the_nearest_known_ones(seed: int, share: float) -> None:
    random = np.random.default_rng(seed)
    is_unknown = random.random((5, 7)) < share
    is_unknown[random.integers(5), random.integers(7)] = False
    places = np.argwhere(~is_unknown)
    image = torch.arange(35, dtype=torch.uint8).view(1, 1, 5, 7)
    filled = fill_from_nearest(image, torch.tensor(is_unknown))
    for row, column in np.argwhere(np.ones((5, 7), bool)):
        source = np.array(divmod(int(filled[0, 0, row, column]), 7))
        assert not is_unknown[tuple(source)]
        lengths = np.square(places - (row, column)).sum(1)
        assert np.square(source - (row, column)).sum() == lengths.min()


def test_codes_are_known_where_no_pixel_under_them_is_masked() -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[7, 9] = True
    coarse, fine = known_codes([torch.ones(1, 2, 2, 2).long(), torch.ones(1, 1, 4, 4).long()], mask)
    assert (coarse == -1).nonzero().tolist() == [[0, 0, 0, 1], [0, 1, 0, 1]]
    assert (fine == -1).nonzero().tolist() == [[0, 0, 1, 2]]


def test_layers_are_counted_from_the_coarsest(pipeline: ImageGenerationPipeline) -> None:
    indices = pipeline.encode(noise(16, 16))
    for number in (1, 2):
        kept = first_layers(indices, number)
        layers = [layer for group in kept for layer in group.unbind(1)]
        assert [bool((layer >= 0).all()) for layer in layers] == [n < number for n in range(3)]
        assert [bool((layer < 0).all()) for layer in layers] == [n >= number for n in range(3)]


PICTURE = noise(20, 30)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("inpaint", {"mask": QUADRANT}, "mask must have the size of image, 30 by 20, got 16 by 16"),
        ("inpaint", {"image": torch.zeros(3, 24, 24)}, "image must be 16 by 16 .* got 24 by 24"),
        ("inpaint", {"image": torch.full((3, 16, 16), 9.0)}, r"images must lie on \[-1, 1\]"),
        ("inpaint", {"image": torch.zeros(2, 3, 16, 16)}, "image must be one picture, got 2"),
        (
            "inpaint",
            {"image": [PICTURE]},
            r"image must be a PIL image, .* height, width\), got list",
        ),
        ("inpaint", {"labels": "sqare"}, "no class is called 'sqare'; did you mean 'square'"),
        ("inpaint", {"labels": [1, 2]}, "labels must have 1 entries, got 2"),
        ("inpaint", {"num_images": 0}, "num_images must be >= 1, got 0"),
        ("inpaint", {"seed": -1}, "seed must be >= 0, got -1"),
        ("inpaint", {"seed": 1, "generator": torch.Generator()}, "seed must be left out beside"),
        ("inpaint", {"output": "jpg"}, "output must be 'pil', 'np', 'pt' or 'tensor', got 'jpg'"),
        ("inpaint", {"temperature": 0.0}, r"temperature.*or equal to 0\.000001"),
        ("outpaint", {}, "left, top, right or bottom must be >= 1, got none"),
        ("outpaint", {"left": -1}, "left must be >= 0, got -1"),
        ("outpaint", {"left": 1.5}, r"left must be a whole number, got 1\.5"),
        ("variations", {"keep_layers": 0}, "keep_layers must be >= 1 and below .* 3, got 0"),
        ("variations", {"keep_layers": 3}, "keep_layers must be >= 1 and below .* 3, got 3"),
    ],
)
def test_what_cannot_be_completed_is_refused_before_work_on_one_line(
    pipeline: ImageGenerationPipeline,
    name: str,
    arguments: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for method in ("inpaint", "outpaint", "variations", "_prepare"):
        bare = inspect.unwrap(getattr(ImageGenerationPipeline, method))  # no checker of types
        monkeypatch.setattr(ImageGenerationPipeline, method, bare)
    given_mask = {"mask": np.zeros((20, 30), bool)} if name == "inpaint" else {}
    with pytest.raises(InputError, match=message) as caught:
        getattr(pipeline, name)(**{"image": PICTURE, **given_mask, **arguments})
    assert "\n" not in str(caught.value)


def test_an_unknown_option_is_refused() -> None:
    pipeline = two_codes("cell", 8)
    given = picture(0, 8)[None]
    mask = np.zeros((8, 8), bool)
    for call in (
        lambda: pipeline.inpaint(to_float(given), mask, temprature=0.1),
        lambda: pipeline.variations(to_float(given), keep_layers=1, temprature=0.1),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
            call()
