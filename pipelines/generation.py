"""`ImageGenerationPipeline`: a trained tokenizer and prior, for people who want images."""

import contextlib
import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from pydantic import Field, PositiveInt, ValidationError
from torch import Tensor
from tqdm import tqdm

from pipelines.class_labels import Labels, class_numbers
from pipelines.condition_inputs import ConditionReader
from pipelines.images import to_pil, to_uint8
from pipelines.prefetch import one_ahead
from pipelines.text_encoders import TextEncoder
from prior import Conditioner, Prior, Sampler, Tokens, sample_generators
from prior.config import MAX_GUIDANCE
from prior.sampling import NUM_CANDIDATES
from tokenizer import Tokenizer
from tokenizer.fields import Temperature, check_whole
from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.errors import InputError

ConditionInputs = Tensor | Tokens | np.ndarray | Mapping[str, Any] | Sequence[Any] | str
"""A row per image of what the prior's conditioner takes, or what `ConditionReader` makes one of."""
Probability = Annotated[float, Field(gt=0, le=1)]


class SamplingConfig(StrictConfig):
    """How codes are drawn from the prior; a number for all layers, or one per layer."""

    temperature: Temperature | tuple[Temperature, ...] = 1.0
    """Divides the logits; below 1 gives likelier codes."""
    top_k: PositiveInt | tuple[PositiveInt | None, ...] | None = None
    """Draw from so many of the likeliest codes only."""
    top_p: Probability | tuple[Probability | None, ...] | None = None
    """Draw from the smallest set of codes with this total probability only."""
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE)] = 1.0
    """Classifier-free guidance; 1 = off."""

    @classmethod
    def checked(cls, **values: Any) -> "SamplingConfig":
        """Builds one from numbers or any sequences of them.

        Raises:
            InputError: a value is out of range.
        """
        for name, value in values.items():
            if isinstance(value, Sequence) and not isinstance(value, str):
                values[name] = tuple(value)
        try:
            return cls(**values)
        except ValidationError as error:
            raise InputError(describe_validation_error(error)) from error


DEFAULT_SAMPLING = SamplingConfig()


