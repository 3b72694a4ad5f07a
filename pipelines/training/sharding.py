"""Whether the weights, gradients, moments and EMA of a run are shared out over its processes.

They are by FSDP2; see `sharded_network.py`.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator

from accelerate import Accelerator, ParallelismConfig, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.device_mesh import DeviceMesh

from pipelines.config import TrainingConfig
from pipelines.processes import CommonInputError


def machine_size(accelerator: Accelerator, config: TrainingConfig) -> int:
    """Processes among which the weights are shared out; 1 where each holds all of them.

    Raises:
        CommonInputError: hsdp with one process on each machine, which has nothing to share there.
    """
    world: int = accelerator.num_processes
    if config.parallel != "hsdp" or world == 1:
        return 1 if config.parallel == "ddp" else world
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if here == 1 or world % here:
        raise CommonInputError(
            "training.parallel must be ddp or fsdp unless each machine runs the same number of "
            f"processes, at least 2; got hsdp with {here} of {world} here"
        )
    return here


@contextlib.contextmanager
def sharding(accelerator: Accelerator, config: TrainingConfig) -> Iterator[None]:
    """Has the accelerator know networks that are shared out, as `training.parallel` says."""
    num_sharing = machine_size(accelerator, config)
    if num_sharing == 1:
        yield
        return
    # Given to Accelerator itself, the plugin is heeded on GPUs alone, stays in the environment for
    # whatever this process does next, and makes code vectors bf16, too.
    state, common = accelerator.state, PartialState._shared_state
    before = state.distributed_type
    common["distributed_type"] = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False
    )
    if num_sharing < accelerator.num_processes:
        num_copies = accelerator.num_processes // num_sharing
        sizes = {"dp_replicate_size": num_copies, "dp_shard_size": num_sharing}
        state.parallelism_config = ParallelismConfig(**sizes)
        state.device_mesh = state.parallelism_config.get_device_mesh(accelerator.device.type)
    try:
        with warnings.catch_warnings():
            # x-transformers adds to what its attention returns, but not in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield
    finally:
        common["distributed_type"] = state.distributed_type = before
        state.parallelism_config = state.device_mesh = None


def sharing_mesh(accelerator: Accelerator) -> DeviceMesh | None:
    """The processes within `sharding`: by copies and shares; None where all share."""
    mesh, parallelism = accelerator.state.device_mesh, accelerator.state.parallelism_config
    if mesh is None:
        return None
    shared: DeviceMesh = mesh[tuple(parallelism.fsdp_dim_names)]
    return shared


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether it is within `sharding`."""
    return bool(accelerator.state.distributed_type == DistributedType.FSDP)
