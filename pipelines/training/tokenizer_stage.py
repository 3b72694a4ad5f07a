"""Stage one for the training loop: images, the tokenizer's objective, hard-code validation."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from PIL import Image
from torch import Tensor, nn

from pipelines.config import TokenizerRunConfig
from pipelines.data.dataset import (
    ImageDataset,
    chosen_items,
    describe_images,
    image_hashes,
    image_shape,
)
from pipelines.data.encoded_images import EncodedImages
from pipelines.data.sources import load_splits
from pipelines.evaluation.metrics import reconstruction_metrics
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.evaluation.similarity import SSIM_WINDOW
from pipelines.images import comparison, to_float, to_uint8
from pipelines.presets import smaller_preset
from pipelines.processes import batch_size_without_gradient, seed_everything
from pipelines.run.log import Metrics
from pipelines.training.calibration import calibrate_code_prior
from pipelines.training.initial_weights import load_initial_weights
from pipelines.training.layer_health import LayerHealth, relative_variances
from pipelines.training.losses import Bound, Loss, TokenizerLoss
from pipelines.training.losses.adversarial import Adversary, mean_over
from pipelines.training.losses.code_terms import with_code_terms
from pipelines.training.losses.perceptual import PerceptualDistance
from pipelines.training.optimizer import Network
from pipelines.training.stage import Stage
from tokenizer import Tokenizer, TokenizerConfig
from tokenizer.backbone import TimmBottomUpPath, load_backbone
from tokenizer.config import PreprocessingConfig
from tokenizer.quantizers import BuildQuantizer
from tokenizer.storage.errors import InputError
from tokenizer.storage.untrusted import load_safetensors

logger = logging.getLogger(__name__)

NUM_PREVIEWED = 16
NUM_JUDGED = 64
"""Validation images that the discriminator judges."""
NUM_START_IMAGES = 512
"""Images whose encoder outputs start the codebooks."""


class LoadedImages(NamedTuple):
    """Images of one micro-batch, as they lie on the disk."""

    images: Tensor
    """uint8 (B, C, H, W)."""
    is_flipped: Tensor
    """(B,): which to mirror."""


class TokenizerStage(Stage[LoadedImages, Tensor]):
    """What the loop has to know to train a tokenizer.

    Args:
        config: The run.
        accelerator: Its processes.
        images: For training and validation; None opens those that `config.data` names.
        quantizer: Builds quantizers from outside the package, see `Tokenizer`.
        loss: Takes the place of the recipe's.

    Raises:
        InputError: the data or the backbone's weights do not fit the config.
    """

    main_network = "tokenizer"

    def __init__(
        self,
        config: TokenizerRunConfig,
        accelerator: Accelerator,
        images: tuple[ImageDataset, ImageDataset] | None = None,
        *,
        quantizer: BuildQuantizer | None = None,
        loss: TokenizerLoss | None = None,
    ) -> None:
        if config.tokenizer.channels != config.data.channels:
            raise InputError(
                f"data.channels must equal tokenizer.channels {config.tokenizer.channels}, "
                f"got {config.data.channels}"
            )
        if config.data.image_size < SSIM_WINDOW:
            raise InputError(
                f"data.image_size must be >= {SSIM_WINDOW} for the SSIM of validation, "
                f"got {config.data.image_size}"
            )
        seed_everything(config.training.seed)
        self.config = config
        self.is_initialized = False
        self.perceptual = PerceptualDistance.of_run(config, accelerator.device)
        self.model = self.build(config, quantizer)
        self.objective = loss or Bound(config.recipe, self.model.has_posterior, self.perceptual)
        try:
            self.model.code_maps(config.data.image_size, config.data.image_size)
        except InputError as error:
            raise InputError(f"data.image_size: {error}") from error
        rate_factors = config.recipe.rate_factors(self.model.learned_roles())
        names = {name for name, _ in self.model.named_parameters()}
        apart = {name for name in names if name.startswith("code_prior.")}
        network = Network.from_config(self.model, config.training, rate_factors, apart)
        self.networks = {"tokenizer": network}
        self.adversary = Adversary.of_run(config, self.model, accelerator)
        if self.adversary is not None:
            self.networks["discriminator"] = self.adversary.network()
        self.train_images, self.validation_images = images or load_splits(config.data, accelerator)
        expected = (config.data.channels, config.data.image_size, config.data.image_size)
        for dataset in (self.train_images, self.validation_images):
            if image_shape(dataset) != expected:
                raise InputError(
                    f"data.channels and data.image_size must be those of {dataset.description}: "
                    f"{image_shape(dataset)}, got {expected}"
                )
        self.num_items = len(self.train_images)
        networks = config.tokenizer.networks
        self.smaller_preset = smaller_preset(config.data.image_size, networks)
        self.is_scattered = isinstance(self.train_images, EncodedImages)
        self.encoded = self.train_images if self.is_scattered else None
        self.description = describe_images(self.train_images, self.validation_images)
        self.sources = image_hashes(self.train_images, self.validation_images)
        self.device = accelerator.device
        num_parts = config.training.gradient_accumulation_steps
        is_closed_form = isinstance(self.objective, Bound) and self.objective.is_closed_form
        self.sees_whole_batch = is_closed_form and num_parts > 1
        self.shares_energy = is_closed_form and num_parts * accelerator.num_processes > 1
        self._mean = mean_over(accelerator)
        self._batch_energy: Tensor | None = None
        self.health = LayerHealth(config.recipe)
        self.batch_size = batch_size_without_gradient(config.training, accelerator)

    def build(self, config: TokenizerRunConfig, quantizer: BuildQuantizer | None) -> Tokenizer:
        """What to train; sets `is_initialized` where no start from the data is to follow."""
        model = Tokenizer(self.saved_config(config.tokenizer), quantizer)
        if config.backbone_weights is not None:
            _load_backbone_weights(model, config.backbone_weights)
        self.is_initialized = load_initial_weights(model, config)
        return model

    def saved_config(self, config: TokenizerConfig) -> TokenizerConfig:
        """A tokenizer's config with what its users have to know of its training."""
        data = self.config.data
        size, white_value = data.image_size, data.white_value
        networks = config.loss_networks
        if self.perceptual is not None:
            networks = tuple(dict.fromkeys((*networks, self.perceptual.identity)))
        update = {
            "preprocessing": PreprocessingConfig(image_size=size, white_value=white_value),
            "loss_networks": networks,
        }
        return config.model_copy(update=update)

    def initialize(self) -> None:
        """Starts codebooks and variances from the data: the same images on all processes."""
        if self.is_initialized:
            return
        logger.info("starting the codebooks from %d images", min(self.num_items, NUM_START_IMAGES))
        generator = torch.Generator().manual_seed(self.config.training.seed)
        items = torch.randperm(self.num_items, generator=generator)[:NUM_START_IMAGES]
        images = to_float(self.train_images.images_at(items.numpy()))
        self.model.initialize_from_data(images, generator)

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> LoadedImages:
        """Images as bytes."""
        return self.loaded(self.train_images.images_at(items), is_flipped)

    def loaded(self, images: Tensor, is_flipped: np.ndarray) -> LoadedImages:
        """The same of images that are read already."""
        return LoadedImages(images, torch.from_numpy(is_flipped))

    def prepare(self, batch: LoadedImages) -> Tensor:
        """Images (B, C, H, W) on [-1, 1], some of them mirrored."""
        images = to_float(batch.images)
        if self.config.training.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not self.config.data.horizontal_flip:
            return images
        return torch.where(batch.is_flipped.view(-1, 1, 1, 1), images.flip(-1), images)

    def before_step(
        self, modules: Mapping[str, nn.Module], batches: Sequence[Tensor], step: int
    ) -> None:
        """A first pass without gradient: the bound takes the logarithm of the whole batch's SSE."""
        assert isinstance(self.objective, Bound)
        energies = []
        devices = [self.device] if self.device.type == "cuda" else []
        # The second pass has the same noise again.
        with torch.no_grad(), torch.random.fork_rng(devices):
            for batch in batches:
                output = modules["tokenizer"](batch, self.temperature(step))
                energies.append(self.objective.energy(batch, output).total)
        self._batch_energy = self._mean(torch.stack(energies).mean())

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Tensor, step: int) -> Loss:
        """The recipe's loss at the recipe's temperature."""
        if name == "discriminator":
            assert self.adversary is not None
            return self.adversary.discriminator_loss(modules[name], batch, step)
        temperature = self.temperature(step)
        output = modules[name](batch, temperature)
        if self.shares_energy:
            assert isinstance(self.objective, Bound)
            energy = self.objective.energy(batch, output)
            batch_energy = self._batch_energy
            if batch_energy is None:  # one micro-batch for each process
                batch_energy = self._mean(energy.total.detach())
            loss = self.objective(batch, output, batch_energy, energy)
        else:
            loss = self.objective(batch, output)
        if self.adversary is not None:
            judge = modules["discriminator"]
            images = output.reconstructions
            loss = self.adversary.tokenizer_loss(loss, batch, images, judge, step)
        recipe, total_steps = self.config.recipe, self.config.training.first_total_steps
        loss = with_code_terms(loss, output, recipe.code_prior, step, total_steps)
        if self.model.has_posterior:
            loss.terms["temperature"] = torch.full((), temperature, device=self.device)
            loss.terms["dequantization_variance"] = self.model.dequantization_variances()
        return loss

    def temperature(self, step: int) -> float:
        """Gumbel-softmax temperature of a step."""
        return self.config.recipe.temperature(step, self.config.training.first_total_steps)

    def after_step(self, accelerator: Accelerator) -> None:
        """Moves EMA codebooks, and the averages of the discriminator's outputs."""
        if self.adversary is not None:
            self.adversary.after_step()
        if accelerator.num_processes == 1:
            self.model.after_step()
        else:
            self.model.after_step(
                lambda tensor: accelerator.reduce(tensor, "sum"), lambda tensor: broadcast(tensor)
            )

    def finish(self, model: nn.Module) -> None:
        """Fits the prior inside to the hard codes of the model in use."""
        assert isinstance(model, Tokenizer)
        steps = self.config.recipe.code_prior.calibration_steps
        seed = self.config.training.seed
        calibrate_code_prior(model, self.train_images, steps, seed, self.device)

    def validate(self, model: nn.Module, accelerator: Accelerator) -> Metrics:
        """RMSE on [0, 1], PSNR, and per layer perplexity, usage, s² and warnings; hard codes."""
        assert isinstance(model, Tokenizer)
        dataset = self.validation_images
        items = chosen_items(len(dataset), self.config.training.num_validation_images)
        errors, usage = measure_reconstruction(model, dataset, items, accelerator, self.batch_size)
        ratios = relative_variances(model)
        judged: Metrics = {}
        if self.adversary is not None:  # the same images on all processes
            images = to_float(dataset.images_at(items[:NUM_JUDGED])).to(self.device)
            judged = self.adversary.check(images, model.reconstruct(images))
        return {
            **reconstruction_metrics(errors),
            "perplexity": usage.perplexity(),
            "codebook_usage": usage.usage(),
            "dequantization_variance": model.dequantization_variances().tolist(),
            "relative_variance": ratios,
            **judged,
            **({} if usage.own_prior_bits is None else {"code_bits": usage.own_prior_bits}),
            **self.health.check(model.codebook_sizes, usage.usage(), usage.perplexity(), ratios),
        }

    def preview(self, model: nn.Module) -> Image.Image:
        """Validation images beside their reconstructions."""
        assert isinstance(model, Tokenizer)
        return reconstruction_preview(model, self.validation_images, self.device)


def reconstruction_preview(
    model: Tokenizer, dataset: ImageDataset, device: torch.device
) -> Image.Image:
    """Images of the data set beside their reconstructions, spread over all of it."""
    items = np.linspace(0, len(dataset) - 1, min(NUM_PREVIEWED, len(dataset))).astype(np.int64)
    images = dataset.images_at(items)
    decoded = to_uint8(model.reconstruct(to_float(images).to(device))).cpu()
    return comparison(images, decoded)


def _load_backbone_weights(model: Tokenizer, source: Path | str) -> None:
    path = model.bottom_up
    if not isinstance(path, TimmBottomUpPath):
        raise InputError("backbone_weights must be None without tokenizer.backbone")
    if isinstance(source, Path):
        load_backbone(path, load_safetensors(source), str(source))
    else:
        path.load_pretrained()
