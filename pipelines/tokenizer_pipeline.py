"""`TokenizerPipeline`: pictures to code indices and back, for people who have no prior."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar, overload

import torch
from jaxtyping import Float
from torch import Tensor

from pipelines.coding.codec import Codec
from pipelines.coding.pictures import compressed, decompressed
from pipelines.hub import find_folder
from pipelines.images import Output, OutputImages, check_output, to_output, to_uint8
from pipelines.marginals import Marginals
from pipelines.model_card import describe_codes
from pipelines.model_folders import check_device, load_tokenizer, tokenizer_folder
from pipelines.preprocessing import Conversion, ImageSize, Picture, Pictures, preprocess
from pipelines.saved_pipeline import SavedPipeline
from tokenizer import Tokenizer
from tokenizer.code_maps import given_images
from tokenizer.fields import check_whole
from tokenizer.quantizers import BuildQuantizer
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule

PipelineT = TypeVar("PipelineT", bound="TokenizerPipeline")


class Features(NamedTuple):
    """What the codes of images say of them, for probes and for search."""

    pooled: Float[Tensor, "batch channels"]
    """Means of `maps` over all positions, one group after the other: what is there, not where."""
    maps: list[Float[Tensor, "batch _ _ _"]]
    """Of each group, coarse to fine, (B, code_dim, h, w): the sum of the chosen code vectors of its
    layers, which is all that the decoder sees of it."""


class TokenizerPipeline(SavedPipeline):
    """A trained tokenizer that takes and gives pictures.

    Wherever `Pictures` are asked for: a PIL image, the path of a file, a uint8 array of NumPy
    (height, width, channels), a tensor, or a list of these. What is done to each is what training
    does to a file (see `preprocess`); tensors are taken as they are.
    """

    _models: ClassVar[tuple[str, ...]] = ("tokenizer",)
    _measured: ClassVar[tuple[str, ...]] = ("reconstruction",)
    marginals: Marginals | None = None
    """How often codes come, where that was measured (`hqvae compress --model marginals`)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer.eval()

    @classmethod
    def from_pretrained(
        cls: type[PipelineT],
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        quantizer: BuildQuantizer | None = None,
    ) -> PipelineT:
        """Loads a run, a saved pipeline, a saved tokenizer, or a model of the Hugging Face hub.

        Args:
            folder: one, or a name such as "user/model", which is the hub's if there is no such
                folder here. Of the hub's files, safetensors and JSON alone are taken.
            device: None is the CPU.
            dtype: of the weights, float32, float16 or bfloat16; None takes them as they were saved.
                Codes are chosen in float32 or above in any case.
            revision: of the hub's model: a branch, tag or commit.
            quantizer: for a tokenizer that was built with one of the user's: what builds it.

        Raises:
            InputError: there is no checkpoint, or one that does not fit, or no such device.
        """
        check_device(device)
        source = find_folder(folder, cls._models, revision)
        tokenizer = load_tokenizer(source, dtype, quantizer)
        pipeline = cls(tokenizer)
        pipeline.marginals = Marginals.load(tokenizer_folder(source), tokenizer)
        return pipeline._placed(source, device)

    @property
    def image_size(self) -> int | None:
        """Side of the training images; None where an earlier version has not saved it."""
        preprocessing = self.tokenizer.config.preprocessing
        return None if preprocessing is None else preprocessing.image_size

    def _conversion(self, image_size: ImageSize = None) -> Conversion:
        config = self.tokenizer.config
        saved = config.preprocessing
        conversion = Conversion(
            channels=config.channels,  # type: ignore[arg-type]
            multiple=config.groups[0].downsampling,
            image_size=self.image_size,
            white_value=None if saved is None else saved.white_value,
        )
        return conversion.resized(image_size)

    @property
    def original_conversion(self) -> Conversion:
        """What becomes of a picture that is neither resized nor cropped."""
        return self._conversion("original")._replace(multiple=1)

    def preprocess(
        self, images: Pictures, image_size: ImageSize = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Images on [-1, 1] as the networks take them, by the training's own conversion.

        Of a picture: turned upright by its EXIF, 16 bits per channel reduced to 8, color profile
        converted to sRGB, alpha composited on white or kept, as the channels ask for; the shorter
        side resized (Pillow bicubic, antialiased), the center cropped. Pillow itself drops the
        lower half of colors of 16 bits, so give the path of such a file. A tensor is an image
        already: floats on [-1, 1] or bytes, (C, H, W) or (B, C, H, W), of any size that the
        networks allow.

        Args:
            images: pictures.
            image_size: side of the square that a picture becomes, a multiple of the coarsest
                downsampling; "original": no resizing, and the center cropped to the nearest such
                multiples below. None: that of the training images; where an earlier version has
                not saved it, "original".

        Raises:
            InputError: a picture cannot be read, sizes differ, or the networks do not take them.
        """
        prepared = preprocess(images, self._conversion(image_size))
        if isinstance(image_size, int) and set(prepared.shape[-2:]) != {image_size}:
            raise InputError(f"image_size must be None for a tensor of another, got {image_size}")
        return prepared

    def encode(
        self, images: Pictures, image_size: ImageSize = None, search: SearchConfig = NO_SEARCH
    ) -> list[Tensor]:
        """Code indices (B, depth, h, w) per group, coarse to fine; takes what `preprocess` does.

        `search` asks for codes that draw the images better than the nearest ones, in more time.
        """
        return self.tokenizer.encode(self.preprocess(images, image_size), search)

    @overload
    def decode(
        self, indices: Sequence[Tensor], num_layers: int | None = None, output: None = None
    ) -> Float[Tensor, "batch channels height width"]: ...

    @overload
    def decode(
        self, indices: Sequence[Tensor], num_layers: int | None = None, *, output: Output
    ) -> OutputImages: ...

    def decode(
        self,
        indices: Sequence[Tensor],
        num_layers: int | None = None,
        output: Output | None = None,
    ) -> OutputImages:
        """Images from code indices, from the first layers only if asked for.

        `output` None gives floats (B, C, H, W) on about [-1, 1], as the decoder does.

        Raises:
            InputError: the codes do not fit, or an argument is out of range.
        """
        if output is not None:
            check_output(output)
        images = self.tokenizer.decode(indices, num_layers)
        return images if output is None else to_output(to_uint8(images).cpu(), output)

    def reconstruct(
        self,
        images: Pictures,
        image_size: ImageSize = None,
        output: Output | None = None,
        num_layers: int | None = None,
        search: SearchConfig = NO_SEARCH,
    ) -> OutputImages:
        """Images after encoding and decoding; takes what `preprocess` and `encode` do.

        `output` None gives what was given: for a tensor of floats one on about [-1, 1], for
        anything else PIL images.
        """
        if output is None and not (isinstance(images, Tensor) and images.is_floating_point()):
            output = "pil"
        if output is not None:
            check_output(output)
        indices = self.encode(images, image_size, search)
        images = self.tokenizer.decode(indices, num_layers)
        return images if output is None else to_output(to_uint8(images).cpu(), output)

    def compress(
        self, image: Picture, quality: float | None = None, model: str | None = None
    ) -> bytes:
        """A picture as a file of a few bytes, at its own size; docs/files.md has the format.

        Args:
            image: one picture; neither resized nor cropped.
            quality: the higher, the fewer bits: μ of a search for codes that weighs bits against
                errors (see `SearchConfig`), slower; None or 0: the encoder's codes.
            model: where the probabilities of codes come from: "own" prior of the tokenizer;
                "marginals", counts of training images that were saved with it; "counts" of the
                codes so far; the "prior" of an `ImageGenerationPipeline`, for pictures of its size.
                None: the first of the former three that there is.

        Raises:
            InputError: the picture cannot be read or has too many pixels, or an argument is wrong.
        """
        prepared = preprocess(image, self.original_conversion)
        return compressed(self.codec(), prepared, quality, model)

    def codec(self) -> Codec:
        """What writes and reads files; making it takes a hash of all weights."""
        return Codec(self.tokenizer, self.marginals)

    def decompress(self, content: bytes, output: Output = "pil") -> OutputImages:
        """The picture of a file that `compress` made, which is the only one.

        Of all layers, or of those that are left of a file that was cut behind one.

        Raises:
            InputError: it is no such file, damaged, cut elsewhere, of another tokenizer or a later
                version.
        """
        check_output(output)
        images = decompressed(self.codec(), content)
        return to_output(to_uint8(images).cpu(), output)

    def features(self, images: Pictures, image_size: ImageSize = None) -> Features:
        """Code vectors of images, pooled and in place; takes what `preprocess` does."""
        return self.features_of_codes(self.encode(images, image_size))

    def features_of_codes(self, indices: Sequence[Tensor]) -> Features:
        """Code vectors of images by their codes, as `encode` gives them."""
        maps = [
            torch.stack([v.float()[i] for v, i in zip(vectors, group.unbind(1), strict=True)])
            .sum(0)
            .movedim(-1, 1)
            for vectors, group in zip(self.tokenizer.code_vectors(), indices, strict=True)
        ]
        return Features(torch.cat([code_map.mean((2, 3)) for code_map in maps], 1), maps)

    @torch.no_grad()
    def interpolate(
        self,
        first: Picture,
        second: Picture,
        num_images: int = 8,
        *,
        image_size: ImageSize = None,
        output: Output = "pil",
    ) -> OutputImages:
        """A path from one picture to another: both reconstructions, and others between them.

        What the encoder finds in both is mixed in equal steps, before the codes are chosen: each
        image between has codes of its own, by which it is decoded. None is a sample of a prior, and
        a mixture of two kinds of things need not look like any.

        Raises:
            InputError: a picture cannot be used, or an argument is out of range.
        """
        check_output(output)
        check_whole("num_images", num_images, 2)
        try:
            pair = self.preprocess([first, second], image_size)
        except InputError as error:  # which numbers them
            message = str(error).replace("images[0]", "first", 1).replace("images[1]", "second", 1)
            raise InputError(message) from error
        pair = given_images(pair, self.tokenizer.config, self._weight)
        shares = torch.linspace(0, 1, num_images, device=pair.device).view(-1, 1, 1, 1)
        features = [
            ((1 - shares) * level[:1] + shares * level[1:]).to(self.dtype)
            for level in self.tokenizer.bottom_up(pair.to(self.dtype))
        ]
        groups = self.tokenizer.top_down(features, "nearest").groups
        return self.decode([group.indices for group in groups], output=output)

    def save_pretrained(self, folder: str | Path) -> None:
        """As for any pipeline; counts of codes lie beside the tokenizer's weights."""
        super().save_pretrained(folder)
        if self.marginals is not None:
            update = {"tokenizer_hash": self.tokenizer.identity_hash()}
            self.marginals.model_copy(update=update).save(Path(folder) / "tokenizer")

    def _parts(self) -> Mapping[str, PretrainedModule[Any]]:
        return {"tokenizer": self.tokenizer}

    def _sizes(self) -> dict[str, str]:
        parameters = sum(p.numel() for model in self._parts().values() for p in model.parameters())
        size, channels = self.image_size, self.tokenizer.config.channels
        sizes = {
            "images": f"{channels} channels, {self._conversion().describe()}",
            "weights": f"{parameters:,} parameters, {self.dtype}",
        }
        if size is not None:
            sizes["codes"] = describe_codes(self.tokenizer.code_maps(size, size))
        return sizes
