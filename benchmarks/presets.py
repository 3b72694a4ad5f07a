"""What each preset takes: `python -m benchmarks.presets` writes `pipelines/preset_costs.json`.

Parameters, and the floating-point operations of a training step by torch's counter, on one image
and counted up to a whole batch.
"""

import json

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import origin
from pipelines.presets import COSTS_FILE, PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.training.step_time import prior_task, tokenizer_task
from tokenizer.storage.files import replace_file


def costs_of(name: str, stage: str) -> dict[str, float]:
    """Parameters of a model, and floating-point operations of a step."""
    run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
    device = torch.device("cpu")
    torch.manual_seed(0)
    if stage == "tokenizer":
        model, loss = tokenizer_task(run, 1, device)
    else:
        model, loss = prior_task(prior_run, run, 1, device)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    batch_size = (run if stage == "tokenizer" else prior_run).training.batch_size
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations_per_step": counter.get_total_flops() * batch_size,
    }


def main() -> None:
    """Counts for all presets and writes the file."""
    # The weights of a backbone are a download.
    names = [name for name, run in TOKENIZER_PRESETS.items() if run.tokenizer.backbone is None]
    costs: dict[str, dict[str, dict[str, float]]] = {}
    known: dict[str, dict[str, float]] = {}
    for name in names:
        run, prior_run = TOKENIZER_PRESETS[name], PRIOR_PRESETS[name]
        # What a stage costs depends on its network and the shapes of its codes alone.
        size = str(run.data.image_size)
        shapes = size + run.tokenizer.model_dump_json(exclude={"quantizer", "networks"})
        keys = {
            "tokenizer": size + run.tokenizer.model_dump_json() + run.training.model_dump_json(),
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
