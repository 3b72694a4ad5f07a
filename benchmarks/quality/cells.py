"""What is compared: each cell is one training run.

Cells of a shape differ in the quantizer alone: networks, code maps, bits, optimizer, steps and the
order of the data are the same. A method's learning rate is the best of three on validation images,
chosen in one cell of its family and reused in the others.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from benchmarks.quality.peers import Peer
from benchmarks.quality.variants import Variant
from pipelines.config import DataConfig, TokenizerRunConfig, TrainingConfig
from tokenizer.builders import hq_vae
from tokenizer.config import (
    NearestQuantizerConfig,
    NetworkConfig,
    StochasticQuantizerConfig,
)

RATES = (1e-3, 2e-3, 4e-3)
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
    peer: Peer | None = None
    shares_codebook: bool = False


FAMILIES = ("SQ-VAE", "SQ-VAE-2", "RSQ-VAE", "HQ-VAE")
BASELINES = dict(zip(FAMILIES, ("VQ-VAE", "VQ-VAE-2", "RQ-VAE", "HQ-VAE baseline"), strict=True))
PEER_CONFIG = NearestQuantizerConfig(commitment_weight=1.0)

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
RESIDUAL_VQ = Method("residualvq", {"RSQ-VAE": "ResidualVQ"}, PEER_CONFIG, "ResidualVQ")
FSQ = Method("fsq", {"SQ-VAE": "FSQ"}, PEER_CONFIG, "FSQ")
SIM_VQ = Method("simvq", {"SQ-VAE": "SimVQ"}, PEER_CONFIG, "SimVQ")
LFQ = Method("lfq", {"SQ-VAE": "LFQ"}, PEER_CONFIG, "LFQ")
METHODS = (STOCHASTIC, FAIR, PLAIN, SHARED, RESIDUAL_VQ, FSQ, SIM_VQ, LFQ)


class Ablation(NamedTuple):
    """One thing changed in ours."""

    quantizer: Mapping[str, float] = MappingProxyType({})
    """Options of the quantizer with another value."""
    variant: Variant | None = None
    warms_up_latents: bool = False
    """The weight of the latent terms rises linearly over the first half of the training."""
    has_linear_temperature: bool = False
    """The temperature falls linearly, where the default's falls exponentially."""


ABLATIONS = {
    "start-factor-1": Ablation({"variance_factor": 1.0}),
    "start-factor-2": Ablation({"variance_factor": 2.0}),
    "start-factor-10": Ablation({"variance_factor": 10.0}),
    "final-temperature-0.1": Ablation({"final_temperature": 0.1}),
    "final-temperature-0.25": Ablation({"final_temperature": 0.25}),
    "final-temperature-1": Ablation({"final_temperature": 1.0}),
    "linear-temperature": Ablation(has_linear_temperature=True),
    "fixed-variance": Ablation({"variance_rate": 0.0}),
    "variance-rate-1": Ablation({"variance_rate": 1.0}),
    "codebook-rate-1": Ablation({"codebook_rate": 1.0}),
    "codebook-rate-3": Ablation({"codebook_rate": 3.0}),
    "latent-weight-1": Ablation({"latent_weight": 1.0}),
    "latent-weight-0.1": Ablation({"latent_weight": 0.1}),
    "latent-weight-warmed-up": Ablation(warms_up_latents=True),
    "per-layer-terms": Ablation(variant="per-layer-terms"),
    "expected-terms": Ablation(variant="expected-terms"),
    "hard-phase": Ablation(variant="hard-phase"),
}


class Cell(NamedTuple):
    """One training run."""

    shape: Shape
    method: Method
    rate: float
    """Peak learning rate."""
    seed: int
    ablation: str = ""
    """Key of `ABLATIONS`, or nothing."""
    dataset: str = "cifar10"

    @property
    def name(self) -> str:
        """Also the name of its folder."""
        parts = [self.shape.name, self.method.key, f"rate{self.rate:g}", f"seed{self.seed}"]
        prefix = "" if self.dataset == "cifar10" else f"{self.dataset}-"
        return prefix + "_".join([*parts, *([self.ablation] if self.ablation else [])])

    @property
    def rate_key(self) -> tuple[str, str]:
        """Family and method whose rate it takes."""
        return rate_key(self.shape, self.method)

    @property
    def title(self) -> str:
        """What the method is called in this family."""
        return self.method.titles[self.shape.family]


class Budget(NamedTuple):
    """What a machine can run."""

    networks: NetworkConfig
    code_dim: int
    total_steps: int
    batch_size: int
    seeds: tuple[int, ...]
    comparisons: tuple[tuple[Shape, tuple[Method, ...]], ...]
    """Which methods run at which shape; the first shape of a family is where rates are chosen."""
    ablations: tuple[str, ...]
    """Keys of `ABLATIONS`, one seed each."""
    ablation_shapes: tuple[Shape, ...]
    prior_shapes: tuple[Shape, ...]
    """Where a small prior measures the code length of ours and of the fair baseline."""
    prior_steps: int
    num_distance_images: int
    """Test images for the distance of features."""
    num_workers: int
    """Cells at once; on a CPU each has one thread."""