class ImageGenerationPipeline:
    """Images from noise: the prior draws code indices, the tokenizer decodes them.

    Raises:
        InputError: the prior was not trained over the codes of this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior,
        text_encoder: TextEncoder | str | Path | None = None,
    ) -> None:
        content_hash = tokenizer.content_hash()
        if not tokenizer.has_hash(prior.config.tokenizer_hash):
            raise InputError(
                "prior does not belong to tokenizer: it was trained over the codes of one with "
                f"hash {prior.config.tokenizer_hash[:12]}, not {content_hash[:12]}"
            )
        # In place of an earlier version's hash, which would be lost when both are saved again.
        prior.config = prior.config.model_copy(update={"tokenizer_hash": content_hash})
        self.tokenizer = tokenizer.eval()
        self.prior = prior.eval()
        self._conditions = ConditionReader(prior.config, text_encoder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        conditioner: Conditioner | None = None,
        dtype: torch.dtype | None = None,
        text_encoder: TextEncoder | str | Path | None = None,
    ) -> "ImageGenerationPipeline":
        """Loads a run, or what `save_pretrained` wrote, onto the CPU.

        A prior that was built with a conditioner of the user's needs one of the same structure,
        whose weights are filled. `dtype` is that of the weights, float32, float16 or bfloat16;
        None takes them as they were saved. Codes are chosen in float32 or above in any case.

        A prior that was trained on texts loads its encoder from where it was then, at the first
        text; `text_encoder` is another folder of the same, or an encoder of the user's.

        Raises:
            InputError: there is no checkpoint, or one that does not fit.
        """
        folder = Path(folder)
        return cls(
            Tokenizer.from_pretrained(model_folder(folder / "tokenizer"), dtype),
            Prior.from_pretrained(model_folder(folder / "prior"), dtype, conditioner=conditioner),
            text_encoder,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes tokenizer/ and prior/ into one folder."""
        self.tokenizer.save_pretrained(Path(folder) / "tokenizer")
        self.prior.save_pretrained(Path(folder) / "prior")

    def to(self, device: str | torch.device) -> "ImageGenerationPipeline":
        """Moves both models."""
        self.tokenizer.to(device)
        self.prior.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.prior.parameters()).device

    def __call__(
        self,
        num_images: int,
        labels: Labels = None,
        seed: int = 0,
        *,
        temperature: float | Sequence[float] = 1.0,
        top_k: int | Sequence[int | None] | None = None,
        top_p: float | Sequence[float | None] | None = None,
        guidance_scale: float = 1.0,
        condition: ConditionInputs | None = None,
        known: Sequence[Tensor] | None = None,
        num_candidates: int = NUM_CANDIDATES,
        batch_size: int = 64,
        progress: bool = True,
        output: Literal["pil", "tensor"] = "pil",
    ) -> list[Image.Image] | UInt8[Tensor, "batch channels height width"]:
        """Generates images; image i depends on `seed`, i, its condition and known codes alone.

        Args:
            num_images: how many.
            labels: a class for all, or one for each image, by number or name; None takes the
                classes in turn.
            seed: of all random numbers.
            temperature: > 0; below 1 gives likelier codes. A number, or one per layer.
            top_k: draw from the k likeliest codes only. A number, or one per layer.
            top_p: draw from the smallest set of this probability only. A number, or one per layer.
            guidance_scale: classifier-free guidance; 1 = off.
            condition: instead of labels, for all images or for each: a text, a dictionary of
                attributes, a vector, tokens; whatever the prior's conditioner takes.
            known: indices to keep, per group (num_images, depth, h, w), -1 where to draw. The
                rest is drawn given all of them: exactly where they come first in the prior's order
                (a whole coarser map in coarse_to_fine), elsewhere (in the cell order) approximately
                by weighing candidates.
            num_candidates: of each image where known codes come after drawn ones: so many times the
                work. The more, the nearer to the true conditional distribution; with 1 known codes
                that come later are not seen.
            batch_size: images, or candidates for them, at a time; changes memory and speed alone.
            progress: show a bar.
            output: Pillow images, or one uint8 tensor.

        Raises:
            InputError: an argument is out of range.
        """
        if output not in ("pil", "tensor"):
            raise InputError(f"output must be 'pil' or 'tensor', got {output!r}")
        check_whole("num_images", num_images, 1)
        sampling = SamplingConfig.checked(
            temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale
        )
        batches = []
        with tqdm(total=num_images, unit="image", disable=not progress) as bar:
            for batch in self.draw(
                range(num_images),
                labels,
                seed,
                sampling,
                batch_size,
                known,
                condition,
                num_candidates,
            ):
                batches.append(batch)
                bar.update(len(batch))
        images = torch.cat(batches)
        return images if output == "tensor" else [to_pil(image) for image in images]

    def draw(
        self,
        image_indices: Sequence[int],
        labels: Labels = None,
        seed: int = 0,
        sampling: SamplingConfig | Sampler = DEFAULT_SAMPLING,
        batch_size: int = 64,
        known: Sequence[Tensor] | None = None,
        condition: ConditionInputs | None = None,
        num_candidates: int = NUM_CANDIDATES,
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        """Generates the images with these indices, batch by batch: a share of a larger series.

        `labels`, `condition` and `known` have an entry per image; otherwise as in `__call__`. Give
        a `sampler` to draw several times: it starts up once.

        Raises:
            InputError: an argument is out of range; at once, if it can be known before sampling.
        """
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("num_candidates", num_candidates, 1),
        ):
            check_whole(name, value, least)
        sampler = sampling if isinstance(sampling, Sampler) else self.sampler(sampling)
        if known is not None:
            if sampler.weighs(known, len(image_indices)):
                batch_size = max(1, batch_size // num_candidates)
            known = [group.to(self.device) for group in known]
        if condition is not None and labels is not None:
            raise InputError("labels must be None beside condition, got both")
        inputs = self._conditions.read(condition, len(image_indices))
        if condition is None:
            inputs = class_numbers(labels, image_indices, self.prior.config)
        sampler.check(inputs, len(image_indices))
        return self._batches(
            image_indices, inputs, seed, sampler, batch_size, known, num_candidates
        )

    @torch.inference_mode()
    def _batches(
        self,
        image_indices: Sequence[int],
        inputs: Any,
        seed: int,
        sampler: Sampler,
        batch_size: int,
        known: Sequence[Tensor] | None,
        num_candidates: int,
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        is_left = threading.Event()

        def go_on(_: int) -> None:
            if is_left.is_set():
                raise CancelledError

        def codes_of(rows: slice) -> list[Tensor]:
            # The current device, on which graphs are captured, is one of the thread.
            is_cuda = self.device.type == "cuda"
            with torch.cuda.device(self.device) if is_cuda else contextlib.nullcontext():
                return sampler(
                    None if inputs is None else inputs[rows],
                    sample_generators(seed, image_indices[rows]),
                    known=None if known is None else [group[rows] for group in known],
                    num_candidates=num_candidates,
                    progress=go_on,
                )

        starts = range(0, len(image_indices), batch_size)
        tasks = (functools.partial(codes_of, slice(i, i + batch_size)) for i in starts)
        drawn = (task() for task in tasks)
        if self.device.type == "cuda":  # only on a GPU
            # While codes are drawn, those before are decoded and their images written. On a CPU
            # the two would fight for the same cores.
            drawn = one_ahead(tasks, is_left.set)
        with contextlib.closing(drawn):
            for indices in drawn:
                # On a CPU one by one: the last bits of a sum depend on the batch, and with them a
                # byte.
                size = 1 if self.device.type == "cpu" else len(indices[0])
                parts = [torch.split(group, size) for group in indices]
                decoded = [self.tokenizer.decode(part) for part in zip(*parts, strict=True)]
                yield to_uint8(torch.cat(decoded)).cpu()

    def sampler(self, sampling: SamplingConfig) -> Sampler:
        """Builds a sampler; do not modify or move the prior while using it.

        Raises:
            InputError: a setting does not fit the prior.
        """
        return Sampler(self.prior, **sampling.model_dump())

    def encode(self, images: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        """Code indices (B, depth, h, w) per group of images on [-1, 1]."""
        return self.tokenizer.encode(images)

    def decode(
        self, indices: Sequence[Tensor], num_layers: int | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """Images from code indices, from the first layers only if asked for."""
        return self.tokenizer.decode(indices, num_layers)

    def reconstruct(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images on [-1, 1] after encoding and decoding."""
        return self.tokenizer.reconstruct(images)


def model_folder(folder: Path) -> Path:
    """The checkpoint of one stage: `folder` itself, or model/ of a run."""
    return folder / "model" if (folder / "model").is_dir() else folder
