"""What is compared: each cell is one training run.

Cells of a shape differ in the quantizer alone: networks, code maps, bits, optimizer, steps and the
order of the data are the same. A method's learning rate is the best of three on validation images,
chosen in one cell of its family and reused in the others.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from benchmarks.quality.peers import Peer
from benchmarks.quality.variants import Variant
from pipelines.config import TokenizerRecipe
from tokenizer.config import NearestQuantizerConfig, StochasticQuantizerConfig

RATES = (2e-3, 4e-3, 8e-3)
"""Peak learning rates to choose from."""


class Shape(NamedTuple):
    """Code maps, coarse to fine."""

    sides: tuple[int, ...]
    depths: tuple[int, ...]
    codebook_size: int

    @property
    def name(self) -> str:
        """As in 4x4+8x8-k256 or, with a depth, 8x8x4-k64."""
        maps = (
            f"{side}x{side}" + (f"x{depth}" if depth > 1 else "")
            for side, depth in zip(self.sides, self.depths, strict=True)
        )
        return f"{'+'.join(maps)}-k{self.codebook_size}"

    @property
    def family(self) -> str:
        """Which of the family it is; the rate is chosen once for each."""
        if len(self.sides) == 1:
            return "SQ-VAE" if self.depths[0] == 1 else "RSQ-VAE"
        return "SQ-VAE-2" if max(self.depths) == 1 else "HQ-VAE"

    @property
    def nominal_bits(self) -> float:
        """Per image."""
        codes = sum(depth * side**2 for side, depth in zip(self.sides, self.depths, strict=True))
        return codes * math.log2(self.codebook_size)


class Method(NamedTuple):
    """A quantizer under the same networks."""

    key: str
    """In names of folders."""
    titles: dict[str, str]
    """What it is called, by family; families that are missing have no such method."""
    quantizer: StochasticQuantizerConfig | NearestQuantizerConfig
    recipe: TokenizerRecipe = TokenizerRecipe()
    peer: Peer | None = None
    shares_codebook: bool = False


FAMILIES = ("SQ-VAE", "SQ-VAE-2", "RSQ-VAE", "HQ-VAE")
BASELINES = dict(zip(FAMILIES, ("VQ-VAE", "VQ-VAE-2", "RQ-VAE", "HQ-VAE baseline"), strict=True))
# A peer takes the place of the quantizer; what it adds to the loss is counted in full.
PEER = (NearestQuantizerConfig(), TokenizerRecipe(latent_weight=1.0))

STOCHASTIC = Method("stochastic", {name: name for name in FAMILIES}, StochasticQuantizerConfig())
FAIR = Method(
    "nearest",
    {ours: f"{theirs}, fair" for ours, theirs in BASELINES.items()},
    NearestQuantizerConfig(),
)
PLAIN = Method(
    "plain",
    {ours: f"{theirs}, plain" for ours, theirs in BASELINES.items() if ours in FAMILIES[:2]},
    NearestQuantizerConfig(starts_from_data=False, restart_threshold=0.0),
)
SHARED = Method(
    "shared",
    {"RSQ-VAE": "RQ-VAE, shared codebook"},
    NearestQuantizerConfig(),
    shares_codebook=True,
)
RESIDUAL_VQ = Method("residualvq", {"RSQ-VAE": "ResidualVQ"}, *PEER, "ResidualVQ")
FSQ = Method("fsq", {"SQ-VAE": "FSQ"}, *PEER, "FSQ")
SIM_VQ = Method("simvq", {"SQ-VAE": "SimVQ"}, *PEER, "SimVQ")
LFQ = Method("lfq", {"SQ-VAE": "LFQ"}, *PEER, "LFQ")
METHODS = (STOCHASTIC, FAIR, PLAIN, SHARED, RESIDUAL_VQ, FSQ, SIM_VQ, LFQ)


class Ablation(NamedTuple):
    """One thing changed in ours."""

    quantizer: Mapping[str, float] = MappingProxyType({})
    """Options of the quantizer with another value."""
    recipe: Mapping[str, float] = MappingProxyType({})
    """Options of the recipe with another value."""
    variant: Variant | None = None
    warms_up_latents: bool = False
    """The weight of the latent terms rises linearly over the first half of the training."""
    has_linear_temperature: bool = False
    """The temperature falls linearly from the first step."""


ABLATIONS = {
    "start-factor-1": Ablation({"variance_factor": 1.0}),
    "start-factor-2": Ablation({"variance_factor": 2.0}),
    "start-factor-10": Ablation({"variance_factor": 10.0}),
    "final-temperature-0.1": Ablation(recipe={"final_temperature": 0.1}),
    "final-temperature-0.25": Ablation(recipe={"final_temperature": 0.25}),
    "final-temperature-1": Ablation(recipe={"final_temperature": 1.0}),
    "temperature-hold-0": Ablation(recipe={"temperature_hold": 0.0}),
    "linear-temperature": Ablation(has_linear_temperature=True),
    "fixed-variance": Ablation(recipe={"variance_rate": 0.0}),
    "variance-rate-1": Ablation(recipe={"variance_rate": 1.0}),
    "codebook-rate-1": Ablation(recipe={"codebook_rate": 1.0}),
    "codebook-rate-3": Ablation(recipe={"codebook_rate": 3.0}),
    "latent-weight-1": Ablation(recipe={"latent_weight": 1.0}),
    "latent-weight-0.1": Ablation(recipe={"latent_weight": 0.1}),
    "latent-weight-warmed-up": Ablation(warms_up_latents=True),
    "per-layer-terms": Ablation(variant="per-layer-terms"),
    "expected-terms": Ablation(variant="expected-terms"),
    "hard-phase": Ablation(variant="hard-phase"),
    "no-noise": Ablation(variant="no-noise"),
}


Setting = Literal["cifar10", "published", "flowers"]
"""CIFAR-10; the same with code map, networks and budget of the published figures; 128×128."""


class Cell(NamedTuple):
    """One training run."""

    shape: Shape
    method: Method
    rate: float
    """Peak learning rate."""
    seed: int
    ablation: str = ""
    """Key of `ABLATIONS`, or nothing."""
    setting: Setting = "cifar10"

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        parts = [self.shape.name, self.method.key, f"rate{self.rate:g}", f"seed{self.seed}"]
        prefix = "" if self.setting == "cifar10" else f"{self.setting}-"
        return prefix + "_".join([*parts, *([self.ablation] if self.ablation else [])])

    @property
    def place(self) -> str:
        """Code maps, and the setting where it is not the usual one; rows are compared within."""
        return self.shape.name if self.setting == "cifar10" else f"{self.setting} {self.shape.name}"

    @property
    def rate_key(self) -> tuple[str, str]:
        """Family and method in which its rate is chosen.

        Variants of the deterministic baseline take the fair one's rate.
        """
        return self.shape.family, FAIR.key if self.method in (PLAIN, SHARED) else self.method.key

    @property
    def title(self) -> str:
        """What the method is called in this family."""
        return self.method.titles[self.shape.family]
