"""Stage two for the training loop: cached codes, the prior's likelihood, samples."""

import math
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from pipelines.config import PriorRunConfig
from pipelines.data.codes import extract_codes
from pipelines.data.dataset import ImageDataset, chosen_items, image_hashes
from pipelines.images import image_grid, to_uint8
from pipelines.processes import (
    batch_size_without_gradient,
    own_share,
    seed_everything,
    sum_over_processes,
)
from pipelines.run.checkpoints import check_sources, newest_sources
from pipelines.run.log import Metrics
from pipelines.training.loop import Loss
from prior import Conditioner, Prior, PriorConfig, sample, sample_generators
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

NUM_PICTURED = 32


class LoadedCodes(NamedTuple):
    """Codes of one micro-batch, as they lie on the disk."""

    indices: list[Tensor]
    labels: Tensor | None
    latents: list[Tensor]
    """Empty unless posteriors are the targets."""


class CodeBatch(NamedTuple):
    """Codes of one micro-batch."""

    indices: list[Tensor]
    labels: Tensor | None
    soft_targets: list[list[Tensor]] | None


class PriorStage:
    """What the loop has to know to train a prior on the codes of some images.

    A `conditioner` gets the labels of the data set, whatever they are, instead of the classes.

    Raises:
        InputError: no trained tokenizer, or images without the classes that are asked for.
    """

    def __init__(
        self,
        config: PriorRunConfig,
        train_images: ImageDataset,
        validation_images: ImageDataset,
        accelerator: Accelerator,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.config = config
        self.is_conditional = config.is_class_conditional or conditioner is not None
        self.device = accelerator.device
        self.batch_size = batch_size_without_gradient(config.training, accelerator)
        self.tokenizer = Tokenizer.from_pretrained(config.tokenizer_dir / "model").to(self.device)
        uses_posterior = config.targets == "posterior"
        if uses_posterior and self.tokenizer.config.quantizer.kind == "nearest":
            raise InputError("targets must be 'indices' with a deterministic tokenizer")
        maps = self.tokenizer.code_maps(*train_images.images.shape[1:3])
        if config.is_class_conditional and not train_images.class_names:
            raise InputError(
                "is_class_conditional must be False: the images are not in class folders"
            )
        if config.is_class_conditional and conditioner is not None:
            raise InputError("is_class_conditional must be False beside a conditioner")
        has_null = config.is_class_conditional and config.prior.label_dropout > 0
        if conditioner is not None:
            has_null = conditioner.has_null
        if config.guidance_scale != 1 and not has_null:
            raise InputError(
                "guidance_scale must be 1 without classes and prior.label_dropout, "
                f"got {config.guidance_scale}"
            )
        self.sources = {
            "tokenizer weights": self.tokenizer.content_hash(),
            **image_hashes(train_images, validation_images),
        }
        # Now, not after the codes of all images have been extracted.
        check_sources(config.output_dir, newest_sources(config.output_dir), self.sources)
        seed_everything(config.training.seed)
        self.model = Prior(
            PriorConfig(
                network=config.prior,
                code_maps=maps,
                num_classes=len(train_images.class_names) if config.is_class_conditional else 0,
                has_custom_conditioner=conditioner is not None,
                tokenizer_hash=self.tokenizer.content_hash(),
            ),
            conditioner,
        )
        self.model.load_code_vectors(self.tokenizer.code_vectors())
        self.num_codes = sum(own.depth * own.height * own.width for own in maps)
        cache = config.output_dir / "codes"
        self.codes = extract_codes(
            self.tokenizer,
            train_images,
            cache,
            accelerator,
            flips=config.horizontal_flip,
            keeps_latents=uses_posterior,
            batch_size=self.batch_size,
        )
        self.validation_codes = extract_codes(
            self.tokenizer,
            validation_images,
            cache,
            accelerator,
            flips=False,
            keeps_latents=False,
            batch_size=self.batch_size,
        )
        self.num_items = len(train_images)

    def initialize(self) -> None:
        """Nothing: the prior starts from its random weights."""

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> LoadedCodes:
        """Codes, labels and, if posteriors are asked for, the latents."""
        entries = items + self.num_items * is_flipped if self.config.horizontal_flip else items
        labels = self.codes.labels_at(entries) if self.is_conditional else None
        # Latents were kept if they are needed.
        return LoadedCodes(self.codes.indices_at(entries), labels, self.codes.latents_at(entries))

    def prepare(self, batch: LoadedCodes) -> CodeBatch:
        """Codes, labels and, if asked for, the tokenizer's posteriors."""
        soft_targets = None
        if self.config.targets == "posterior":
            log_posteriors = self.tokenizer.log_posteriors(batch.latents, batch.indices)
            soft_targets = [[layer.exp() for layer in group] for group in log_posteriors]
        return CodeBatch(batch.indices, batch.labels, soft_targets)

    def loss(self, model: nn.Module, batch: CodeBatch, step: int) -> Loss:
        """Nats per code are minimized, nats per image logged."""
        output = model(*batch)
        terms = {"loss": output.loss, "nats_per_layer": output.nats_per_layer}
        return Loss(output.loss / self.num_codes, terms)

    def after_step(self, accelerator: Accelerator) -> None:
        """Nothing."""

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
            indices = [own.to(self.device) for own in self.validation_codes.indices_at(entries)]
            labels = None
            if self.is_conditional:
                labels = self.validation_codes.labels_at(entries).to(self.device)
            nats -= model.log_prob(indices, labels).double().sum().cpu()
        mean = sum_over_processes(accelerator, nats).item() / len(chosen)
        return {"nats_per_image": mean, "bits_per_image": mean / math.log(2)}

    def picture(self, model: nn.Module) -> Image.Image:
        """Samples, the same seeds at each step; a column per class if there are classes."""
        assert isinstance(model, Prior)
        num_classes = model.config.num_classes
        labels = None
        if num_classes:
            labels = torch.arange(NUM_PICTURED) % num_classes
        elif self.is_conditional:
            labels = self.validation_codes.labels_at(np.arange(NUM_PICTURED))
        indices = sample(
            model,
            labels,
            sample_generators(0, range(NUM_PICTURED)),
            temperature=self.config.sampling_temperature,
            guidance_scale=self.config.guidance_scale,
        )
        columns = num_classes if 0 < num_classes <= 16 else 8
        return image_grid(to_uint8(self.tokenizer.decode(indices)).cpu(), columns)
