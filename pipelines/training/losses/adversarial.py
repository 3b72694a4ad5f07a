"""The adversarial part of stage one: what discriminator and tokenizer tell each other."""

import logging
from collections.abc import Callable

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import relu

from pipelines.config import TokenizerRunConfig, TrainingConfig
from pipelines.recipe import AdversarialConfig
from pipelines.run.log import Metrics
from pipelines.training.losses.augmentation import augment
from pipelines.training.losses.base import Loss
from pipelines.training.losses.discriminator import PatchDiscriminator
from pipelines.training.optimizer import Network
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

Images = Float[Tensor, "batch channels height width"]
WARMUP_STEPS = 100
"""Over which the discriminator's learning rate rises."""
MAX_WON = 3
"""Validations in a row at which a discriminator that is never wrong is reported."""


class Adversary:
    """Hinge losses with a patch discriminator, in units of L / (D/2) as all of stage one.

        discriminator    mean max(0, 1 - d(x)) + mean max(0, 1 + d(x̂)) + LeCam
        tokenizer        L / (D/2) - β mean d(x̂)
        β                weight, or weight · ‖∇R‖ / ‖∇ mean d(x̂)‖ at the decoder's last layer

    R is the likelihood's term over D/2 (VQGAN, arXiv 2012.09841). The adversarial term has no sign,
    so it stands beside the logarithm of the energy, not in it.

    Args:
        config: weights, network, start.
        training: of the run.
        channels: of the images.
        image_size: their side in pixels.
        last_layer: gives the weight of the decoder's last layer, which learns; None where it has
            none.
        device: of the run.
        mean: over all processes.

    Raises:
        InputError: nothing of the decoder learns, or the images are too small.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        training: TrainingConfig,
        channels: int,
        image_size: int,
        last_layer: Callable[[], nn.Parameter | None],
        device: torch.device,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        weight = last_layer()
        if weight is None or not weight.requires_grad:
            raise InputError(
                "recipe.adversarial.weight must be 0 where no last layer of the decoder learns"
            )
        self.config = config
        self.discriminator = PatchDiscriminator(config, channels, image_size)
        self._training = training
        self._last_layer = last_layer
        self._mean = mean
        self._generator = torch.Generator(device)
        self._num_drawn = 0
        self._reconstructions: Tensor | None = None
        self._logits: list[Tensor] = []

    @classmethod
    def of_run(
        cls, config: TokenizerRunConfig, model: Tokenizer, accelerator: Accelerator
    ) -> "Adversary | None":
        """That of the run's recipe; None where its weight is 0."""
        if not config.recipe.adversarial.weight:
            return None
        return cls(
            config.recipe.adversarial,
            config.training,
            config.data.channels,
            config.data.image_size,
            # Sharded networks have other parameters between the forward and the backward.
            lambda: model.last_decoder_weight,
            accelerator.device,
            mean_over(accelerator),
        )

    def network(self) -> Network:
        """The discriminator, and how it is trained."""
        return Network(
            self.discriminator,
            self._learning_rate,
            betas=(0.5, 0.99),
            max_gradient_norm=self._training.max_gradient_norm,
            added={"num_won": torch.zeros((), dtype=torch.int64)},
        )

    def _learning_rate(self, step: int) -> float:
        progress = (step - self.config.start_step + 1) / WARMUP_STEPS
        return self.config.learning_rate * min(max(progress, 0.0), 1.0)

    def tokenizer_loss(
        self, loss: Loss, images: Images, reconstructions: Images, judge: nn.Module, step: int
    ) -> Loss:
        """`loss` with the adversarial term; keeps the reconstructions for the discriminator."""
        self._reconstructions = reconstructions.detach()
        zero = torch.zeros((), device=images.device)
        terms = {**loss.terms, "adversarial": zero, "adversarial_weight": zero}
        if step < self.config.counts_from:
            return Loss(loss.minimized, terms)
        fooled = -judge(self._augmented(reconstructions)).mean()
        weight = torch.full((), self.config.weight, device=images.device)
        if self.config.weighting == "adaptive":
            likelihood = loss.terms.get("reconstruction")
            scaled = loss.minimized
            if likelihood is not None:
                scaled = likelihood * (2 / images[0].numel())
            weight = weight * self._ratio(scaled, fooled)
        terms |= {"adversarial": fooled, "adversarial_weight": weight}
        return Loss(loss.minimized + weight * fooled, {"loss": loss.minimized, **terms})

    def _ratio(self, one: Tensor, other: Tensor) -> Tensor:
        """‖∇one‖ / ‖∇other‖ at the last layer, in float32, the same on all processes."""
        last = self._last_layer()
        assert last is not None
        norms = [
            torch.autograd.grad(own, last, retain_graph=True)[0].float().norm()
            for own in (one, other)
        ]
        ratio = norms[0] / norms[1].clamp_min(1e-8)
        return self._mean(ratio.clamp_max(self.config.max_weight))

    def discriminator_loss(self, judge: nn.Module, images: Images, step: int) -> Loss:
        """Hinge loss on the images and the reconstructions that the tokenizer's loss has seen."""
        assert self._reconstructions is not None, "the tokenizer comes first"
        zero = torch.zeros((), device=images.device)
        if step < self.config.start_step:  # each parameter gets its zero gradient
            idle = judge(images[:1]).sum() * 0
            return Loss(idle, {"loss": idle, "lecam": zero, "right_real": zero, "right_fake": zero})
        both = self._augmented(torch.cat([images, self._reconstructions]))
        real, fake = judge(both).chunk(2)
        self._logits.append(torch.stack([real.detach().mean(), fake.detach().mean()]))
        own = self.discriminator
        lecam = (real - own.fake_mean).square().mean() + (fake - own.real_mean).square().mean()
        hinge = relu(1 - real).mean() + relu(1 + fake).mean()
        terms = {
            "loss": hinge,
            "lecam": lecam,
            "right_real": (real > 0).float().mean(),
            "right_fake": (fake < 0).float().mean(),
        }
        return Loss(hinge + self.config.lecam_weight * lecam, terms)

    def _augmented(self, images: Images) -> Tensor:
        # A generator of its own: the noise of the quantizers is the same with it and without.
        self._generator.manual_seed((torch.initial_seed() + self._num_drawn) % 2**63)
        self._num_drawn += 1
        return augment(images, self.config.augmentations, self._generator)

    def after_step(self) -> None:
        """Moves the averages of LeCam by those of all micro-batches and processes."""
        self._num_drawn = 0  # what a step draws depends on that step alone
        if not self._logits:
            return
        means = self._mean(torch.stack(self._logits).mean(0))
        self._logits.clear()
        own = self.discriminator
        for average, mean in zip((own.real_mean, own.fake_mean), means, strict=True):
            average.lerp_(mean, 1 - self.config.lecam_decay)

    def check(self, images: Images, reconstructions: Images) -> Metrics:
        """Shares of patches that the discriminator judges rightly; warns when it has won."""
        real, fake = self.discriminator(torch.cat([images, reconstructions])).chunk(2)
        shares = {
            "discriminator_right_real": (real > 0).double().mean().item(),
            "discriminator_right_fake": (fake < 0).double().mean().item(),
        }
        num_won = self.discriminator.num_won
        num_won.add_(1) if min(shares.values()) == 1 else num_won.zero_()
        if num_won.item() == MAX_WON:
            logger.warning(
                "the discriminator was right on every patch at %d validations in a row: it no "
                "longer helps; lower recipe.adversarial.learning-rate or its width",
                MAX_WON,
            )
        return shares


def mean_over(accelerator: Accelerator) -> Callable[[Tensor], Tensor]:
    """The mean over all processes, of a tensor without gradient."""
    if accelerator.num_processes == 1:
        return lambda tensor: tensor

    def mean(tensor: Tensor) -> Tensor:
        reduced: Tensor = accelerator.reduce(tensor, "mean")
        return reduced

    return mean
