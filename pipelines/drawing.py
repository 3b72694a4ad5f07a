"""Images from a prior: the base of `ImageGenerationPipeline`, which says what for."""

import contextlib
import functools
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.class_labels import class_numbers, listed
from pipelines.coding.autoregressive import AutoregressivePrior
from pipelines.coding.codec import Codec
from pipelines.condition_inputs import ConditionReader
from pipelines.hub import find_folder
from pipelines.images import to_uint8
from pipelines.marginals import Marginals
from pipelines.model_folders import check_device, load_tokenizer, model_folder, tokenizer_folder
from pipelines.prefetch import one_ahead
from pipelines.sampling_config import SamplingConfig
from pipelines.text_encoders import TextEncoder
from pipelines.tokenizer_pipeline import TokenizerPipeline
from pipelines.tuned_sampling import TunedSampling, filled
from prior import Conditioner, Prior, Sampler, Tokens, sample_generators
from prior.config import EmbeddingConditionConfig
from prior.sampling import NUM_CANDIDATES
from tokenizer import Tokenizer
from tokenizer.fields import check_whole
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened
from tokenizer.storage.pretrained import PretrainedModule

ConditionInputs = Tensor | Tokens | np.ndarray | Mapping[str, Any] | Sequence[Any] | str
"""A row per image of what the prior's conditioner takes, or what `ConditionReader` makes one of."""
Labels = int | str | Sequence[int | str] | Tensor | None
PipelineT = TypeVar("PipelineT", bound="PriorPipeline")
DEFAULT_SAMPLING = SamplingConfig()


