"""What the page does to pictures and codes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline, TokenizerPipeline
from pipelines.app import load_playground
from pipelines.images import difference, enlarged, similar_colors
from pipelines.playground import (
    MOST_CODES,
    Place,
    Playground,
)
from pipelines.sampling_config import SamplingConfig
from tests.image_files import noise
from tokenizer import Tokenizer
from tokenizer.builders import hq_vae, sq_vae
from tokenizer.config import NetworkConfig
from tokenizer.storage.errors import InputError

PICTURE = Image.fromarray(noise(32, 32))
LAYERS = range(3)


@pytest.fixture(scope="module")
def playground(pipeline: ImageGenerationPipeline) -> Playground:
    return Playground(pipeline)


@pytest.fixture(scope="module")
def indices(playground: Playground) -> list[torch.Tensor]:
    return playground.encode(PICTURE)


def made(channels: int) -> Playground:
    """A tokenizer without a prior, and without a saved size."""
    torch.manual_seed(0)
    networks = NetworkConfig(width=8, max_width=8, num_blocks=1)
    config = sq_vae(16, 60, 4, channels=channels, networks=networks)
    return Playground(TokenizerPipeline(Tokenizer(config)))


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


def test_the_layers_are_those_of_the_codes(
    playground: Playground, indices: list[torch.Tensor]
) -> None:
    shapes = [(own.height, own.width) for own in playground.layers]
    assert shapes == [(*group.shape[2:],) for group in indices for _ in range(group.shape[1])]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_code_replaced_by_itself_changes_nothing(
    playground: Playground, indices: list[torch.Tensor], layer: int
) -> None:
    place = Place(layer, 1, 0)
    code = playground.code_at(indices, place)
    assert same(playground.replaced(indices, place, code), indices)
    one = playground.decode(indices)
    assert difference(one, one)[1:] == (0.0, 0)


@pytest.mark.parametrize("layer", LAYERS)
def test_another_code_changes_one_place_and_its_part_of_the_picture(
    playground: Playground, indices: list[torch.Tensor], layer: int
) -> None:
    place = Place(layer, 1, 0)
    before = [group.clone() for group in indices]
    code = (playground.code_at(indices, place) + 1) % playground.layers[layer].num_codes
    changed = playground.replaced(indices, place, code)
    assert same(indices, before)
    assert playground.code_at(changed, place) == code
    assert sum(int((a != b).sum()) for a, b in zip(indices, changed, strict=True)) == 1
    drawn = difference(playground.decode(indices), playground.decode(changed))
    assert drawn.share > 0
    shown = np.asarray(drawn.picture)
    height = playground.side // playground.layers[layer].height
    assert shown[height : 2 * height, :height].mean() > shown[:, -height:].mean()


@pytest.mark.parametrize("code", [-1, 8, None])
def test_there_is_no_other_code(
    playground: Playground, indices: list[torch.Tensor], code: int | None
) -> None:
    with pytest.raises(InputError, match="code must be from 0 to 7, got"):
        playground.replaced(indices, Place(0, 0, 0), code)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_click_finds_the_square_that_is_framed(
    playground: Playground, indices: list[torch.Tensor], layer: int
) -> None:
    plain = playground.map_picture(indices, layer)
    number = playground.layers[layer].width
    cell = plain.width // number
    for row, column in np.ndindex(number, number):
        place = Place(layer, row, column)
        marked = difference(plain, playground.map_picture(indices, layer, place)).picture
        left, top, right, bottom = marked.getbbox() or (0, 0, 0, 0)
        assert (left, top) == (column * cell, row * cell)
        for x, y in ((left, top), (right - 1, bottom - 1)):
            assert playground.place_at(layer, x, y) == place


def test_the_nearest_code_is_the_one_that_is_there_and_its_tile_is_cut_from_the_picture(
    playground: Playground, indices: list[torch.Tensor]
) -> None:
    place = Place(2, 3, 3)  # at the border
    code, *others = playground.nearest_codes(indices, place)
    assert code == playground.code_at(indices, place)
    assert sorted([code, *others]) == [*range(playground.layers[2].num_codes)]
    vectors = playground.pipeline.tokenizer.code_vectors()[1][0]
    distances = (vectors[others] - vectors[code]).norm(dim=1)
    assert torch.equal(distances, distances.sort().values)
    tile, other = playground.tiles(indices, place, [code, others[-1]])
    cell = playground.side // 4
    whole = playground.decode(indices).crop((cell, cell, 4 * cell, 4 * cell))
    expected = whole.resize(tile.size, Image.Resampling.NEAREST)
    assert difference(tile, expected).largest <= 1  # the last bits of a sum depend on the batch
    assert difference(tile, other).largest > 1


def test_layer_by_layer_ends_with_the_reconstruction(
    playground: Playground, indices: list[torch.Tensor]
) -> None:
    (original, _), *layers = playground.layer_by_layer(PICTURE, indices)
    assert original == playground.prepared(PICTURE)
    assert len(layers) == len(playground.layers)
    whole = playground.pipeline.reconstruct(PICTURE)
    assert layers[-1][0] == whole[0]
    error = np.asarray(whole[0]) / 255 - np.asarray(original) / 255
    assert layers[-1][1] == f"layers 1–3, RMSE {np.sqrt((error**2).mean()):.3f}"


def test_samples_follow_class_seed_and_settings(playground: Playground) -> None:
    sampling = SamplingConfig.checked(temperature=(1.0, 0.5, 2.0), top_p=(1.0, 0.9, 1.0))
    drawn = playground.sample(2, 1, 3, sampling)
    expected = playground._prior()(
        2, 1, 3, temperature=(1.0, 0.5, 2.0), top_p=(1.0, 0.9, 1.0), progress=False
    )
    assert drawn == expected
    assert drawn != playground.sample(2, 1, 4, sampling)


@pytest.mark.parametrize("label", [None, 2])
def test_what_is_not_painted_over_stays(playground: Playground, label: int | None) -> None:
    canvas = enlarged(playground.prepared(PICTURE), 512)
    painted = Image.new("RGBA", canvas.size)
    painted.paste((255, 0, 0, 255), (0, 0, canvas.width // 2 + 1, canvas.height))
    sampling = SamplingConfig(guidance_scale=2.0)
    drawn = playground.redraw(canvas, painted, 2, label, 0, sampling)
    half = playground.side // 2 + 1  # a pixel that is touched is painted over
    kept = (half, 0, playground.side, playground.side)
    assert [own.size for own in drawn] == [(playground.side, playground.side)] * 2
    for own in drawn:
        assert own.crop(kept) == playground.prepared(PICTURE).crop(kept)
        assert own != playground.prepared(PICTURE)


def test_nothing_painted_is_said(playground: Playground) -> None:
    nothing = Image.new("RGBA", (64, 64))
    with pytest.raises(InputError, match="mask must cover a part of the picture"):
        playground.redraw(PICTURE, nothing, 1, None, 0, SamplingConfig())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_without_a_prior_and_in_any_channels(channels: int) -> None:
    playground = made(channels)
    assert playground.side == 128
    assert playground.generation is None
    indices = playground.encode(PICTURE)
    assert playground.decode(indices).size == (128, 128)
    first, last = playground.codebook(0), playground.codebook(0, MOST_CODES)
    assert [name for _, name in first + last] == [str(code) for code in range(60)]
    playground.frame(first[0][0], Place(0, 0, 0))
    with pytest.raises(InputError, match="the run must have a prior for this"):
        playground.sample(1, None, 0, SamplingConfig())


def test_alike_codes_have_alike_colors() -> None:
    vectors = torch.tensor([[0.0, 0], [0.1, 0], [5, 5], [5, 5.1], [-4, 3]])
    colors = similar_colors(vectors).astype(int)
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)
    assert distances[0, 1] < 20 < distances[0, 2]
    assert distances[2, 3] < 20 < distances[2, 4]
    assert (similar_colors(torch.zeros(2, 1)) == 170).all()


def test_a_run_under_way_and_a_saved_tokenizer_have_no_prior(
    tiny_run: Path, pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    cpu = torch.device("cpu")
    assert load_playground(str(tiny_run), cpu).generation is not None
    pipeline.save_pretrained(tmp_path / "saved")
    assert load_playground(str(tmp_path / "saved"), cpu).generation is not None
    (tmp_path / "saved" / "prior" / "model.safetensors").unlink()
    assert load_playground(str(tmp_path / "saved"), cpu).generation is None
    assert load_playground(str(tiny_run / "tokenizer"), cpu).generation is None
    with pytest.raises(InputError, match="holds no Tokenizer"):
        load_playground(str(tmp_path / "none"), cpu)


def test_groups_of_any_depth_are_found() -> None:
    networks = NetworkConfig(width=8, max_width=8, num_blocks=1)
    config = hq_vae((8, 4), (2, 3), 8, 4, networks=networks)
    playground = Playground(TokenizerPipeline(Tokenizer(config)))
    assert [own[:2] for own in playground.layers] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
