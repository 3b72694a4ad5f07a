"""What a process holds of a prior that is trained in shares: counted, and measured for a small one.

    python -m benchmarks.speed.shares [RESULTS]

writes `RESULTS/shares.json`; without RESULTS into this project's, and the table of `scaling.md`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.machine import origin
from benchmarks.readme import markdown_table, replace_section
from benchmarks.speed.fsdp import MAPS, NETWORK
from benchmarks.speed.launches import sharded_losses
from benchmarks.speed.requirements import IMAGE_SIZE, NUM_CLASSES
from benchmarks.speed.scaling_page import PAGE
from benchmarks.speed.steps import new_prior
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.training.blocks import blocks
from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tokenizer.code_maps import code_maps_of
from tokenizer.config import CodeMapConfig

RESULTS = Path(__file__).parents[1] / "results"
COPIES = 5
"""Weights, gradients, two moments and the EMA, 4 bytes each."""
PROCESSES = (1, 8, 64)
GPU_BYTES = 80 * 10**9
PRESET = "images256-hqvae"
NETWORKS = {
    "0.1 B": PriorNetworkConfig(
        width=640, num_spatial_layers=13, num_depth_layers=3, num_heads=10, positions="rotary"
    ),
    "1 B": PriorNetworkConfig(
        width=1536, num_spatial_layers=22, num_depth_layers=4, num_heads=24, positions="rotary"
    ),
    "7 B": PriorNetworkConfig(
        width=4096, num_spatial_layers=22, num_depth_layers=4, num_heads=64, positions="rotary"
    ),
}


def held_bytes(module: nn.Module, num_processes: int) -> dict[str, int]:
    """Bytes that the first process holds, activations aside; the module may be on "meta".

    `state` is there all the time: its share of weights, gradients, moments and EMA, and the buffers
    twice. `gathered` comes on top while it computes: what no block holds, whole, with its
    gradient, and two blocks, the next being gathered while one computes. `whole` comes on top
    while it validates: all weights.
    """
    parameters = dict(module.named_parameters())
    # A tensor is cut along its first dimension.
    shares = sum(
        -(-len(own) // num_processes) * own[0].numel() if own.dim() else 1
        for own in parameters.values()
    )
    buffers = sum(own.nbytes for own in module.state_dict().values()) - sum(
        own.nbytes for own in parameters.values()
    )
    whole = sum(own.numel() for own in parameters.values())
    sizes = [sum(own.numel() for own in block.parameters()) for block in blocks(module)]
    gathered = 2 * (whole - sum(sizes)) + 3 * max(sizes)
    is_shared = num_processes > 1
    return {
        "state": 4 * COPIES * shares + 2 * buffers,
        "gathered": 4 * gathered if is_shared else 0,
        "whole": 4 * whole if is_shared else 0,
    }


def priors() -> dict[str, Any]:
    """Parameters, and bytes by the number of processes, of priors that are never allocated."""
    maps = code_maps_of(TOKENIZER_PRESETS[PRESET].tokenizer.groups, IMAGE_SIZE, IMAGE_SIZE)
    rows = {}
    for name, network in NETWORKS.items():
        with torch.device("meta"):
            module = Prior(_config(network, maps))
        rows[name] = {
            "parameters": sum(own.numel() for own in module.parameters()),
            "bytes": {str(count): held_bytes(module, count) for count in PROCESSES},
        }
    return rows


def _config(network: PriorNetworkConfig, maps: tuple[CodeMapConfig, ...]) -> PriorConfig:
    return PriorConfig(network=network, code_maps=maps, num_classes=NUM_CLASSES)


def measured() -> dict[str, Any]:
    """A small prior on two processes (gloo): counted bytes beside those of its tensors."""
    with torch.device("meta"):
        module = new_prior(NETWORK, MAPS)
    runs = sharded_losses(2)
    return {
        "counted": {str(count): held_bytes(module, count)["state"] for count in (1, 2)},
        "measured": {
            count: own["bytes_held_by_this_process"] for count, own in runs["runs"].items()
        },
        "largest_difference_of_losses": runs["largest_difference"],
    }


def table(found: dict[str, Any]) -> str:
    """What the page shows."""
    rows = []
    for name, own in found["priors"].items():
        for count, held in own["bytes"].items():
            peak = held["state"] + max(held["gathered"], held["whole"])
            rows.append(
                [
                    name,
                    count,
                    *(f"{held[part] / 1e9:.1f}" for part in ("state", "gathered", "whole")),
                    f"{peak / 1e9:.1f}",
                    "yes" if peak < GPU_BYTES else "no",
                ]
            )
    header = ["prior", "GPUs", "state, GB", "computing", "validating", "most", "below 80 GB"]
    small = found["small"]
    check = ", ".join(
        f"{small['measured'][count]:,} of {small['counted'][count]:,} with {count}"
        for count in small["counted"]
    )
    return (
        f"{markdown_table(header, rows)}\n\n"
        "Of the small prior, bytes measured of those counted, by the number of processes:\n"
        f"{check} (`{found['command']}`)."
    )


def main() -> None:
    """Counts, measures, and writes what the page shows."""
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    found: dict[str, Any] = origin("python -m benchmarks.speed.shares")
    found |= {"priors": priors(), "small": measured()}
    results.mkdir(parents=True, exist_ok=True)
    (results / "shares.json").write_text(json.dumps(found, indent=2) + "\n")
    if results == RESULTS:
        replace_section("shares", table(found), PAGE)


if __name__ == "__main__":
    main()
