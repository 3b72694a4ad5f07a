"""What each preset takes: `python -m benchmarks.presets` writes `pipelines/preset_costs.json`.

A few training steps of each stage on this machine's CPU, with as many images as take some seconds,
counted up to a whole batch; the floating-point operations by torch's counter.
"""

import json
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import origin
from pipelines.presets import COSTS_FILE, PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.training.step_time import prior_task, seconds_per_step, tokenizer_task
from tokenizer.storage.files import replace_file

MOST_VALUES = 4 * 128**2
"""Pixels of the images that are measured at a time."""


PATIENCE = 5.0
"""Seconds after which one step is enough."""


def costs_of(name: str, stage: str) -> dict[str, float]:
    """Parameters of a model, operations and seconds of a step."""
    run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
    batch_size = (run if stage == "tokenizer" else prior_run).training.batch_size
    num_images = max(1, min(batch_size, MOST_VALUES // run.data.image_size**2))
    device = torch.device("cpu")
    torch.manual_seed(0)
    if stage == "tokenizer":
        model, loss = tokenizer_task(run, num_images, device)
    else:
        model, loss = prior_task(prior_run, run, num_images, device)
    started = time.perf_counter()
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    seconds = time.perf_counter() - started
    if seconds < PATIENCE:
        seconds = seconds_per_step(model, loss, patience=PATIENCE)
    num_parts = batch_size / num_images
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations_per_step": counter.get_total_flops() * num_parts,
        "seconds_per_step": round(seconds * num_parts, 4),
    }


def main() -> None:
    """Measures all presets and writes the file."""
    # The weights of a backbone are a download.
    names = [name for name, run in TOKENIZER_PRESETS.items() if run.tokenizer.backbone is None]
    costs: dict[str, dict[str, dict[str, float]]] = {}
    known: dict[str, dict[str, float]] = {}
    for name in names:
        run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
        # What a stage costs depends on its network and the shapes of its codes alone.
        shapes = run.tokenizer.model_dump_json(exclude={"quantizer", "networks"})
        keys = {
            "tokenizer": run.tokenizer.model_dump_json() + run.training.model_dump_json(),
            "prior": shapes + prior_run.model_dump_json(exclude={"run_dir", "targets"}),
        }
        costs[name] = {}
        for stage, key in keys.items():
            if key not in known:
                known[key] = costs_of(name, stage)
                print(name, stage, known[key], flush=True)
            costs[name][stage] = known[key]
    result = {**origin("python -m benchmarks.presets"), "presets": costs}
    replace_file(COSTS_FILE, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