TODAY = (FSQ, SIM_VQ, LFQ)
CPU = Budget(
    networks=NetworkConfig(patch_size=4, width=64, max_width=64),
    code_dim=32,
    total_steps=1_000,
    batch_size=64,
    seeds=(0,),
    comparisons=(
        (Shape((8,), (1,), 256), (STOCHASTIC, FAIR, PLAIN, *TODAY)),
        (Shape((8,), (1,), 64), (STOCHASTIC, FAIR, PLAIN)),
        (Shape((4, 8), (1, 1), 256), (STOCHASTIC, FAIR, PLAIN)),
        (Shape((8,), (4,), 64), (STOCHASTIC, FAIR, SHARED, RESIDUAL_VQ)),
        (Shape((8,), (2,), 64), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
        (Shape((8,), (8,), 16), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
        # The same 640 bits as 4x4+8x8-k256.
        (Shape((4, 8), (2, 2), 16), (STOCHASTIC, FAIR)),
        (Shape((8,), (2,), 32), (STOCHASTIC, FAIR)),
    ),
    ablations=(
        "codebook-rate-1",
        "variance-rate-1",
        "fixed-variance",
        "start-factor-1",
        "start-factor-10",
        "final-temperature-0.1",
        "latent-weight-1",
        "latent-weight-0.1",
        "per-layer-terms",
        "expected-terms",
        "hard-phase",
    ),
    ablation_shapes=(Shape((8,), (4,), 64),),
    prior_shapes=(Shape((8,), (1,), 256), Shape((4, 8), (1, 1), 256), Shape((8,), (4,), 64)),
    prior_steps=400,
    num_distance_images=1_000,
    num_workers=2,
)

TINY = Budget(
    networks=NetworkConfig(patch_size=4, width=8, max_width=8, num_blocks=1),
    code_dim=4,
    total_steps=12,
    batch_size=8,
    seeds=(0,),
    comparisons=(
        (Shape((8,), (1,), 16), (STOCHASTIC, FAIR, FSQ)),
        (Shape((8,), (2,), 16), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
    ),
    ablations=("hard-phase", "latent-weight-warmed-up"),
    ablation_shapes=(Shape((8,), (2,), 16),),
    prior_shapes=(Shape((8,), (2,), 16),),
    prior_steps=2,
    num_distance_images=20,
    num_workers=2,
)
BUDGETS = {"tiny": TINY, "cpu": CPU}


def rate_key(shape: Shape, method: Method) -> tuple[str, str]:
    """Family and method in which the rate is chosen.

    Variants of the deterministic baseline take the fair one's rate, hybrids that of SQ-VAE-2.
    """
    family = "SQ-VAE-2" if shape.family == "HQ-VAE" else shape.family
    return family, FAIR.key if method in (PLAIN, SHARED) else method.key


def rate_cells(budget: Budget) -> Iterator[Cell]:
    """The cells in which the rates are chosen: three for each method of each family."""
    seen = set()
    for shape, methods in budget.comparisons:
        for method in methods:
            key = rate_key(shape, method)
            if key not in seen and key == (shape.family, method.key):
                seen.add(key)
                yield from (Cell(shape, method, rate, budget.seeds[0]) for rate in RATES)


def comparison_cells(budget: Budget, rates: dict[tuple[str, str], float]) -> Iterator[Cell]:
    """The cells of the table, given the rate of each (family, method)."""
    for shape, methods in budget.comparisons:
        for method in methods:
            rate = rates[rate_key(shape, method)]
            yield from (Cell(shape, method, rate, seed) for seed in budget.seeds)


def ablation_cells(budget: Budget, rates: dict[tuple[str, str], float]) -> Iterator[Cell]:
    """One setting changed at a time."""
    for shape in budget.ablation_shapes:
        rate = rates[rate_key(shape, STOCHASTIC)]
        for name in budget.ablations:
            yield Cell(shape, STOCHASTIC, rate, budget.seeds[0], name)


def every_cell(budget: Budget) -> Iterator[Cell]:
    """All cells that any outcome of the choice of rates can ask for."""
    for rate in RATES:
        keys = {(family, method.key): rate for family in FAMILIES for method in METHODS}
        yield from comparison_cells(budget, keys)
        yield from ablation_cells(budget, keys)


def run_config(cell: Cell, budget: Budget, data: DataConfig, folder: Path) -> TokenizerRunConfig:
    """The cell's run, in a folder of its own."""
    tokenizer = hq_vae(
        [data.image_size // side for side in cell.shape.sides],
        cell.shape.depths,
        cell.shape.codebook_size,
        budget.code_dim,
        shares_codebook=cell.method.shares_codebook,
        networks=budget.networks,
    )
    quantizer = cell.method.quantizer
    if cell.ablation:
        changes = ABLATIONS[cell.ablation].quantizer
        quantizer = type(quantizer)(**{**quantizer.model_dump(), **changes})
    return TokenizerRunConfig(
        run_dir=folder / cell.name,
        data=data,
        tokenizer=tokenizer.model_copy(update={"quantizer": quantizer}),
        training=TrainingConfig(
            total_steps=budget.total_steps,
            batch_size=budget.batch_size,
            learning_rate=cell.rate,
            seed=cell.seed,
            log_interval=50,
            validation_interval=budget.total_steps // 5,
            checkpoint_interval=max(budget.total_steps // 4, 1),
            num_validation_images=1_000,
        ),
    )
