"""What is compared: each cell is one tokenizer, whose codes are then chosen in several ways."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.quality.cells import Shape
from pipelines.config import DataConfig, TokenizerRecipe, TokenizerRunConfig, TrainingConfig
from pipelines.recipe import CodePriorRecipe
from tokenizer.builders import deterministic, hq_vae
from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.config import NetworkConfig, TokenizerConfig

IMAGE_SIZE = 32


class Cell(NamedTuple):
    """One tokenizer."""

    shape: Shape
    is_stochastic: bool
    """Ours, or the fair deterministic baseline."""
    has_prior: bool
    """Whether a prior weighs on the codes in training; else it is fitted to the finished ones."""
    seed: int
    rate_weights: tuple[float, ...]
    """μ of the searches for its codes."""

    @property
    def learning_rate(self) -> float:
        """What `benchmarks.quality` chose on validation images, by family and method."""
        is_high = self.is_stochastic and self.shape.family != "SQ-VAE-2"
        return 8e-3 if is_high else 4e-3

    @property
    def name(self) -> str:
        """Also that of its folder."""
        parts = [self.shape.name, "ours" if self.is_stochastic else "fair"]
        parts += ["prior"] if self.has_prior else []
        return "_".join([*parts, f"seed{self.seed}"])


class Budget(NamedTuple):
    """How long, and with which networks."""

    networks: NetworkConfig
    code_dim: int
    prior_width: int
    """Channels of the heads, of every cell alike."""
    total_steps: int
    batch_size: int
    calibration_steps: int
    """Of heads that were trained along, on hard codes."""
    main: tuple[Shape, ...]
    """With several seeds."""
    others: tuple[Shape, ...]
    """With one seed."""
    references: tuple[Shape, ...]
    """The fair baseline alone, without search: further points of the curve that ratios refer to."""
    seeds: tuple[int, ...]
    rate_weights: tuple[float, ...]
    """μ of the searches: the first of all cells, the others of `swept` shapes at the first seed."""
    swept: tuple[Shape, ...]
    """Of the main ones."""
    baseline_weight: float
    """γ of the rate term in the baselines' training, against half the squared error. Near their
    error's variance, as in a bound; in a trial 0.05 took 14 % more bits at equal error than 0.01,
    and no rate term 2 % more."""
    num_images: int
    """Test images, for each row."""


CPU = Budget(
    networks=NetworkConfig(patch_size=4, width=64, max_width=64),
    code_dim=32,
    prior_width=64,
    total_steps=1_000,
    batch_size=64,
    calibration_steps=200,
    main=(Shape((8,), (4,), 64), Shape((8,), (4,), 256)),
    others=(Shape((8,), (1,), 256), Shape((4, 8), (1, 1), 256), Shape((4, 8), (2, 2), 64)),
    references=(Shape((8,), (1,), 64), Shape((4, 8), (1, 1), 64), Shape((4, 8), (2, 2), 16)),
    seeds=(0, 1, 2),
    rate_weights=(2.0, 4.0),
    swept=(Shape((8,), (4,), 64),),
    baseline_weight=0.01,
    num_images=500,
)
GPU = CPU._replace(
    networks=NetworkConfig(patch_size=2, width=128, max_width=128),
    code_dim=64,
    prior_width=128,
    total_steps=3_000,
    batch_size=128,
    calibration_steps=500,
    main=(*CPU.main, Shape((8,), (4,), 1024)),
    others=tuple(
        shape._replace(codebook_size=size) for shape in CPU.others for size in (256, 1024)
    ),
    references=tuple(shape._replace(codebook_size=64) for shape in CPU.others),
    rate_weights=(0.25, 0.5, 1.0, 2.0, 4.0),
    num_images=2_000,
)
TINY = CPU._replace(
    networks=NetworkConfig(patch_size=4, width=8, max_width=8, num_blocks=1),
    code_dim=4,
    prior_width=4,
    total_steps=4,
    batch_size=8,
    calibration_steps=2,
    main=(Shape((4,), (2,), 4), Shape((4,), (2,), 8)),
    others=(),
    references=(Shape((4,), (2,), 16),),
    seeds=(0,),
    rate_weights=(2.0, 1.0),
    swept=(Shape((4,), (2,), 4),),
    num_images=4,
)
BUDGETS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}


def cells_of(budget: Budget) -> list[Cell]:
    """In the order in which they are run: what matters most first."""
    first, *more = budget.seeds
    cells = [*_crossed(budget, budget.main, first), *_crossed(budget, budget.others, first)]
    cells += [Cell(shape, False, False, first, ()) for shape in budget.references]
    for seed in more:
        cells += _crossed(budget, budget.main, seed)
    return cells


def _crossed(budget: Budget, shapes: tuple[Shape, ...], seed: int) -> Iterator[Cell]:
    for shape in shapes:
        is_swept = shape in budget.swept and seed == budget.seeds[0]
        weights = budget.rate_weights[: None if is_swept else 1]
        for is_stochastic in (True, False):
            for has_prior in (True, False):
                yield Cell(shape, is_stochastic, has_prior, seed, weights)


def with_heads(config: TokenizerConfig, budget: Budget) -> TokenizerConfig:
    """The same tokenizer with a prior of its own."""
    return config.model_copy(update={"code_prior": CodePriorConfig(width=budget.prior_width)})


def run_config(cell: Cell, budget: Budget, data: DataConfig, folder: Path) -> TokenizerRunConfig:
    """The cell's run, in a folder of its own."""
    shape = cell.shape
    tokenizer = hq_vae(
        [IMAGE_SIZE // side for side in shape.sides],
        shape.depths,
        shape.codebook_size,
        budget.code_dim,
        networks=budget.networks,
    )
    if cell.has_prior:
        tokenizer = with_heads(tokenizer, budget)
    recipe = CodePriorRecipe(calibration_steps=budget.calibration_steps)
    if not cell.is_stochastic:
        tokenizer = deterministic(tokenizer)
        recipe = recipe.model_copy(update={"rate_weight": budget.baseline_weight})
    return TokenizerRunConfig(
        run_dir=folder / cell.name,
        data=data,
        tokenizer=tokenizer,
        recipe=TokenizerRecipe(code_prior=recipe),
        training=TrainingConfig(
            total_steps=budget.total_steps,
            batch_size=budget.batch_size,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            validation_interval=budget.total_steps,
            checkpoint_interval=max(budget.total_steps // 4, 1),
            num_validation_images=500,
        ),
    )
