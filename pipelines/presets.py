"""Runs by name, as Python: a preset names the data, the model and the budget.

A baseline (`vqvae`, `vqvae2`, `rqvae`, `hqvae-baseline`) differs from its counterpart in the
quantizer alone; `fsq` has a fixed grid for a codebook.
"""

import functools
import json
from pathlib import Path
from typing import Any

from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig, TrainingConfig
from prior.config import PriorNetworkConfig
from tokenizer.builders import (
    deterministic,
    fsq_vae,
    hq_vae,
    rsq_vae,
    sq_vae,
    sq_vae_2,
)
from tokenizer.config import BackboneConfig, NetworkConfig, TokenizerConfig

# Data

SHAPES32 = DataConfig()
CIFAR10 = DataConfig(dataset="CIFAR10", root=Path("data"), horizontal_flip=True)
IMAGES128 = DataConfig(dataset="folder", image_size=128, horizontal_flip=True)
IMAGES256 = DataConfig(dataset="folder", image_size=256, horizontal_flip=True)
SMALL_IMAGES = {size: DataConfig(dataset="folder", image_size=size) for size in (32, 64, 128)}
TINY_DATA = DataConfig(image_size=16, num_images=64, num_validation_images=32)

# Networks of the tokenizer

SHAPES_NETWORKS = NetworkConfig(patch_size=4, width=64, max_width=64)
SMALL_NETWORKS = NetworkConfig(patch_size=4, width=64, max_width=128)
CIFAR10_NETWORKS = NetworkConfig(width=128, max_width=256, num_blocks=4)
LARGE_NETWORKS = NetworkConfig(width=96, max_width=512, num_blocks=3, attention_downsampling=(16,))
TINY_NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)

# Budgets

# Many updates with few images each bring a processor furthest.
SHAPES_TRAINING = TrainingConfig(
    total_steps=2_100,
    batch_size=16,
    learning_rate=3e-3,
    ema_decay=0.995,
    validation_interval=1_050,
    checkpoint_interval=1_050,
)
SMALL_TRAINING = TrainingConfig(
    total_steps=8_000,
    batch_size=16,
    learning_rate=2e-3,
    ema_decay=0.995,
    num_validation_images=500,
)
CIFAR10_TRAINING = TrainingConfig(total_steps=100_000, batch_size=128, validation_interval=5_000)
IMAGES_TRAINING = TrainingConfig(
    total_steps=200_000,
    learning_rate=5e-4,
    precision="bf16",
    channels_last=True,
    validation_interval=10_000,
)
TINY_TRAINING = TrainingConfig(
    total_steps=4,
    batch_size=4,
    warmup_steps=1,
    log_interval=1,
    validation_interval=2,
    num_validation_images=8,
    checkpoint_interval=2,
)


BASELINES = {
    "sqvae": "vqvae",
    "sqvae2": "vqvae2",
    "rsqvae": "rqvae",
    "hqvae": "hqvae-baseline",
    "tiny": "tiny-baseline",
}


