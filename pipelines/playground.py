"""What the page of `hqvae app` does to pictures and codes, without the page."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pipelines.data.given_conditions import read_given
from pipelines.generation import ImageGenerationPipeline
from pipelines.images import enlarged, enlargement, similar_colors, to_pil, to_uint8
from pipelines.preprocessing import Picture
from pipelines.sampling_config import SamplingConfig
from pipelines.tokenizer_pipeline import TokenizerPipeline
from tokenizer.storage.errors import InputError

SIDE_WITHOUT_SAVED_SIZE = 128
MOST_CODES = 48
"""Drawn side by side."""
MAP_SIDE, CANVAS_SIDE, TILE_SIDE = 448, 512, 96
SMALLEST_NUMBERED_CELL = 24
"""Pixels that a number needs."""

Indices = list[Tensor]
"""Of one picture: (1, depth, h, w) per group, coarse to fine."""
Captioned = tuple[Image.Image, str]


class Layer(NamedTuple):
    """One layer of codes of a picture."""

    group: int
    depth: int
    """Its number within the group."""
    height: int
    width: int
    num_codes: int


class Place(NamedTuple):
    """Where a code stands."""

    layer: int
    row: int
    column: int


class Playground:
    """Pictures of the one size that the models were trained on, their codes, and what they draw.

    Args:
        pipeline: with a prior (`ImageGenerationPipeline`) or without.
    """

    def __init__(self, pipeline: TokenizerPipeline) -> None:
        self.pipeline = pipeline
        multiple = pipeline.tokenizer.config.groups[0].downsampling
        default = max(multiple, SIDE_WITHOUT_SAVED_SIZE // multiple * multiple)
        self.side = pipeline.image_size or default
        """Of pictures, in pixels."""
        self.layers = [
            Layer(group, depth, code_map.height, code_map.width, num_codes)
            for group, code_map in enumerate(pipeline.tokenizer.code_maps(self.side, self.side))
            for depth, num_codes in enumerate(code_map.codebook_sizes)
        ]
        vectors = [
            own.float().cpu() for group in pipeline.tokenizer.code_vectors() for own in group
        ]
        self._vectors = vectors
        self._colors = [similar_colors(own) for own in vectors]

    @property
    def generation(self) -> ImageGenerationPipeline | None:
        """The pipeline, if it has a prior."""
        return self.pipeline if isinstance(self.pipeline, ImageGenerationPipeline) else None

    # From noise

    def sample(
        self,
        num_images: int,
        label: int | None,
        seed: int,
        sampling: SamplingConfig,
        condition: Any = None,
    ) -> list[Image.Image]:
        """New pictures, of one class or of all in turn, or of a condition.

        Raises:
            InputError: there is no prior, or an argument is out of range.
        """
        prior = self._prior()
        is_guided = prior.prior.config.num_classes > 0 or condition is not None
        options = self._options(sampling, is_guided) | {"condition": condition}
        return list(prior(num_images, label, seed, progress=False, **options))

    def redraw(
        self,
        picture: Image.Image,
        painted: Image.Image,
        num_images: int,
        label: int | None,
        seed: int,
        sampling: SamplingConfig,
        condition: Any = None,
    ) -> list[Image.Image]:
        """Pictures whose painted part is drawn anew.

        Args:
            picture: of the models' size, or enlarged (see `enlarged`).
            painted: of any size; what is not transparent is drawn anew, whole pixels at a time.
            num_images: how many.
            label: a class; None is that of no class, which cannot be guided.
            seed: of all random numbers.
            sampling: how codes are drawn.
            condition: in place of a class.

        Raises:
            InputError: nothing is painted, there is no prior, or an argument is out of range.
        """
        size = (self.side, self.side)
        mask = np.asarray(
            painted.convert("RGBA").getchannel("A").resize(size, Image.Resampling.BOX)
        )
        if not mask.any():
            raise InputError("mask must cover a part of the picture: paint over what is to change")
        is_guided = label is not None or condition is not None
        options = self._options(sampling, is_guided) | {"condition": condition}
        small = picture.resize(size, Image.Resampling.NEAREST)  # inverts `enlarged`
        drawn = self._prior().inpaint(
            small, mask > 0, num_images, label, seed, progress=False, **options
        )
        return list(drawn)

    def _options(self, sampling: SamplingConfig, is_guided: bool) -> dict[str, Any]:
        options = sampling.model_dump()
        return options if is_guided else options | {"guidance_scale": 1.0}

    def condition_of_file(self, path: str, row: int, num_images: int) -> Any:
        """A row of a file of vectors or tokens, for all images.

        Raises:
            InputError: it is no such file, has no such row, or does not fit the prior.
        """
        given = read_given((path, str(row)), self._prior().prior.config)
        assert given is not None
        return given.take([0] * num_images)

    def _prior(self) -> ImageGenerationPipeline:
        if self.generation is None:
            raise InputError("the run must have a prior for this, and has none")
        return self.generation

    # From pictures to codes and back

    def prepared(self, picture: Picture) -> Image.Image:
        """A picture as the networks see it."""
        return to_pil(to_uint8(self.pipeline.preprocess(picture, self.side))[0])

    def encode(self, picture: Picture) -> Indices:
        """Codes of a picture."""
        return [group.cpu() for group in self.pipeline.encode(picture, self.side)]

    def decode(self, indices: Sequence[Tensor], num_layers: int | None = None) -> Image.Image:
        """The picture of codes."""
        return to_pil(self._decode(indices, num_layers)[0])

    def layer_by_layer(self, picture: Picture, indices: Sequence[Tensor]) -> list[Captioned]:
        """A picture, then what its codes draw from the first layer, the first two, and so on."""
        original = self.prepared(picture)
        shown = [(original, "as the networks see it")]
        for number in range(1, len(self.layers) + 1):
            drawn = self.decode(indices, number)
            error = np.asarray(drawn).astype(float) / 255 - np.asarray(original) / 255
            layers = "layer 1" if number == 1 else f"layers 1–{number}"
            shown.append((drawn, f"{layers}, RMSE {np.sqrt((error**2).mean()):.3f}"))
        return shown

    def _decode(
        self, indices: Sequence[Tensor], num_layers: int | None = None
    ) -> UInt8[Tensor, "batch channels side side"]:
        return to_uint8(self.pipeline.decode(indices, num_layers)).cpu()

    # Single codes

    def describe_layer(self, number: int) -> str:
        """Which layer, and how many codes of how many kinds it has."""
        layer = self.layers[number]
        size = f"{layer.height}×{layer.width}"
        return f"layer {number + 1}: {size} codes of {layer.num_codes} kinds"

    def code_at(self, indices: Sequence[Tensor], place: Place) -> int:
        """The code that stands there."""
        layer = self.layers[place.layer]
        return int(indices[layer.group][0, layer.depth, place.row, place.column])

    def replaced(self, indices: Sequence[Tensor], place: Place, code: int | None) -> Indices:
        """Codes with another one in one place.

        Raises:
            InputError: the layer has no such code.
        """
        layer = self.layers[place.layer]
        if code is None or not 0 <= code < layer.num_codes:
            raise InputError(f"code must be from 0 to {layer.num_codes - 1}, got {code}")
        return self._with_each(indices, place, [code])

    def nearest_codes(self, indices: Sequence[Tensor], place: Place) -> list[int]:
        """Codes of a layer by the distance of their vectors from the one that stands there, first.

        At most `MOST_CODES`.
        """
        vectors, code = self._vectors[place.layer], self.code_at(indices, place)
        distances = (vectors - vectors[code]).square().sum(1)
        distances[code] = -1
        nearest: list[int] = distances.argsort(stable=True)[:MOST_CODES].tolist()
        return nearest

    def tiles(
        self, indices: Sequence[Tensor], place: Place, codes: Sequence[int]
    ) -> list[Image.Image]:
        """What each of these codes would draw there: the code's square, and one more around."""
        drawn = self._decode(self._with_each(indices, place, codes))
        layer = self.layers[place.layer]
        spans = []
        for position, number in ((place.row, layer.height), (place.column, layer.width)):
            cell = self.side // number
            length = min(3 * cell, self.side)
            start = min(max((position - 1) * cell, 0), self.side - length)
            spans.append(slice(start, start + length))
        return [enlarged(to_pil(image[:, *spans]), TILE_SIDE) for image in drawn]

    def codebook(self, number: int, first: int = 0) -> list[Captioned]:
        """Codes of a layer from `first` on, at most `MOST_CODES`, with what they draw.

        Each stands in the middle of a picture that is plain gray elsewhere.
        """
        layer = self.layers[number]
        codes = range(first, min(first + MOST_CODES, layer.num_codes))
        place = Place(number, layer.height // 2, layer.width // 2)
        gray = np.full((self.side, self.side), 128, np.uint8)
        tiles = self.tiles(self.encode(gray), place, codes)
        return [(tile, str(code)) for tile, code in zip(tiles, codes, strict=True)]

    def _with_each(
        self, indices: Sequence[Tensor], place: Place, codes: Sequence[int]
    ) -> list[Tensor]:
        layer = self.layers[place.layer]
        changed = [group.repeat(len(codes), 1, 1, 1) for group in indices]
        changed[layer.group][:, layer.depth, place.row, place.column] = torch.tensor([*codes])
        return changed

    # Maps of codes

    def map_picture(
        self, indices: Sequence[Tensor], number: int, marked: Place | None = None
    ) -> Image.Image:
        """The codes of a layer as colored squares with their numbers, one of them framed.

        Codes with similar vectors have similar colors.
        """
        layer = self.layers[number]
        codes = indices[layer.group][0, layer.depth].numpy()
        colors = Image.fromarray(self._colors[number][codes])
        picture = enlarged(colors, MAP_SIDE)
        cell = picture.width // layer.width
        pen = ImageDraw.Draw(picture)
        font = ImageFont.load_default(min(cell * 0.4, 28))
        for row, column in np.ndindex(codes.shape) if cell >= SMALLEST_NUMBERED_CELL else ():
            middle = ((column + 0.5) * cell, (row + 0.5) * cell)
            pen.text(middle, str(codes[row, column]), (0, 0, 0), font, anchor="mm")
        if marked is not None and marked.layer == number:
            self.frame(picture, marked)
        return picture

    def frame(self, picture: Image.Image, place: Place) -> None:
        """Draws a frame around the square of pixels of a code."""
        layer = self.layers[place.layer]
        height, width = picture.height // layer.height, picture.width // layer.width
        left, top = place.column * width, place.row * height
        box = [left, top, left + width - 1, top + height - 1]
        pen, thickness = ImageDraw.Draw(picture), max(2, picture.width // 128)
        gray = picture.mode in {"L", "LA"}
        pen.rectangle(box, outline=255 if gray else (255, 255, 255), width=2 * thickness)
        pen.rectangle(box, outline=0 if gray else (220, 0, 60), width=thickness)

    def place_at(self, number: int, picture_x: int, picture_y: int) -> Place:
        """The place under a pixel of `map_picture`."""
        layer = self.layers[number]
        cell = enlargement(layer.width, MAP_SIDE)
        row, column = int(picture_y // cell), int(picture_x // cell)
        return Place(number, min(row, layer.height - 1), min(column, layer.width - 1))