class PriorPipeline(TokenizerPipeline):
    """A tokenizer, and a prior that draws its code indices.

    Raises:
        InputError: the prior was not trained over the codes of this tokenizer.
    """

    _models: ClassVar[tuple[str, ...]] = ("tokenizer", "prior")
    _measured: ClassVar[tuple[str, ...]] = ("reconstruction", "generation")
    tuned: TunedSampling | None = None
    """How codes are drawn where nothing is said of it; None: as the prior has learned them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prior: Prior,
        text_encoder: TextEncoder | str | Path | None = None,
    ) -> None:
        super().__init__(tokenizer)
        identity, *others = tokenizer.identities()
        if prior.config.tokenizer_hash not in (identity, *others):
            raise InputError(
                "prior does not belong to tokenizer: it was trained over the codes of one with "
                f"hash {prior.config.tokenizer_hash[:12]}, not {identity[:12]}"
            )
        self.prior = prior.eval()
        self._conditions = ConditionReader(prior.config, text_encoder)
        self._join()

    def _join(self) -> None:
        """Writes the tokenizer's hash of today, not that of an earlier version or type.

        It would be lost when both are saved again.
        """
        update = {"tokenizer_hash": self.tokenizer.identity_hash()}
        self.prior.config = self.prior.config.model_copy(update=update)

    @classmethod
    def from_pretrained(
        cls: type[PipelineT],
        folder: str | Path,
        conditioner: Conditioner | None = None,
        dtype: torch.dtype | None = None,
        text_encoder: TextEncoder | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        revision: str | None = None,
        quantizer: BuildQuantizer | None = None,
    ) -> PipelineT:
        """Loads a run, what `save_pretrained` wrote, or a model of the Hugging Face hub.

        Args:
            folder: one, or a name such as "user/model", which is the hub's if there is no such
                folder here. Of the hub's files, safetensors and JSON alone are taken.
            conditioner: for a prior that was built with one of the user's: one of the same
                structure, whose weights are filled.
            dtype: of the weights, float32, float16 or bfloat16; None takes them as they were saved.
                Codes are chosen in float32 or above in any case.
            text_encoder: for a prior that was trained on texts: the folder to which their encoder
                was moved, or an encoder of the user's; None: where it lay. Loaded when needed.
            device: None is the CPU.
            revision: of the hub's model: a branch, tag or commit.
            quantizer: for a tokenizer that was built with one of the user's: what builds it.

        Raises:
            InputError: there is no checkpoint, or one that does not fit, or no such device.
        """
        check_device(device)
        source = find_folder(folder, cls._models, revision)
        tokenizer = load_tokenizer(source, dtype, quantizer)
        prior_folder = model_folder(source / "prior")
        prior = Prior.from_pretrained(prior_folder, dtype, conditioner=conditioner)
        pipeline = cls(tokenizer, prior, text_encoder)
        pipeline.tuned = TunedSampling.load(prior_folder, prior)
        pipeline.marginals = Marginals.load(tokenizer_folder(source), tokenizer)
        return pipeline._placed(source, device)

    def to(self: PipelineT, *targets: str | torch.device | torch.dtype) -> PipelineT:
        """Moves both models to a device, casts their weights to a type, or both.

        Raises:
            InputError: no such device, or another type than float32, float16 or bfloat16.
        """
        super().to(*targets)
        if any(isinstance(target, torch.dtype) for target in targets):
            self._join()
        return self

    @property
    def image_size(self) -> int:
        """Side of the images."""
        downsampling = self.tokenizer.config.groups[0].downsampling
        return self.prior.config.code_maps[0].height * downsampling

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
        inputs = self._inputs(labels, condition, image_indices)
        return self._draw(image_indices, inputs, seed, sampling, batch_size, known, num_candidates)

    def _inputs(self, labels: Any, condition: Any, image_indices: Sequence[int]) -> Any:
        """What the conditioner takes for these images."""
        if condition is None:
            numbers = class_numbers(labels, image_indices, self.prior.config)
            return None if numbers is None else torch.tensor(numbers, dtype=torch.int64)
        if labels is not None:
            raise InputError("labels must be None beside condition, got both")
        if self.prior.config.num_classes and not isinstance(condition, Tensor):
            raise InputError(
                "condition must be None for a prior of classes, which takes labels, got "
                f"{shortened(repr(condition))}"
            )
        inputs = self._conditions.read(condition, len(image_indices))
        try:
            self.prior.conditioner.check(inputs, len(image_indices))
        except InputError as error:  # a class conditioner speaks of labels
            raise InputError(re.sub("^labels", "condition", str(error))) from error
        return inputs

    def _draw(
        self,
        image_indices: Sequence[int],
        inputs: Any,
        seed: int,
        sampling: SamplingConfig | Sampler,
        batch_size: int,
        known: Sequence[Tensor] | None,
        num_candidates: int,
    ) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        for name, value, least in (
            ("seed", seed, 0),
            ("batch_size", batch_size, 1),
            ("num_candidates", num_candidates, 1),
        ):
            check_whole(name, value, least)
        if isinstance(sampling, Sampler):
            sampler = sampling
        else:
            sampler = self.sampler(sampling, inputs is not None)
        if known is not None:
            if sampler.weighs(known, len(image_indices)):
                batch_size = max(1, batch_size // num_candidates)
            known = [group.to(self.device) for group in known]
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

    def sampler(self, sampling: SamplingConfig, is_conditional: bool = True) -> Sampler:
        """Builds a sampler; do not modify or move the prior while using it.

        Args:
            sampling: what is not given is as tuned.
            is_conditional: whether the images have labels or another condition.

        Raises:
            InputError: a setting does not fit the prior.
        """
        return Sampler(self.prior, **filled(sampling, self.tuned, is_conditional).model_dump())

    def codec(self) -> Codec:
        """As of a tokenizer alone, and with the model "prior"."""
        return Codec(self.tokenizer, self.marginals, lambda: AutoregressivePrior(self.prior))

    def save_pretrained(self, folder: str | Path) -> None:
        """As for any pipeline; what was tuned for the prior lies beside its weights."""
        super().save_pretrained(folder)
        if self.tuned is not None:
            update = {"prior_hash": self.prior.content_hash()}
            self.tuned.model_copy(update=update).save(Path(folder) / "prior")

    def _parts(self) -> Mapping[str, PretrainedModule[Any]]:
        return {"tokenizer": self.tokenizer, "prior": self.prior}

    def _sizes(self) -> dict[str, str]:
        config = self.prior.config
        classes = f"{config.num_classes}" if config.num_classes else "none"
        names = f": {listed(config.class_names)}" if config.class_names else ""
        sizes = {**super()._sizes(), "classes": classes + names}
        condition = config.condition
        if isinstance(condition, EmbeddingConditionConfig):
            tokens = f"up to {condition.num_tokens} tokens" if condition.num_tokens else "a vector"
            source = " of a text" if condition.text_encoder else ""
            sizes["condition"] = f"{tokens} of {condition.dim} channels{source}"
        elif condition is not None:
            sizes["condition"] = "; ".join(
                f"{attribute.name}: {', '.join(attribute.values)}"
                for attribute in condition.attributes
            )
        return sizes
