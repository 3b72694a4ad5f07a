"""Stage one by torch's DistributedDataParallel alone: what a run could reach at most.

    torchrun --nproc-per-node 2 -m benchmarks.speed.bare PRESET STEPS OUTPUT.json

Random images that lie in memory; forward, backward, clipping and AdamW, and nothing else.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipelines.presets import TOKENIZER_PRESETS
from pipelines.training.losses import Bound
from pipelines.training.optimizer import Network, make_optimizer
from tokenizer import Tokenizer

NUM_CHUNKS = 6
"""Of which each gives a rate; the first does not count."""


def images_per_second(preset: str, steps: int) -> float:
    """Of all processes together, the median of the chunks."""
    config = TOKENIZER_PRESETS[preset]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    model = Tokenizer(config.tokenizer)
    size, batch = config.data.image_size, config.training.batch_size // world
    images = torch.rand(max(batch, 64), config.data.channels, size, size) * 2 - 1
    model.initialize_from_data(images, torch.Generator().manual_seed(0))
    objective = Bound(config.recipe, model.has_posterior)
    network = Network.from_config(
        model, config.training, config.recipe.rate_factors(model.learned_roles())
    )
    optimizer = make_optimizer(network)
    prepared: nn.Module = model
    if world > 1:
        prepared = DistributedDataParallel(model)
    rates = []
    for _ in range(NUM_CHUNKS):
        count = max(steps // NUM_CHUNKS, 1)
        started = time.perf_counter()
        for _ in range(count):
            given = images[:batch]
            objective(given, prepared(given, 1.0)).minimized.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), network.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
        rates.append(count * batch * world / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def main() -> None:
    """Writes what the main process has measured to the file that is named."""
    torch.set_num_threads(1)
    preset, steps, output = sys.argv[1:]
    is_shared = "WORLD_SIZE" in os.environ
    if is_shared:
        distributed.init_process_group("gloo")
    rate = images_per_second(preset, int(steps))
    if not is_shared or distributed.get_rank() == 0:
        Path(output).write_text(json.dumps(rate) + "\n")
    if is_shared:
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
