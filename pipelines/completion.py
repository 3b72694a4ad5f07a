"""Completions of pictures: redrawn in part, continued, varied."""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from jaxtyping import Bool, UInt8
from torch import Tensor
from tqdm import tqdm

from pipelines.drawing import ConditionInputs, Labels, PriorPipeline
from pipelines.images import Output, OutputImages, check_output, to_float, to_output, to_uint8
from pipelines.known import (
    fill_from_nearest,
    first_layers,
    known_codes,
    seed_of,
    seed_of_window,
    windows,
)
from pipelines.preprocessing import (
    Mask,
    Picture,
    PreparedPicture,
    prepare_mask,
    prepare_picture,
)
from pipelines.sampling_config import SamplingConfig
from prior.sampling import NUM_CANDIDATES
from tokenizer.code_maps import given_images
from tokenizer.fields import check_whole
from tokenizer.storage.errors import InputError

ImageBytes = UInt8[Tensor, "batch channels height width"]


class SamplingOptions(TypedDict, total=False):
    """How the codes of completions are drawn; see `ImageGenerationPipeline.__call__`."""

    temperature: float | Sequence[float] | None
    top_k: int | Sequence[int | None] | None
    top_p: float | Sequence[float | None] | None
    guidance_scale: float | None
    condition: ConditionInputs | None
    generator: torch.Generator | None
    num_candidates: int
    batch_size: int
    progress: bool


