"""What each preset takes: `python -m benchmarks.presets` writes `pipelines/preset_costs.json`.

A few training steps of each stage on this machine's CPU, with as many images as take some seconds,
counted up to a whole batch; the floating-point operations by torch's counter.
"""

import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import origin
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.presets import COSTS_FILE, PRIOR_PRESETS, TOKENIZER_PRESETS
from prior import Prior, PriorConfig, PriorOutput
from tokenizer import Tokenizer
from tokenizer.storage.files import replace_file

MOST_VALUES = 4 * 128**2
"""Pixels of the images that are measured at a time."""
NUM_STEPS = 3


def _tokenizer(run: TokenizerRunConfig, num_images: int) -> tuple[nn.Module, Callable[[], Tensor]]:
    model = Tokenizer(run.tokenizer)
    size = run.data.image_size
    images = torch.rand(num_images, run.data.channels, size, size) * 2 - 1

    def loss() -> Tensor:
        output = model(images, 1.0)
        terms = sum(output.latent_terms.values(), torch.zeros(()))
        error: Tensor = (images - output.reconstructions).square().mean()
        return error + 1e-4 * terms

    return model, loss


def _prior(
    run: PriorRunConfig, tokenizer_run: TokenizerRunConfig, num_images: int
) -> tuple[nn.Module, Callable[[], Tensor]]:
    size = tokenizer_run.data.image_size
    code_maps = Tokenizer(tokenizer_run.tokenizer).code_maps(size, size)
    model = Prior(PriorConfig(network=run.prior, code_maps=code_maps))
    indices = [
        torch.stack(
            [torch.randint(k, (num_images, own.height, own.width)) for k in own.codebook_sizes], 1
        )
        for own in code_maps
    ]

    def loss() -> Tensor:
        output: PriorOutput = model(indices, None, None)
        return output.loss

    return model, loss


def measure(model: nn.Module, loss: Callable[[], Tensor], share: float) -> dict[str, float]:
    """Parameters of a model, operations and seconds of a step, of which `share` is measured."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "operations_per_step": counter.get_total_flops() / share,
        "seconds_per_step": min(seconds) / share,
    }


def main() -> None:
    """Measures all presets and writes the file."""
    costs: dict[str, dict[str, dict[str, float]]] = {}
    for name, run in TOKENIZER_PRESETS.items():
        if run.tokenizer.backbone is not None:
            continue  # its weights are a download
        costs[name] = {}
        for stage in ("tokenizer", "prior"):
            batch = (run if stage == "tokenizer" else PRIOR_PRESETS[name]).training.batch_size
            num_images = max(1, min(batch, MOST_VALUES // run.data.image_size**2))
            torch.manual_seed(0)
            if stage == "tokenizer":
                model, loss = _tokenizer(run, num_images)
            else:
                model, loss = _prior(PRIOR_PRESETS[name], run, num_images)
            costs[name][stage] = measure(model, loss, num_images / batch)
            print(name, stage, costs[name][stage], flush=True)
    result = {**origin("python -m benchmarks.presets"), "presets": costs}
    replace_file(COSTS_FILE, lambda path: path.write_text(json.dumps(result, indent=1) + "\n"))


if __name__ == "__main__":
    main()
