"""Laws of the pictures of codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.data.shapes import draw_shapes
from pipelines.evaluation.code_statistics import EncodedImages, decode, encode
from pipelines.images import to_float
from pipelines.report.code_pictures import NUM_EXAMPLES, layer_pictures
from tests.tokenizer.tiny import HYBRID, make_tokenizer
from tokenizer import Tokenizer

SIZE = 32


def make(channels: int) -> tuple[Tokenizer, EncodedImages]:
    config = HYBRID.model_copy(update={"channels": channels})
    tokenizer = make_tokenizer(config).eval()
    drawn = draw_shapes(0, "train", np.arange(40), SIZE, channels)  # type: ignore[arg-type]
    images = torch.from_numpy(drawn).movedim(-1, 1).contiguous()
    tokenizer.initialize_from_data(to_float(images).double(), torch.Generator().manual_seed(0))
    labels = torch.zeros(40, dtype=torch.int64)
    return tokenizer, EncodedImages(images, encode(tokenizer, images), labels)


def windows(images: Tensor, cells: Tensor, cell: int) -> set[bytes]:
    """Of 3×3 cells around each of the cells of a map that are marked, in white surroundings."""
    padded = torch.nn.functional.pad(images, [cell] * 4, value=255)
    return {
        padded[
            item, :, row * cell : row * cell + 3 * cell, column * cell : column * cell + 3 * cell
        ]
        .numpy()
        .tobytes()
        for item, row, column in cells.nonzero().tolist()
    }


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("layer", [0, 3])
def test_examples_are_where_the_code_is_chosen_and_drawn_by_the_layers_so_far(
    channels: int, layer: int
) -> None:
    tokenizer, encoded = make(channels)
    indices = encoded.layers[layer]
    codes = indices.flatten().bincount().argsort(descending=True)[:2].tolist()
    pictures = layer_pictures(tokenizer, encoded, layer, codes)
    assert (pictures.cell, pictures.window) == ((8, 24), (4, 12))[layer > 0]
    scale = pictures.grid.height // (len(codes) * (pictures.window + 2) + 2)
    array = np.array(pictures.grid).reshape(*pictures.grid.size[::-1], -1)
    array = array[::scale, ::scale]  # (rows, columns, channels), a pixel each
    step = pictures.window + 2
    decoded = decode(tokenizer, encoded.indices, layer + 1)
    for row, code in enumerate(codes):
        tiles = [
            np.ascontiguousarray(
                array[row * step + 2 :, column * step + 2 :][: step - 2, : step - 2].transpose(
                    2, 0, 1
                )
            ).tobytes()
            for column in range(2 * NUM_EXAMPLES + 3)
        ]
        cells = indices == code
        assert set(tiles[:NUM_EXAMPLES]) <= windows(encoded.images, cells, pictures.cell)
        drawn = tiles[NUM_EXAMPLES + 1 : -2]
        assert set(drawn) <= windows(decoded, cells, pictures.cell)


def test_a_code_put_where_it_is_changes_nothing() -> None:
    tokenizer, encoded = make(3)
    same = torch.zeros(20, dtype=torch.int64)  # the same image again and again
    encoded = EncodedImages(encoded.images[same], [own[same] for own in encoded.indices], same)
    present = int(encoded.layers[1][0, 2, 2])
    assert layer_pictures(tokenizer, encoded, 1, [present]).largest_change == 0
    others = [code for code in range(6) if code != present]
    pictures = layer_pictures(tokenizer, encoded, 1, [present, *others])
    assert pictures.largest_change > 0
    tile = np.array(pictures.grid)[10:40, -40:-10]
    assert (tile == 128).all()