class CompletionPipeline(PriorPipeline):
    """Draws what is left open of a picture: a base of `ImageGenerationPipeline`.

    A completion (`inpaint`, `outpaint`, `variations`) is a sample of the prior given the codes that
    are known, decoded. That is exact where these come first in the prior's order, as whole coarser
    maps do in coarse_to_fine; elsewhere drawn candidates are weighed by how likely they make the
    known codes behind them, which tends to the same distribution with `num_candidates`. Classes and
    conditions are those that are given: without any, that of no class. It is no sample given the
    known *pixels*: codes under the edge of a mask are all drawn anew, and where known pixels are
    pasted back, the tokenizer's own idea of them is covered.
    """

    def inpaint(
        self,
        image: Picture,
        mask: Mask,
        num_images: int = 1,
        labels: Labels = None,
        seed: int = 0,
        *,
        output: Output = "pil",
        **options: Unpack[SamplingOptions],
    ) -> OutputImages:
        """Draws a part of a picture anew; outside the mask the pixels are exactly those of before.

        The picture is prepared first, as `preprocess` does, and the mask with it. What lies under
        the mask has no part in the result: codes are kept where no pixel under them is masked, of a
        picture in which masked pixels are copies of the nearest known ones.

        Args:
            image: one picture.
            mask: of the picture's size, white (or 1) is drawn anew: a PIL image, a path, an array
                or tensor (height, width) of bytes, from 128 up, or of nothing but zeros and ones.
            num_images: how many completions.
            labels: a class for all, or one for each; None: that of no class.
            seed: of all random numbers.
            output: as in `__call__`.
            options: as in `__call__`.

        Raises:
            InputError: the mask is of another size, or an argument is out of range.
        """
        check_output(output)
        picture, inputs = self._prepare(image, num_images, labels, options)
        is_tensor = isinstance(image, Tensor)
        is_masked = prepare_mask(mask, picture.size, self._conversion(), is_tensor)
        seed = seed_of(seed, options.get("generator"))
        images = self._redraw(picture.image[None], is_masked, num_images, inputs, seed, options)
        return to_output(images, output)

    def outpaint(
        self,
        image: Picture,
        *,
        left: int = 0,
        top: int = 0,
        right: int = 0,
        bottom: int = 0,
        num_images: int = 1,
        labels: Labels = None,
        seed: int = 0,
        output: Output = "pil",
        **options: Unpack[SamplingOptions],
    ) -> OutputImages:
        """Draws what lies around a picture, which stays exactly as it is.

        The picture is prepared first, as `preprocess` does; what is added comes in windows of its
        size, from the inside out, each half over what is there already and completed as `inpaint`
        does. So a window sees no more than its own size, and all of them together are no sample of
        one distribution. Parts of images that were always framed alike, faces say, make no sense
        beyond their frame.

        Args:
            image: one picture.
            left: pixels to add there.
            top: pixels to add there.
            right: pixels to add there.
            bottom: pixels to add there.
            num_images: how many completions.
            labels: a class for all, or one for each; None: that of no class.
            seed: of all random numbers.
            output: as in `__call__`.
            options: as in `__call__`.

        Raises:
            InputError: nothing is to be added, or an argument is out of range.
        """
        check_output(output)
        for name, value in (("left", left), ("top", top), ("right", right), ("bottom", bottom)):
            check_whole(name, value)
        if left + top + right + bottom == 0:
            raise InputError("left, top, right or bottom must be >= 1, got none")
        picture, inputs = self._prepare(image, num_images, labels, options)
        seed = seed_of(seed, options.get("generator"))
        channels, height, width = picture.image.shape
        size = (top + height + bottom, left + width + right)
        canvas = torch.zeros(num_images, channels, *size, dtype=torch.uint8)
        is_unknown = torch.ones(size, dtype=torch.bool)
        canvas[:, :, top : top + height, left : left + width] = picture.image
        is_unknown[top : top + height, left : left + width] = False
        places = windows(size, (top, left), (height, width))
        is_silent = not options.get("progress", True)
        for number, place in enumerate(tqdm(places, unit="window", disable=is_silent)):
            if is_unknown[place].any():
                window = canvas[:, :, *place]
                seed_here = seed_of_window(seed, number)
                quiet = SamplingOptions(**{**options, "progress": False})
                canvas[:, :, *place] = self._redraw(
                    window, is_unknown[place], num_images, inputs, seed_here, quiet
                )
                is_unknown[place] = False
        return to_output(canvas, output)

    def variations(
        self,
        image: Picture,
        keep_layers: int,
        num_images: int = 4,
        labels: Labels = None,
        seed: int = 0,
        *,
        output: Output = "pil",
        **options: Unpack[SamplingOptions],
    ) -> OutputImages:
        """Keeps the codes of a picture's first layers, and draws those of the others.

        Args:
            image: one picture.
            keep_layers: how many, counted from the coarsest, as `num_layers` of `decode`.
            num_images: how many variations.
            labels: a class for all, or one for each; None: that of no class.
            seed: of all random numbers.
            output: as in `__call__`.
            options: as in `__call__`.

        Raises:
            InputError: no or all layers would be kept, or an argument is out of range.
        """
        check_output(output)
        picture, inputs = self._prepare(image, num_images, labels, options)
        indices = self.tokenizer.encode(to_float(picture.image[None]))
        known = [
            group.expand(num_images, -1, -1, -1) for group in first_layers(indices, keep_layers)
        ]
        seed = seed_of(seed, options.get("generator"))
        return to_output(self._sample(num_images, inputs, seed, known, options), output)

    def _prepare(
        self, image: Picture, num_images: int, labels: Labels, options: SamplingOptions
    ) -> tuple[PreparedPicture, ConditionInputs | None]:
        """The picture as bytes of the prior's size, and what the conditioner takes."""
        check_whole("num_images", num_images, 1)
        unknown = sorted(options.keys() - SamplingOptions.__annotations__.keys())
        if unknown:
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
        condition = options.get("condition")
        inputs = None
        if labels is not None or condition is not None:
            inputs = self._inputs(labels, condition, range(num_images))
        if isinstance(image, Tensor):
            images = self.preprocess(image)
            given_images(images, self.tokenizer.config, self._weight)
            if len(images) > 1:
                raise InputError(f"image must be one picture, got {len(images)}")
            picture = PreparedPicture(to_uint8(images)[0].cpu(), (image.shape[-1], image.shape[-2]))
        else:
            picture = prepare_picture(image, self._conversion())
        code_maps = self.tokenizer.code_maps(*picture.image.shape[1:])
        if code_maps != self.prior.config.code_maps:
            side = self.image_size
            raise InputError(
                f"image must be {side} by {side} for this prior where it is a tensor, got "
                f"{picture.size[0]} by {picture.size[1]}"
            )
        return picture, inputs

    def _redraw(
        self,
        images: UInt8[Tensor, "given channels height width"],
        is_masked: Bool[Tensor, "height width"],
        num_images: int,
        inputs: ConditionInputs | None,
        seed: int,
        options: SamplingOptions,
    ) -> ImageBytes:
        """Images, or copies of a single one, with their masked part drawn given what is around."""
        filled = fill_from_nearest(images, is_masked)
        # One by one: the last bits of a sum depend on the batch, and with them a code.
        codes = [self.tokenizer.encode(to_float(image[None])) for image in filled]
        indices = [torch.cat(group) for group in zip(*codes, strict=True)]
        known = [group.expand(num_images, -1, -1, -1) for group in known_codes(indices, is_masked)]
        drawn = self._sample(num_images, inputs, seed, known, options)
        return torch.where(is_masked, drawn, images)

    def _sample(
        self,
        num_images: int,
        inputs: ConditionInputs | None,
        seed: int,
        known: Sequence[Tensor] | None,
        options: SamplingOptions,
    ) -> ImageBytes:
        """Images as bytes, with a bar."""
        names = ("temperature", "top_k", "top_p", "guidance_scale")
        given = {name: value for name, value in options.items() if name in names}
        drawn = self._draw(
            range(num_images),
            inputs,
            seed,
            SamplingConfig.checked(**given),
            options.get("batch_size", 64),
            known,
            options.get("num_candidates", NUM_CANDIDATES),
        )
        batches = []
        with tqdm(
            total=num_images, unit="image", disable=None if options.get("progress", True) else True
        ) as bar:
            for batch in drawn:
                batches.append(batch)
                bar.update(len(batch))
        return torch.cat(batches)
