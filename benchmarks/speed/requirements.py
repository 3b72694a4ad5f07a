"""What a run on ImageNet at 256×256 needs: counted from the presets, nothing measured."""

import math
from typing import Any

from benchmarks.speed.steps import PEAK_BF16, num_codes, prior_costs, tokenizer_costs
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from prior.config import PriorNetworkConfig
from tokenizer.code_maps import code_maps_of

NUM_IMAGES = 1_281_167
NUM_CLASSES = 1_000
IMAGE_SIZE = 256
PRESETS = ("images256-sqvae2", "images256-rsqvae", "images256-hqvae")
UTILIZATION = {"stage one": 0.2, "stage two": 0.4}
"""Assumed shares of the peak, not measured: narrow convolutions reach less than a transformer."""
PEAK = PEAK_BF16["H100"]
BYTES_PER_PARAMETER = 20
"""Weights, gradients, two moments and the EMA, 4 bytes each."""
BILLION = PriorNetworkConfig(
    width=1536, num_spatial_layers=22, num_depth_layers=4, num_heads=24, positions="rotary"
)
"""A prior of about a billion parameters."""


def requirements() -> dict[str, Any]:
    """Per preset: FLOPs, GPU hours, memory and disk; and the same of a larger prior."""
    rows = {name: _of_preset(name, PRIOR_PRESETS[name].prior) for name in PRESETS}
    rows["images256-hqvae, prior of 1 B"] = _of_preset("images256-hqvae", BILLION)
    return {
        "images": NUM_IMAGES,
        "gpu": "H100",
        "peak_flops_per_second": PEAK,
        "assumed_utilization": UTILIZATION,
        "bytes_per_parameter": BYTES_PER_PARAMETER,
        "presets": rows,
    }


def _of_preset(name: str, network: PriorNetworkConfig) -> dict[str, Any]:
    run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
    maps = code_maps_of(run.tokenizer.groups, IMAGE_SIZE, IMAGE_SIZE)
    codes = num_codes(maps)
    copies = 2 if prior_run.horizontal_flip else 1
    latents = sum(own.code_dim * own.height * own.width for own in maps)
    keeps_latents = prior_run.targets == "posterior"
    metadata: dict[str, Any] = {
        "code_maps": [f"{own.height}x{own.width}x{own.depth}" for own in maps],
        "codes_per_image": codes,
        "bits_per_image": sum(
            own.height * own.width * math.log2(size) for own in maps for size in own.codebook_sizes
        ),
        "codes_of_the_data": codes * NUM_IMAGES * copies,
        "image_bytes": NUM_IMAGES * run.data.channels * IMAGE_SIZE**2,
        "index_bytes": 2 * codes * NUM_IMAGES * copies,
        "latent_bytes": 2 * latents * NUM_IMAGES * copies if keeps_latents else 0,
    }
    counted = {
        "stage one": (tokenizer_costs(run.tokenizer, IMAGE_SIZE), run.training),
        "stage two": (prior_costs(network, maps, NUM_CLASSES), prior_run.training),
    }
    for stage, (own, training) in counted.items():
        seen = training.total_steps * training.batch_size
        hours_per_image = own["flops_per_image"] / (PEAK * UTILIZATION[stage]) / 3600
        metadata[stage] = {
            **own,
            "images_seen": seen,
            "epochs": seen / NUM_IMAGES,
            "flops": own["flops_per_image"] * seen,
            "gpu_hours": hours_per_image * seen,
            "gpu_hours_per_epoch": hours_per_image * NUM_IMAGES,
            "state_bytes": BYTES_PER_PARAMETER * own["parameters"],
        }
    return metadata
