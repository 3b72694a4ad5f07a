"""What a machine can run: networks, steps and cells for a CPU, for a GPU, and for the tests."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.cells import (
    ABLATIONS,
    FAIR,
    FAMILIES,
    FSQ,
    LFQ,
    METHODS,
    PLAIN,
    RATES,
    RESIDUAL_VQ,
    SHARED,
    SIM_VQ,
    STOCHASTIC,
    Cell,
    Method,
    Setting,
    Shape,
)
from pipelines.config import DataConfig, TokenizerRecipe, TokenizerRunConfig, TrainingConfig
from pipelines.presets import CIFAR10_NETWORKS
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig

RateKey = tuple[str, str]
"""Family and method."""


class Budget(NamedTuple):
    """What a machine can run."""

    networks: Mapping[Setting, NetworkConfig]
    code_dim: int
    total_steps: Mapping[Setting, int]
    batch_size: int
    seeds: tuple[int, ...]
    comparisons: tuple[tuple[Setting, Shape, tuple[Method, ...]], ...]
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
    networks={"cifar10": NetworkConfig(patch_size=4, width=64, max_width=64)},
    code_dim=32,
    total_steps={"cifar10": 1_000},
    batch_size=64,
    seeds=(0,),
    comparisons=(
        ("cifar10", Shape((8,), (1,), 256), (STOCHASTIC, FAIR, PLAIN, *TODAY)),
        ("cifar10", Shape((8,), (1,), 64), (STOCHASTIC, FAIR, PLAIN)),
        ("cifar10", Shape((4, 8), (1, 1), 256), (STOCHASTIC, FAIR, PLAIN)),
        ("cifar10", Shape((8,), (4,), 64), (STOCHASTIC, FAIR, SHARED, RESIDUAL_VQ)),
        ("cifar10", Shape((8,), (2,), 64), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
        ("cifar10", Shape((8,), (8,), 16), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
        # The same 640 bits as 4x4+8x8-k256.
        ("cifar10", Shape((4, 8), (2, 2), 16), (STOCHASTIC, FAIR)),
        ("cifar10", Shape((8,), (2,), 32), (STOCHASTIC, FAIR)),
    ),
    ablations=(
        "codebook-rate-1",
        "variance-rate-1",
        "fixed-variance",
        "start-factor-1",
        "start-factor-10",
        "final-temperature-0.1",
        "final-temperature-1",
        "temperature-hold-0",
        "latent-weight-1",
        "latent-weight-0.1",
        "per-layer-terms",
        "expected-terms",
        "hard-phase",
        "no-noise",
    ),
    ablation_shapes=(Shape((8,), (4,), 64),),
    prior_shapes=(Shape((8,), (1,), 256), Shape((4, 8), (1, 1), 256), Shape((8,), (4,), 64)),
    prior_steps=400,
    num_distance_images=1_000,
    num_workers=2,
)

GPU = Budget(
    networks={
        "cifar10": NetworkConfig(patch_size=2, width=128, max_width=128),
        "published": CIFAR10_NETWORKS,
        "flowers": NetworkConfig(patch_size=4, width=128, max_width=256),
    },
    code_dim=64,
    total_steps={"cifar10": 3_000, "published": 12_000, "flowers": 3_000},
    batch_size=128,
    seeds=(0, 1, 2),
    comparisons=(
        *(
            ("cifar10", Shape((8,), (1,), size), (STOCHASTIC, FAIR, PLAIN, *TODAY))
            for size in (256, 64, 128, 512)
        ),
        *(
            ("cifar10", Shape(sides, (1, 1), size), (STOCHASTIC, FAIR, PLAIN))
            for sides in ((4, 8), (8, 16))
            for size in (256, 64)
        ),
        *(
            ("cifar10", Shape((8,), (depth,), size), (STOCHASTIC, FAIR, SHARED, RESIDUAL_VQ))
            for depth in (4, 2, 8, 16)
            for size in (64, 16)
        ),
        ("cifar10", Shape((4, 8), (2, 2), 16), (STOCHASTIC, FAIR)),
        ("cifar10", Shape((8,), (2,), 32), (STOCHASTIC, FAIR)),
        ("cifar10", Shape((4, 8), (4, 3), 64), (STOCHASTIC, FAIR)),
        ("published", Shape((8,), (1,), 512), (STOCHASTIC, FAIR)),
        ("flowers", Shape((8, 16), (1, 1), 256), (STOCHASTIC, FAIR)),
    ),
    ablations=tuple(ABLATIONS),
    ablation_shapes=(Shape((4, 8), (1, 1), 256), Shape((8,), (4,), 64)),
    prior_shapes=(Shape((8,), (1,), 256), Shape((4, 8), (1, 1), 256), Shape((8,), (4,), 64)),
    prior_steps=2_000,
    num_distance_images=10_000,
    num_workers=12,
)

TINY = Budget(
    networks={"cifar10": NetworkConfig(patch_size=4, width=8, max_width=8, num_blocks=1)},
    code_dim=4,
    total_steps={"cifar10": 12},
    batch_size=8,
    seeds=(0,),
    comparisons=(
        ("cifar10", Shape((8,), (1,), 16), (STOCHASTIC, FAIR, FSQ)),
        ("cifar10", Shape((8,), (2,), 16), (STOCHASTIC, FAIR, RESIDUAL_VQ)),
    ),
    ablations=("hard-phase", "latent-weight-warmed-up"),
    ablation_shapes=(Shape((8,), (2,), 16),),
    prior_shapes=(Shape((8,), (2,), 16),),
    prior_steps=2,
    num_distance_images=20,
    num_workers=2,
)
BUDGETS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}


def rate_cells(budget: Budget) -> Iterator[Cell]:
    """The cells in which the rates are chosen: three for each method of each family."""
    seen = set()
    for setting, shape, methods in budget.comparisons:
        for method in methods:
            cells = [Cell(shape, method, rate, budget.seeds[0], "", setting) for rate in RATES]
            key = cells[0].rate_key
            if key not in seen and key == (shape.family, method.key):
                seen.add(key)
                yield from cells


def comparison_cells(budget: Budget, rates: Mapping[RateKey, float]) -> Iterator[Cell]:
    """The cells of the table, given the rate of each (family, method)."""
    for setting, shape, methods in budget.comparisons:
        for method in methods:
            for seed in budget.seeds if setting == "cifar10" else budget.seeds[:1]:
                cell = Cell(shape, method, 0, seed, "", setting)
                yield cell._replace(rate=rates[cell.rate_key])


def ablation_cells(budget: Budget, rates: Mapping[RateKey, float]) -> Iterator[Cell]:
    """One setting changed at a time."""
    for shape in budget.ablation_shapes:
        for name in budget.ablations:
            cell = Cell(shape, STOCHASTIC, 0, budget.seeds[0], name)
            yield cell._replace(rate=rates[cell.rate_key])


def every_cell(budget: Budget) -> Iterator[Cell]:
    """All cells that any outcome of the choice of rates can ask for."""
    for rate in RATES:
        rates = {(family, method.key): rate for family in FAMILIES for method in METHODS}
        yield from comparison_cells(budget, rates)
        yield from ablation_cells(budget, rates)


def run_config(cell: Cell, budget: Budget, data: DataConfig, folder: Path) -> TokenizerRunConfig:
    """The cell's run, in a folder of its own."""
    total_steps = budget.total_steps[cell.setting]
    tokenizer = hq_vae(
        [data.image_size // side for side in cell.shape.sides],
        cell.shape.depths,
        cell.shape.codebook_size,
        budget.code_dim,
        shares_codebook=cell.method.shares_codebook,
        networks=budget.networks[cell.setting],
    )
    quantizer, recipe = cell.method.quantizer, cell.method.recipe
    if cell.ablation:
        ablation = ABLATIONS[cell.ablation]
        quantizer = type(quantizer)(**{**quantizer.model_dump(), **ablation.quantizer})
        recipe = TokenizerRecipe(**{**recipe.model_dump(), **ablation.recipe})
    return TokenizerRunConfig(
        run_dir=folder / cell.name,
        data=data,
        tokenizer=tokenizer.model_copy(update={"quantizer": quantizer}),
        recipe=recipe,
        training=TrainingConfig(
            total_steps=total_steps,
            batch_size=budget.batch_size,
            learning_rate=cell.rate,
            seed=cell.seed,
            validation_interval=max(total_steps // 5, 1),
            checkpoint_interval=max(total_steps // 4, 1),
            num_validation_images=1_000,
        ),
    )
