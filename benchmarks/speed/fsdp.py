"""A prior sharded over processes by FSDP2 through Accelerate: the losses are those of one process.

    torchrun --nproc-per-node 2 -m benchmarks.speed.fsdp OUTPUT.json

On several GPUs, `accelerate launch -m benchmarks.speed.fsdp OUTPUT.json`. The same program runs
unsharded with one process: `python -m benchmarks.speed.fsdp OUTPUT.json`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from x_transformers.x_transformers import Attention, FeedForward

from benchmarks.speed.steps import new_prior, num_codes, random_codes
from pipelines.config import TrainingConfig
from pipelines.training.optimizer import Network, make_optimizer
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
    is_sharded = "WORLD_SIZE" in os.environ
    has_gpu = torch.accelerator.is_available()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[Attention.__name__, FeedForward.__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(
        cpu=not has_gpu, fsdp_plugin=plugin if is_sharded and has_gpu else None
    )
    if is_sharded and not has_gpu:
        # Accelerate heeds the plugin on GPUs alone, though all that it then does works with gloo.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    torch.manual_seed(0)
    model = new_prior(NETWORK, MAPS)
    config = TrainingConfig(learning_rate=1e-3, weight_decay=0.05)
    optimizer = make_optimizer(Network.from_config(model, config))
    num_parameters = sum(own.numel() for own in model.parameters())
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    losses, norms = [], []
    for _ in range(STEPS):
        indices = random_codes(MAPS, BATCH)
        rows = slice(accelerator.process_index, None, accelerator.num_processes)
        own = [part[rows].to(accelerator.device) for part in indices]
        loss = prepared(own).loss / num_codes(MAPS)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(prepared.parameters(), config.max_gradient_norm)
        prepared_optimizer.step()
        prepared_optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        norms.append((norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item())
    held = sum(
        (own.to_local() if hasattr(own, "to_local") else own).numel()
        for own in prepared.parameters()
    )
    return {
        "processes": accelerator.num_processes,
        "parameters": num_parameters,
        "parameters_held_by_this_process": held,
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