def _tokenizers() -> dict[str, tuple[TokenizerConfig, DataConfig, TrainingConfig]]:
    shapes = {
        "sqvae2": sq_vae_2((8, 4), 256, 32, networks=SHAPES_NETWORKS),
        "rsqvae": rsq_vae(4, 2, 64, 32, networks=SHAPES_NETWORKS),
        "hqvae": hq_vae((8, 4), (2, 1), 64, 32, networks=SHAPES_NETWORKS),
        "fsq": fsq_vae(4, (8, 8), 32, depth=2, networks=SHAPES_NETWORKS),
    }
    cifar10 = {
        "sqvae": sq_vae(4, 512, networks=CIFAR10_NETWORKS),
        "sqvae2": sq_vae_2((4, 2), 512, networks=CIFAR10_NETWORKS),
        "rsqvae": rsq_vae(4, 4, 512, networks=CIFAR10_NETWORKS),
        "hqvae": hq_vae((4, 2), (2, 1), 512, networks=CIFAR10_NETWORKS),
        "fsq": fsq_vae(4, (8, 8, 8), networks=CIFAR10_NETWORKS),
    }
    images128 = {
        "sqvae2": sq_vae_2((16, 8), 1024, networks=LARGE_NETWORKS),
        "rsqvae": rsq_vae(16, 4, 1024, networks=LARGE_NETWORKS),
        "hqvae": hq_vae((16, 8), (2, 1), 1024, networks=LARGE_NETWORKS),
        "fsq": fsq_vae(16, (8, 8, 8, 2), depth=4, networks=LARGE_NETWORKS),
        "hqvae-mobilenetv2": hq_vae((16, 8), (2, 1), 1024, networks=LARGE_NETWORKS).model_copy(
            update={"backbone": BackboneConfig(name="mobilenetv2_100")}
        ),
    }
    images256 = {
        "sqvae2": sq_vae_2((16, 8), 1024, networks=LARGE_NETWORKS),
        "rsqvae": rsq_vae(32, 4, 2048, networks=LARGE_NETWORKS),
        "hqvae": hq_vae((32, 16), (4, 2), 2048, networks=LARGE_NETWORKS),
        "fsq": fsq_vae(16, (8, 8, 8, 4), depth=2, networks=LARGE_NETWORKS),
    }
    small = {
        32: sq_vae_2((8, 4), 256, 32, networks=SMALL_NETWORKS),
        64: sq_vae_2((8, 4), 256, 32, networks=SMALL_NETWORKS),
        128: sq_vae_2((16, 8), 256, 32, networks=SMALL_NETWORKS),
    }
    tiny = {
        "tiny": hq_vae((8, 4), (2, 1), 8, 4, networks=TINY_NETWORKS),
        "tiny-fsq": fsq_vae(4, (4, 2), 4, networks=TINY_NETWORKS),
    }
    members: dict[str, tuple[TokenizerConfig, DataConfig, TrainingConfig]] = {}
    for prefix, family, data, training in (
        ("shapes32-", shapes, SHAPES32, SHAPES_TRAINING),
        ("cifar10-", cifar10, CIFAR10, CIFAR10_TRAINING),
        ("images128-", images128, IMAGES128, IMAGES_TRAINING),
        ("images256-", images256, IMAGES256, IMAGES_TRAINING),
        *(
            (f"images{size}-", {"small": config}, SMALL_IMAGES[size], SMALL_TRAINING)
            for size, config in small.items()
        ),
        ("", tiny, TINY_DATA, TINY_TRAINING),
    ):
        for name, config in family.items():
            members[prefix + name] = (config, data, training)
            if name in BASELINES:
                members[prefix + BASELINES[name]] = (deterministic(config), data, training)
    return members


def _cpu_network(width: int, num_heads: int) -> PriorNetworkConfig:
    return PriorNetworkConfig(
        width=width,
        num_spatial_layers=4,
        num_depth_layers=1,
        num_heads=num_heads,
        dropout=0.0,
        value_residual=True,
        adaptive_norm=True,
    )


def _prior(name: str, tokenizer: TokenizerConfig) -> PriorRunConfig:
    run_dir = Path("runs") / name
    if name.startswith("tiny"):
        return PriorRunConfig(
            run_dir=run_dir,
            prior=PriorNetworkConfig(
                width=16, num_spatial_layers=1, num_depth_layers=1, num_heads=2
            ),
            training=TINY_TRAINING,
        )
    if name.startswith("shapes32"):
        return PriorRunConfig(
            run_dir=run_dir,
            prior=_cpu_network(64, num_heads=2),
            targets="posterior" if tokenizer.has_posterior else "indices",
            training=SHAPES_TRAINING.model_copy(
                update={
                    "total_steps": 3_000,
                    "weight_decay": 0.05,
                    "validation_interval": 1_500,
                    "checkpoint_interval": 1_500,
                }
            ),
            sampling_temperature=0.5,
            guidance_scale=2.0,
        )
    if name.endswith("small"):
        return PriorRunConfig(
            run_dir=run_dir,
            prior=_cpu_network(128, num_heads=4),
            targets="posterior",
            training=SMALL_TRAINING.model_copy(
                update={"total_steps": 12_000, "learning_rate": 1e-3, "weight_decay": 0.05}
            ),
            sampling_temperature=0.7,
        )
    if name.startswith("cifar10"):
        return PriorRunConfig(
            run_dir=run_dir,
            prior=PriorNetworkConfig(width=512, num_spatial_layers=12, num_depth_layers=4),
            horizontal_flip=True,
            training=CIFAR10_TRAINING.model_copy(
                update={"learning_rate": 3e-4, "weight_decay": 0.05, "precision": "bf16"}
            ),
        )
    return PriorRunConfig(
        run_dir=run_dir,
        prior=PriorNetworkConfig(
            width=1024, num_spatial_layers=24, num_depth_layers=4, num_heads=16, positions="rotary"
        ),
        horizontal_flip=True,
        targets="posterior" if tokenizer.has_posterior else "indices",
        training=IMAGES_TRAINING.model_copy(
            update={"learning_rate": 2e-4, "weight_decay": 0.05, "warmup_steps": 2_000}
        ),
    )


