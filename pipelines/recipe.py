"""How a tokenizer is trained: temperature, weights, and losses beyond squared error."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic import model_validator as validates

from tokenizer.fields import (
    Factor,
    MapSide,
    Mean,
    PositiveFactor,
    ProperShare,
    Share,
    Temperature,
    Width,
)
from tokenizer.storage.configs import StrictConfig

Augmentation = Literal["color", "translation", "cutout"]


TORCHVISION_NETWORKS = (
    *("squeezenet1_0", "squeezenet1_1", "vgg16"),
    *("lpips-squeezenet1_1", "lpips-vgg16", "lpips-alexnet"),
)
"""Networks of the perceptual distance whose inputs are known; any other is timm's."""


class PerceptualConfig(StrictConfig):
    """Distance between the features of images and reconstructions in a frozen network."""

    weight: Factor = 0.0
    """Weight v against the squared error: the energy is SSE + v·D·distance; 0 = off."""
    network: Annotated[str, Field(pattern=r"^[\w.-]{1,100}$")] = "squeezenet1_0"
    """`squeezenet1_0`, `squeezenet1_1` or `vgg16` of torchvision, `lpips-squeezenet1_1`,
    `lpips-vgg16` or `lpips-alexnet` with the published heads, or a model of timm."""
    weights: Literal["pretrained"] | Path | None = None
    """Of the network: a .safetensors file, or the library's own download."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0, le=1000)], ...], Field(max_length=16)] = ()
    """Which maps are compared: numbers in torchvision's `features`, or timm's `out_indices`. Empty:
    those of LPIPS, or all of timm's."""
    layer_weights: Annotated[tuple[Factor, ...], Field(max_length=16)] = ()
    """Share of each map in the distance, made to sum to 1; empty: equal ones."""
    image_size: MapSide | None = None
    """Side to which images and reconstructions are resized before (bilinear); None: as they are."""
    max_shift: Annotated[int, Field(ge=0, le=64)] = 8
    """Both are cropped by so many pixels, each step at another place: the network's strides would
    leave a grid in the gradient, always at the same place."""
    pad_type: Literal["", "same"] = ""
    """timm only: padding of the convolutions; "same" for weights converted from TensorFlow."""
    mean: tuple[Mean, Mean, Mean] | None = None
    """timm only: channel means of the inputs on [0, 1]; None takes those of timm's entry."""
    std: tuple[PositiveFactor, PositiveFactor, PositiveFactor] | None = None
    """timm only: channel deviations on [0, 1]; None takes those of timm's entry."""

    @validates(mode="after")
    def _check(self) -> "PerceptualConfig":
        if self.weight and self.weights is None:
            raise ValueError(
                "weights must be a .safetensors file, or 'pretrained', where weight is not 0, "
                "got None"
            )
        if self.layer_weights and sum(self.layer_weights) <= 0:
            raise ValueError(f"layer_weights must not all be 0, got {self.layer_weights}")
        if self.layers and self.layer_weights and len(self.layers) != len(self.layer_weights):
            raise ValueError(
                f"layer_weights must be as many as layers, {len(self.layers)}, "
                f"got {len(self.layer_weights)}"
            )
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend, each named once, got {self.layers}")
        if self.network in TORCHVISION_NETWORKS:
            for name in ("pad_type", "mean", "std"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} applies to models of timm alone, got {getattr(self, name)!r}"
                    )
        if self.network.startswith("lpips-") and (self.layers or self.layer_weights):
            raise ValueError("layers and layer_weights must be empty with LPIPS, which has its own")
        return self


