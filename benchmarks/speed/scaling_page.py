"""The tables of `scaling.md`, from the JSON alone."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.readme import markdown_table, replace_section

PAGE = Path(__file__).parents[1] / "scaling.md"


def write_page(results: Path, page: Path = PAGE) -> None:
    """Fills the sections of the page from `results`; those that were not measured stay."""
    found = json.loads(results.read_text())
    replace_section("curves", _curves(found, results.stem), page)
    replace_section("needs", _needs(found["requirements"]), page)
    replace_section("assumptions", _assumptions(found["requirements"]), page)
    if "processes" in found:
        replace_section("processes", _processes(found["processes"]), page)
        replace_section("sharding", _sharding(found["sharding"]), page)


def _curves(found: Mapping[str, Any], stem: str) -> str:
    machine = found["machine"]
    where = machine["gpu"] if found["device"] == "cuda" else f"{found['threads']} CPU thread(s)"
    rows = [
        [
            curve["title"],
            ", ".join(map(str, curve["values"])),
            ", ".join(f"{1000 * own:.3g}" for own in curve["seconds"]),
            f"{curve['exponent']:.2f}",
            f"{curve['last_exponent']:.2f}",
        ]
        for curve in found["curves"].values()
    ]
    header = ["what grows", "values", "ms per step", "exponent", "between the last two"]
    plots = [
        f'<img src="results/{stem}_{name}.png" alt="{curve["title"]}" width="280">'
        for name, curve in found["curves"].items()
    ]
    return "\n".join(
        [
            f"Measured on {where} (`{found['command']}`).",
            "",
            markdown_table(header, rows),
            "",
            *plots,
        ]
    )


def _processes(found: Mapping[str, Any]) -> str:
    bare = found.get("bare_images_per_second", {})
    rows = [
        [count, *(", ".join(f"{own:.0f}" for own in part) for part in (rates, bare.get(count, [])))]
        for count, rates in found["images_per_second"].items()
    ]
    header = ["processes", "images/s, run by run", "torch's DDP alone"]
    text = f"{markdown_table(header, rows)}\n\nEfficiency: {found['efficiency']:.2f}"
    if bare:
        reached = {
            count: statistics.median(rates) / statistics.median(bare[count])
            for count, rates in found["images_per_second"].items()
        }
        text += " of one process; of DDP alone " + ", ".join(
            f"{share:.2f} with {count}" for count, share in reached.items()
        )
    return f"{text} (`{found['preset']}`, gloo or NCCL)."


def _sharding(found: Mapping[str, Any]) -> str:
    rows = [
        [
            count,
            f"{own['parameters_held_by_this_process']:,} of {own['parameters']:,}",
            ", ".join(f"{loss:.6f}" for loss in own["losses"]),
        ]
        for count, own in found["runs"].items()
    ]
    losses = markdown_table(
        ["processes", "parameters held by the first", "losses, nats per code"], rows
    )
    return f"{losses}\n\nLargest difference: {found['largest_difference']:.1g}."


def _assumptions(found: Mapping[str, Any]) -> str:
    shares = found["assumed_utilization"]
    return (
        f"GPU hours = FLOPs / (peak × utilization) on one {found['gpu']}, whose peak is "
        f"{found['peak_flops_per_second'] / 1e12:.0f} TFLOP/s (dense bf16, data sheet). The "
        f"utilization is **assumed**, not measured: {shares['stage one']:.0%} for stage one, "
        f"{shares['stage two']:.0%} for stage two. The state takes "
        f"{found['bytes_per_parameter']} bytes per parameter (weights, gradients, two moments, "
        f"EMA); activations come on top and were not measured. The data are "
        f"{found['images']:,} images."
    )


def _needs(found: Mapping[str, Any]) -> str:
    rows = []
    for name, own in found["presets"].items():
        for stage in ("stage one", "stage two"):
            part = own[stage]
            rows.append(
                [
                    f"`{name}`" if "," not in name else name,
                    stage,
                    f"{part['parameters'] / 1e6:.0f} M",
                    f"{part['flops_per_image'] / 1e9:.0f} G",
                    f"{part['epochs']:.1f}",
                    f"{part['gpu_hours']:.1f}",
                    f"{part['gpu_hours_per_epoch']:.2f}",
                    f"{part['state_bytes'] / 1e9:.1f} GB",
                ]
            )
    header = [
        *("preset", "stage", "parameters", "FLOPs per image", "epochs", "GPU hours"),
        *("per epoch", "state"),
    ]
    disk = [
        [
            f"`{name}`" if "," not in name else name,
            ", ".join(own["code_maps"]),
            f"{own['codes_per_image']:,}",
            f"{own['bits_per_image']:,.0f}",
            f"{own['codes_of_the_data'] / 1e9:.2f} G",
            f"{own['image_bytes'] / 1e9:.0f} GB",
            f"{own['index_bytes'] / 1e9:.1f} GB",
            f"{own['latent_bytes'] / 1e9:.0f} GB",
        ]
        for name, own in found["presets"].items()
    ]
    disk_header = [
        *("preset", "code maps", "codes per image", "bits", "tokens of the data, mirrored too"),
        *("images on disk", "indices", "latents"),
    ]
    return markdown_table(header, rows) + "\n\n" + markdown_table(disk_header, disk)
