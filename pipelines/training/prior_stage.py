"""Stage two for the training loop: cached codes, the prior's likelihood, samples."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from pipelines.config import PriorRunConfig
from pipelines.data.codes import CodeDataset
from pipelines.data.conditions import ConditionedSplits, Conditions
from pipelines.data.dataset import ImageDataset, chosen_items, image_shape
from pipelines.images import image_grid, to_uint8
from pipelines.presets import smaller_preset
from pipelines.processes import (
    batch_size_without_gradient,
    own_share,
    seed_everything,
    sum_over_processes,
)
from pipelines.run.log import Metrics
from pipelines.training.initial_weights import load_initial_weights
from pipelines.training.losses.base import Loss
from pipelines.training.optimizer import Network
from pipelines.training.stage import Stage
from prior import (
    Conditioner,
    EmbeddingConditioner,
    Prior,
    PriorConfig,
    Tokens,
    sample,
    sample_generators,
)
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

NUM_PREVIEWED = 32


class LoadedCodes(NamedTuple):
    """Codes of one micro-batch, as they lie on the disk."""

    indices: list[Tensor]
    inputs: Tensor | Tokens | None
    """Of the conditioner."""
    latents: list[Tensor]
    """Empty unless posteriors are the targets."""


class CodeBatch(NamedTuple):
    """Codes of one micro-batch."""

    indices: list[Tensor]
    inputs: Tensor | Tokens | None
    soft_targets: list[list[Tensor]] | None


def make_prior(
    config: PriorRunConfig,
    tokenizer: Tokenizer,
    images: ImageDataset,
    conditioner: Conditioner | None = None,
    conditions: ConditionedSplits | None = None,
) -> Prior:
    """The prior of a run with fresh weights, for the codes of these images.

    A `conditioner` gets the labels of the data set, whatever they are, instead of the classes.
    `conditions` are those of other kinds.

    Raises:
        InputError: it cannot be trained with this tokenizer and these images.
    """
    if config.targets == "posterior" and not tokenizer.has_posterior:
        raise InputError("targets must be 'indices' with a deterministic tokenizer")
    if config.targets == "posterior" and config.codes.search.is_on:
        raise InputError(
            "codes.search.candidates must be 1 for targets 'posterior', which are the encoder's, "
            f"got {config.codes.search.candidates}"
        )
    has_classes = config.condition_kind == "class"
    assert (conditions is None) == (config.condition_kind in ("class", "none"))
    if has_classes and not images.class_names:
        raise InputError(
            "is_class_conditional must be False: the images are not in class folders; give "
            "--no-is-class-conditional"
        )
    if config.condition_kind != "none" and conditioner is not None:
        raise InputError(
            "is_class_conditional must be False beside a conditioner, and condition.kind None"
        )
    has_null = config.condition_kind != "none" and config.prior.label_dropout > 0
    if conditioner is not None:
        has_null = conditioner.has_null
    if config.guidance_scale != 1 and not has_null:
        raise InputError(
            "guidance_scale must be 1 without classes or conditions and prior.label_dropout, "
            f"got {config.guidance_scale}"
        )
    seed_everything(config.training.seed)
    prior = Prior(
        PriorConfig(
            network=config.prior,
            code_maps=tokenizer.code_maps(*image_shape(images)[1:]),
            num_classes=len(images.class_names) if has_classes else 0,
            class_names=tuple(images.class_names) if has_classes else (),
            condition=conditions and conditions.config,
            has_custom_conditioner=conditioner is not None,
            tokenizer_hash=tokenizer.identity_hash(),
        ),
        conditioner,
    )
    prior.load_code_vectors(tokenizer.code_vectors())
    if conditions is not None and isinstance(prior.conditioner, EmbeddingConditioner):
        prior.conditioner.standardize_by(conditions.train.sample())
    load_initial_weights(prior, config)
    return prior


class PriorStage(Stage[LoadedCodes, CodeBatch]):
    """Trains a prior on codes.

    Args:
        config: of the run.
        model: from `make_prior`.
        tokenizer: gives the posteriors, and decodes what the prior samples.
        codes: of the training images.
        validation_codes: of the validation images, not mirrored.
        sources: hashes of what the codes are made of.
        accelerator: the processes of the run.
        conditions: of the images, where they are not the labels.
    """

    main_network = "prior"

    def __init__(
        self,
        config: PriorRunConfig,
        model: Prior,
        tokenizer: Tokenizer,
        codes: CodeDataset,
        validation_codes: CodeDataset,
        sources: Mapping[str, str],
        accelerator: Accelerator,
        conditions: ConditionedSplits | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.has_labels = bool(model.config.num_classes) or model.config.has_custom_conditioner
        self.conditions = conditions
        self.networks = {"prior": Network.from_config(model, config.training)}
        self.tokenizer = tokenizer
        self.codes = codes
        self.validation_codes = validation_codes
        self.sources = sources
        self.device = accelerator.device
        self.batch_size = batch_size_without_gradient(config.training, accelerator)
        self.num_codes = sum(
            code_map.depth * code_map.height * code_map.width for code_map in model.config.code_maps
        )
        self.num_items = codes.num_images
        self.is_scattered = codes.is_scattered
        coarsest = tokenizer.config.groups[0].downsampling
        image_size = model.config.code_maps[0].height * coarsest
        self.smaller_preset = smaller_preset(image_size, config.prior)
        self.description = (
            f"{codes.num_images:,} images of {self.num_codes:,} codes, "
            f"{validation_codes.num_images:,} for validation"
        )

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> LoadedCodes:
        """Codes, conditions and, if posteriors are asked for, the latents."""
        entries = items + self.num_items * is_flipped if self.config.horizontal_flip else items
        conditions = self.conditions and self.conditions.train
        inputs = self._inputs(self.codes, conditions, items)
        # Latents were kept if they are needed.
        return LoadedCodes(self.codes.indices_at(entries), inputs, self.codes.latents_at(entries))

    def _inputs(
        self, codes: CodeDataset, conditions: Conditions | None, items: np.ndarray
    ) -> Tensor | Tokens | None:
        """What the conditioner takes of some images."""
        if conditions is not None:
            return conditions.at(items)
        return codes.labels_at(items) if self.has_labels else None

    def _validation_inputs(self, items: np.ndarray) -> Tensor | Tokens | None:
        conditions = self.conditions and self.conditions.validation
        return self._inputs(self.validation_codes, conditions, items)

    def prepare(self, batch: LoadedCodes) -> CodeBatch:
        """Codes, conditions and, if asked for, the tokenizer's posteriors."""
        soft_targets = None
        if self.config.targets == "posterior":
            log_posteriors = self.tokenizer.log_posteriors(batch.latents, batch.indices)
            soft_targets = [[layer.exp() for layer in group] for group in log_posteriors]
        return CodeBatch(batch.indices, batch.inputs, soft_targets)

    def loss(
        self, name: str, modules: Mapping[str, nn.Module], batch: CodeBatch, step: int
    ) -> Loss:
        """Nats per code are minimized, nats per image logged."""
        output = modules[name](*batch)
        terms = {"loss": output.loss, "nats_per_layer": output.nats_per_layer}
        return Loss(output.loss / self.num_codes, terms)

    def validate(self, model: nn.Module, accelerator: Accelerator) -> Metrics:
        """Exact likelihood of the validation set's hard codes."""
        assert isinstance(model, Prior)
        chosen = chosen_items(
            len(self.validation_codes.labels), self.config.training.num_validation_images
        )
        own_entries = chosen[own_share(accelerator, len(chosen))]
        nats = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(own_entries), self.batch_size):
            entries = own_entries[start : start + self.batch_size]
            indices = [
                code_map.to(self.device) for code_map in self.validation_codes.indices_at(entries)
            ]
            inputs = self._validation_inputs(entries)
            inputs = inputs if inputs is None else inputs.to(self.device)
            nats -= model.log_prob(indices, inputs).double().sum().cpu()
        mean = sum_over_processes(accelerator, nats).item() / len(chosen)
        return {"nats_per_image": mean, "bits_per_image": mean / math.log(2)}

    def preview(self, model: nn.Module) -> Image.Image:
        """Samples, the same seeds at each step; a column per class if there are classes."""
        assert isinstance(model, Prior)
        num_classes = model.config.num_classes
        if num_classes:
            inputs: Tensor | Tokens | None = torch.arange(NUM_PREVIEWED) % num_classes
        else:  # the first validation images' in turn: a small set has few
            inputs = self._validation_inputs(
                np.arange(NUM_PREVIEWED) % self.validation_codes.num_images
            )
        indices = sample(
            model,
            inputs,
            sample_generators(0, range(NUM_PREVIEWED)),
            temperature=self.config.sampling_temperature,
            guidance_scale=self.config.guidance_scale,
        )
        columns = num_classes if 0 < num_classes <= 16 else 8
        return image_grid(to_uint8(self.tokenizer.decode(indices)).cpu(), columns)
