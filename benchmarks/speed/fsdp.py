"""A prior shared out over processes (FSDP2): the losses are those of one process.

    torchrun --nproc-per-node 2 -m benchmarks.speed.fsdp OUTPUT.json

On several GPUs, `accelerate launch -m benchmarks.speed.fsdp OUTPUT.json`. The same program runs
unsharded with one process: `python -m benchmarks.speed.fsdp OUTPUT.json`.
"""

import json
import os
import sys
from pathlib import Path

import torch

from benchmarks.speed.steps import new_prior, num_codes, random_codes
from pipelines.config import TrainingConfig
from pipelines.processes import local, new_accelerator
from pipelines.training.networks import TrainedNetwork
from pipelines.training.optimizer import Network
from pipelines.training.sharded_network import ShardedNetwork
from pipelines.training.sharding import sharding
from prior.config import PriorNetworkConfig
from tokenizer.config import CodeMapConfig

STEPS = 5
BATCH = 8
MAPS = (CodeMapConfig(height=4, width=4, codebook_sizes=(32, 32), code_dim=16),)
NETWORK = PriorNetworkConfig(
    width=64, num_spatial_layers=4, num_depth_layers=2, num_heads=2, dropout=0.0, label_dropout=0.0
)


def train_sharded() -> dict[str, object]:
    """Losses of a few steps on the same global batches, whatever the number of processes."""
    accelerator = new_accelerator()
    config = TrainingConfig(learning_rate=1e-3, weight_decay=0.05, parallel="fsdp")
    torch.manual_seed(0)
    model = new_prior(NETWORK, MAPS)
    num_parameters = sum(own.numel() for own in model.parameters())
    plan = Network.from_config(model, config)
    losses, norms = [], []
    with sharding(accelerator, config):
        network = (
            TrainedNetwork("prior", plan, config, accelerator, None)
            if accelerator.num_processes == 1
            else ShardedNetwork("prior", plan, config, accelerator, None, None)
        )
        for step in range(STEPS):
            indices = random_codes(MAPS, BATCH)
            rows = slice(accelerator.process_index, None, accelerator.num_processes)
            own = [part[rows].to(accelerator.device) for part in indices]
            loss = network.prepared(own).loss / num_codes(MAPS)
            norms.append(network.follow_gradient(loss).item())
            network.update_ema(step + 1)
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
        parts = network.state()
    weights = sum(local(own).nbytes for own in network.parameters)
    held = sum(
        local(own).nbytes
        for part in parts.values()
        for name, own in part.items()
        if not name.endswith(".step")
    )
    return {
        "processes": accelerator.num_processes,
        "parameters": num_parameters,
        "parameters_held_by_this_process": weights // 4,
        "bytes_held_by_this_process": held + weights,  # gradients are as large as weights
        "losses": losses,
        "gradient_norms": norms,
    }


def main() -> None:
    """Writes the losses of the main process to the file that is named."""
    metadata = train_sharded()
    is_shared = torch.distributed.is_initialized()
    if not is_shared or torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(metadata, indent=2) + "\n")
    if is_shared:
        torch.distributed.barrier()  # one that leaves early may abort the other
        torch.distributed.destroy_process_group()
        os._exit(0)  # the backend's threads were once seen to abort an interpreter that ends


if __name__ == "__main__":
    main()
