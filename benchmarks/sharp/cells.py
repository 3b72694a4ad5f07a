"""What is compared: each cell is one training run, from scratch or of the decoder alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pipelines.config import DataConfig, TokenizerRecipe, TokenizerRunConfig, TrainingConfig
from pipelines.recipe import AdversarialConfig, PerceptualConfig
from tokenizer.builders import deterministic, hq_vae
from tokenizer.config import NetworkConfig

Images = Literal["cifar10", "flowers64", "flowers128"]
Losses = Literal["squared", "perceptual", "adversarial", "both"]
Judge = Literal["MobileNetV2", "SqueezeNet"]
SIZES: dict[Images, int] = {"cifar10": 32, "flowers64": 64, "flowers128": 128}


class Weights(NamedTuple):
    """Files of both networks: one teaches, the other judges."""

    mobilenet: Path
    squeezenet: Path


class Cell(NamedTuple):
    """One training run."""

    images: Images
    is_stochastic: bool
    """Ours, or the fair deterministic baseline."""
    losses: Losses
    is_tuned: bool = False
    """Whether the decoder alone is trained, after squared error."""
    teacher: Judge = "SqueezeNet"
    """Network of the perceptual loss."""
    length: int = 1
    """Steps, in units of the budget's."""

    @property
    def name(self) -> str:
        """Also that of its folder."""
        parts = [self.images, "ours" if self.is_stochastic else "fair", self.losses]
        parts += ["decoder"] if self.is_tuned else []
        parts += [self.teacher.lower()] if self.teacher != "SqueezeNet" else []
        parts += [f"{self.length}x"] if self.length > 1 else []
        return "_".join(parts)

    @property
    def base(self) -> "Cell":
        """The run whose decoder is tuned."""
        return Cell(self.images, self.is_stochastic, "squared")

    @property
    def judges(self) -> tuple[Judge, ...]:
        """Networks that it was not trained with."""
        both: tuple[Judge, ...] = ("MobileNetV2", "SqueezeNet")
        if self.losses in ("squared", "adversarial"):
            return both
        return tuple(judge for judge in both if judge != self.teacher)


class Budget(NamedTuple):
    """How long, and with which networks."""

    networks: NetworkConfig
    code_dim: int
    codebook_size: int
    downsamplings: dict[Images, tuple[int, ...]]
    total_steps: int
    tuning_steps: int
    batch_size: int
    tuning_batch_size: int
    learning_rate: float
    precision: Literal["fp32", "bf16"]
    perceptual_weight: float
    teacher_size: int
    """Side to which smaller images are enlarged for the perceptual loss."""
    adversarial: AdversarialConfig
    num_images: int
    """Of each side of a distance."""
    num_workers: int
    images: tuple[Images, ...]


CPU = Budget(
    networks=NetworkConfig(patch_size=2, width=64, max_width=64),
    code_dim=32,
    codebook_size=256,
    downsamplings={"cifar10": (8, 4), "flowers64": (8, 4), "flowers128": (16, 8)},
    total_steps=3_000,
    tuning_steps=1_000,
    batch_size=32,
    tuning_batch_size=32,
    learning_rate=3e-3,
    precision="fp32",
    perceptual_weight=0.1,
    teacher_size=48,
    adversarial=AdversarialConfig(
        weight=0.3, width=32, num_downsamplings=2, lead_steps=300, learning_rate=5e-4
    ),
    num_images=2_000,
    num_workers=1,
    images=("cifar10", "flowers64"),
)
GPU = CPU._replace(
    networks=NetworkConfig(patch_size=4, width=128, max_width=256),
    code_dim=64,
    codebook_size=1024,
    total_steps=4_000,
    tuning_steps=1_500,
    tuning_batch_size=16,
    learning_rate=2e-3,
    precision="bf16",
    adversarial=AdversarialConfig(weight=0.3, lead_steps=300, learning_rate=5e-4),
    num_workers=14,
    images=("flowers128",),
)
TINY = CPU._replace(
    networks=NetworkConfig(patch_size=4, width=8, max_width=8, num_blocks=1),
    code_dim=4,
    codebook_size=16,
    total_steps=6,
    tuning_steps=4,
    batch_size=4,
    tuning_batch_size=4,
    adversarial=AdversarialConfig(weight=0.5, width=4, num_downsamplings=2, lead_steps=1),
    num_images=8,
    images=("cifar10",),
)
BUDGETS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}


def cells_of(images: Images) -> Iterator[Cell]:
    """The rows of one set of images; squared error first, since tuning needs it."""
    for is_stochastic in (True, False):
        yield Cell(images, is_stochastic, "squared")
    for losses in get_args(Losses):
        for is_stochastic in (True, False):
            yield Cell(images, is_stochastic, losses, is_tuned=True)
    yield Cell(images, True, "perceptual", True, "MobileNetV2")
    yield Cell(images, True, "squared", length=2)
    for losses in get_args(Losses)[1:]:
        for is_stochastic in (True, False):
            yield Cell(images, is_stochastic, losses)


def run_config(
    cell: Cell, budget: Budget, data: DataConfig, weights: Weights, folder: Path
) -> TokenizerRunConfig:
    """The run of a cell that is trained from scratch, or of the base of one that is tuned."""
    factors = budget.downsamplings[cell.images]
    tokenizer = hq_vae(
        factors,
        [1] * len(factors),
        budget.codebook_size,
        budget.code_dim,
        networks=budget.networks,
    )
    steps = budget.total_steps * cell.length
    return TokenizerRunConfig(
        run_dir=folder / cell.name,
        data=data,
        tokenizer=tokenizer if cell.is_stochastic else deterministic(tokenizer),
        recipe=TokenizerRecipe() if cell.is_tuned else recipe(cell, budget, weights),
        training=TrainingConfig(
            total_steps=steps,
            batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            precision=budget.precision,
            channels_last=budget.precision == "bf16",
            validation_interval=max(steps // 4, 1),
            checkpoint_interval=max(steps // 8, 1),
            num_validation_images=500,
        ),
    )


def recipe(cell: Cell, budget: Budget, weights: Weights) -> TokenizerRecipe:
    """The losses of a cell, with the weights of the budget."""
    perceptual, adversarial = PerceptualConfig(), AdversarialConfig()
    if cell.losses in ("perceptual", "both"):
        perceptual = PerceptualConfig(
            weight=budget.perceptual_weight,
            image_size=max(budget.teacher_size, SIZES[cell.images]),
            **_network(cell.teacher, weights),
        )
    if cell.losses in ("adversarial", "both"):
        adversarial = budget.adversarial
    return TokenizerRecipe(perceptual=perceptual, adversarial=adversarial)


def _network(name: Judge, weights: Weights) -> dict[str, Any]:
    if name == "SqueezeNet":
        return {"network": "squeezenet1_0", "weights": weights.squeezenet}
    half = (0.5, 0.5, 0.5)
    return {
        "network": "mobilenetv2_100",
        "weights": weights.mobilenet,
        "pad_type": "same",
        "mean": half,
        "std": half,
    }