class AdversarialConfig(StrictConfig):
    """A patch discriminator that learns to tell images from reconstructions."""

    weight: Factor = 0.0
    """Weight of the tokenizer's term against the likelihood; 0 = off."""
    weighting: Literal["adaptive", "fixed"] = "adaptive"
    """Whether `weight` multiplies the ratio of the two gradients' norms at the decoder's last layer
    (VQGAN, arXiv 2012.09841), or the term itself."""
    max_weight: PositiveFactor = 100.0
    """Adaptive weights are at most as large, before `weight` multiplies them."""
    start_step: Annotated[int, Field(ge=0, le=10**9)] = 0
    """Step from which on the discriminator learns."""
    lead_steps: Annotated[int, Field(ge=0, le=10**9)] = 500
    """Steps that it learns before the tokenizer follows it."""
    width: Width = 64
    """Channels of the first convolution; they double at each following one, up to 8 times."""
    num_downsamplings: Annotated[int, Field(ge=1, le=8)] = 3
    """Convolutions of stride 2; more of them judge larger patches."""
    learning_rate: PositiveFactor = 2e-4
    """AdamW's; it rises over the first 100 steps of the discriminator."""
    augmentations: Annotated[tuple[Augmentation, ...], Field(max_length=3)] = (
        "color",
        "translation",
        "cutout",
    )
    """Of what the discriminator sees (DiffAugment, arXiv 2006.10738)."""
    lecam_weight: Factor = 0.01
    """Pull of its outputs towards their averages (LeCam, arXiv 2104.03310); 0 = off."""
    lecam_decay: ProperShare = 0.99
    """Decay of those averages."""

    @property
    def counts_from(self) -> int:
        """Step from which on the tokenizer follows the discriminator."""
        return self.start_step + self.lead_steps


class CodePriorRecipe(StrictConfig):
    """How the prior inside a tokenizer is trained, and what it does to the codes."""

    rate_weight: Factor = 0.3
    """Weight μ of the code length under the prior, which makes codes predictable. At the weight of
    the latent terms, code length and entropy are one divergence, as in the bound; at 0 the prior
    only learns. Without a posterior it counts nothing."""
    ramp: Share = 0.3
    """Share of the steps over which μ rises linearly."""
    calibration_steps: Annotated[int, Field(ge=0, le=10**6)] = 200
    """Steps of the heads alone, on the hard codes of the finished tokenizer."""

    def rate_weight_at(self, step: int, total_steps: int) -> float:
        """μ of a step, which counts from 0."""
        return self.rate_weight * min(1.0, (step + 1) / max(self.ramp * total_steps, 1))


class TokenizerRecipe(StrictConfig):
    """How a tokenizer is trained: what its network and its codes do not depend on."""

    initial_temperature: Temperature = 1.0
    """Gumbel-softmax temperature at step 0."""
    final_temperature: Temperature = 0.4
    """Gumbel-softmax temperature at the last step, reached exponentially."""
    temperature_hold: ProperShare = 0.7
    """Share of the steps before the temperature starts to fall."""
    likelihood: Literal["closed_form", "unit_variance"] | None = None
    """Variance of the decoder: the best for the batch, or 1. None: closed_form with a posterior."""
    latent_weight: Factor | None = None
    """Weight of the quantizer's terms against the reconstruction; at 1 the loss is the bound.
    None: 0.3 with a posterior, 0.25 (the usual weight of a commitment) without."""
    codebook_rate: PositiveFactor = 10.0
    """Learning rate of learned code vectors, in units of the networks'."""
    variance_rate: Factor = 10.0
    """Learning rate of log s², in units of the networks'; 0 keeps the initial variances."""
    perceptual: PerceptualConfig = PerceptualConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    code_prior: CodePriorRecipe = CodePriorRecipe()
    min_codebook_usage: Share = 0.25
    """Warn when a layer uses a smaller share of its codes on the validation images."""
    min_perplexity: Share = 0.05
    """Warn when a layer's perplexity is a smaller share of its number of codes."""
    variance_band: tuple[PositiveFactor, PositiveFactor] = (1e-3, 1e2)
    """Warn when s² over the variance of a layer's code vectors leaves this band."""

    @validates(mode="after")
    def _check(self) -> "TokenizerRecipe":
        if self.variance_band[0] >= self.variance_band[1]:
            raise ValueError(f"variance_band must go from low to high, got {self.variance_band}")
        return self

    def rate_factors(
        self, roles: Mapping[str, Literal["codebook", "variance"]]
    ) -> dict[str, float]:
        """By name, learning rates in units of the networks', given `Tokenizer.learned_roles`."""
        rates = {"codebook": self.codebook_rate, "variance": self.variance_rate}
        return {name: rates[role] for name, role in roles.items()}

    def temperature(self, step: int, total_steps: int) -> float:
        """Gumbel-softmax temperature τ of a step, which counts from 0.

        A high one gives gradients of low variance; only the end has to resemble hard codes.
        """
        hold = self.temperature_hold
        progress = step / max(total_steps - 1, 1)
        fallen = min(max((progress - hold) / (1 - hold), 0.0), 1.0)
        ratio = self.final_temperature / self.initial_temperature
        return float(self.initial_temperature * ratio**fallen)