TOKENIZER_PRESETS = {
    name: TokenizerRunConfig(
        run_dir=Path("runs") / name, data=data, tokenizer=config, training=training
    )
    for name, (config, data, training) in _tokenizers().items()
}
PRIOR_PRESETS = {name: _prior(name, run.tokenizer) for name, run in TOKENIZER_PRESETS.items()}

COSTS_FILE = Path(__file__).with_name("preset_costs.json")
"""Written by `python -m benchmarks.presets`."""
CPU_SPEED, GPU_SPEED = 70e9, 60e12
"""Floating-point operations a second, assumed: of two cores with AVX-512 in float32, and of a large
GPU in bf16."""
COSTS_NOTE = (
    "Parameters and time are of tokenizer + prior. Times are estimates (~), at 70 GFLOP/s for "
    "two CPU cores and 60 TFLOP/s for a GPU; each run says after a few steps what it takes."
)
PURPOSES = {"shapes32": "procedural shapes", "cifar10": "CIFAR-10", "tiny": "for tests"}


@functools.cache
def preset_costs() -> dict[str, Any]:
    """By preset and stage, parameters and floating-point operations of a step."""
    costs: dict[str, Any] = json.loads(COSTS_FILE.read_text())["presets"]
    return costs


def smaller_preset(image_size: int, networks: NetworkConfig | PriorNetworkConfig) -> str:
    """Name of the preset for a CPU of images as large, or the nearest smaller ones.

    Empty if there is none, or none but that of these networks.
    """
    for size in sorted((own for own in SMALL_IMAGES if own <= image_size), reverse=True):
        name = f"images{size}-small"
        known = (TOKENIZER_PRESETS[name].tokenizer.networks, PRIOR_PRESETS[name].prior)
        if size < image_size or networks not in known:
            return name
    return ""


def describe_preset(name: str) -> str:
    """Purpose, image size, codes of an image, parameters, and what training both stages takes."""
    run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
    size = run.data.image_size
    maps = [(size // group.downsampling) ** 2 * group.num_layers for group in run.tokenizer.groups]
    purpose = PURPOSES.get(name.split("-")[0], "own images")
    text = f"{purpose} {size}×{size}, {' + '.join(map(str, maps))} codes"
    costs = preset_costs().get(name)
    if costs is None:
        return text
    stages = [costs["tokenizer"], costs["prior"]]
    steps = [run.training.total_steps, prior_run.training.total_steps]
    parameters = " + ".join(_short(stage["parameters"]) for stage in stages)
    operations = sum(n * s["operations_per_step"] for n, s in zip(steps, stages, strict=True))
    return (
        f"{text}, {parameters} parameters, two cores ~{describe_time(operations / CPU_SPEED)}, "
        f"GPU ~{describe_time(operations / GPU_SPEED)}"
    )


def _short(number: int) -> str:
    return f"{number / 1e6:.3g} M" if number >= 1e5 else f"{number / 1e3:.3g} k"


def describe_time(seconds: float) -> str:
    """In the unit that a person would take."""
    for unit, length in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:,.0f} {unit}"
    return f"{seconds:.0f} s"
