"""A network of which each process holds a share (FSDP2).

The root module holds what no block holds: code vectors, embeddings and heads, whole from the
forward to the end of the backward. Blocks are whole while they compute.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pipelines.config import TrainingConfig
from pipelines.processes import gathered, local
from pipelines.run.checkpoints import Tensors
from pipelines.run.shards import read_shards
from pipelines.training.blocks import blocks
from pipelines.training.networks import TrainedNetwork
from pipelines.training.optimizer import Network, make_optimizer, optimizer_tensors
from pipelines.training.sharding import sharing_mesh
from tokenizer.storage.pretrained import check_weights


class _LocalState(nn.Module):
    """This process's share of all that a module saves: no copy, the same memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {name.replace(".", "/"): name for name in module.state_dict()}
        for own, name in self.names.items():
            tensor = local(module.state_dict()[name])
            if tensor.is_floating_point():
                self.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(own, tensor)

    def like(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names of the module, sharded as the tensors of `whole` are."""
        state = self.state_dict()
        return {name: _as_share(state[own], whole[name]) for own, name in self.names.items()}


class ShardedNetwork(TrainedNetwork):
    """A network of which each process holds a share; see `TrainedNetwork`.

    Args:
        name: of the network.
        network: what is trained, and how; whole, on all processes alike.
        config: of the loop.
        accelerator: within `sharding`.
        saved: what the last checkpoint holds; None at the start of a run.
        shards: the folder of that checkpoint if its tensors lie there in shares: those of `saved`
            have names, shapes and types alone.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        config: TrainingConfig,
        accelerator: Accelerator,
        saved: Mapping[str, Tensors] | None,
        shards: Path | None,
    ) -> None:
        super().__init__(name, network, config, accelerator, None)
        if saved is not None:
            self._restore(saved, shards)

    def _build(self, config: TrainingConfig, saved: Mapping[str, Tensors] | None) -> None:
        # Beside the shares one module without weights, which are filled in when it is used.
        module, accelerator = self.module, self._accelerator
        empty = {id(own): _without_memory(own) for own in module.parameters()}
        self._plain = copy.deepcopy(module, empty).to(accelerator.device).eval()
        found = [*blocks(module)]
        self._change_blocks(config)
        mesh = sharing_mesh(accelerator)
        policy = MixedPrecisionPolicy()
        if accelerator.mixed_precision == "bf16":
            # Autocast converts the inputs, but not rotary angles.
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
            module.forward = convert_outputs_to_fp32(accelerator.autocast()(module.forward))
        module.to(accelerator.device)
        # Not by Accelerate, which has one policy for all: code vectors and heads stay in float32.
        for block in found:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self.prepared = fully_shard(module, mesh=mesh)
        self._optimizer = make_optimizer(self.network)
        self._prepared_optimizer = accelerator.prepare_optimizer(self._optimizer)
        decay = self.network.ema_decay
        self._local = _LocalState(module)
        self._shard_ema = ModelEmaV3(self._local, decay=decay, use_warmup=True) if decay else None

    def _restore(self, saved: Mapping[str, Tensors], shards: Path | None) -> None:
        """Fills weights, EMA and moments with those of a checkpoint."""
        for group in self._optimizer.param_groups:
            for name, weight in zip(group["param_names"], group["params"], strict=True):
                for quantity, tensor in _quantities(saved[f"{self.name}_optimizer"], name).items():
                    is_alike = tensor.shape == weight.shape
                    self._optimizer.state[weight][quantity] = (
                        torch.zeros_like(weight.detach())
                        if is_alike
                        else torch.zeros(tensor.shape, dtype=tensor.dtype, device=weight.device)
                    )
        state = self.state()
        for part, targets in state.items():
            added = self.network.added if part == self.name and shards is None else {}
            tensors = {**added, **saved[part]}
            check_weights(targets, tensors, f"run_dir: the checkpoint of {part}")
            if shards is None:
                for name, target in targets.items():
                    _fill(target, tensors[name])
        if shards is not None:
            read_shards(shards, state)

    @contextlib.contextmanager
    def in_use(self, *, is_changed: bool = False) -> Iterator[nn.Module]:
        """The EMA, if there is one, or the weights; whole on every process until the end."""
        values = self._values()
        with torch.no_grad():
            for name, tensor in self._plain.state_dict(keep_vars=True).items():
                _take(tensor, gathered(values[name]))
        try:
            yield self._plain
            if is_changed:
                with torch.no_grad():
                    for name, tensor in self._plain.state_dict().items():
                        _fill(values[name], tensor)
        finally:
            for parameter in self._plain.parameters():
                parameter.data = parameter.data.new_empty(0)

    def copy_for_saving(self) -> nn.Module | None:
        """The model in use on the CPU of the main process, None on others; gathers by tensors."""
        is_main = self._accelerator.is_main_process
        module = copy.deepcopy(self._plain).cpu() if is_main else None
        targets = module.state_dict(keep_vars=True) if module is not None else {}
        with torch.no_grad():
            for name, value in self._values().items():
                whole = gathered(value)
                if name in targets:
                    _take(targets[name], whole.to("cpu", copy=True))
        return module

    def _values(self) -> dict[str, Tensor]:
        """By name, what is in use, in shares."""
        state = self.module.state_dict()
        if self._shard_ema is None:
            return state
        ema: Any = self._shard_ema.module
        return ema.like(state)  # type: ignore[no-any-return]

    def set_gradient(self, is_needed: bool) -> None:
        """Has the parameters take gradients, or not."""
        # What is still whole after a forward without a backward would neither take this over, nor
        # the next step of the optimizer.
        assert isinstance(self.module, FSDPModule)
        self.module.reshard()
        super().set_gradient(is_needed)

    def update_ema(self, num_steps: int) -> None:
        """Moves the EMA after so many steps."""
        if self._shard_ema is not None:
            self._shard_ema.update(self._local, step=num_steps)

    def state(self) -> dict[str, Tensors]:
        """Weights, EMA and optimizer, in shares, under the names of the parts of a checkpoint."""
        ema = {} if self._shard_ema is None else {f"{self.name}_ema": self._values()}
        optimizer = {f"{self.name}_optimizer": optimizer_tensors(self._optimizer)}
        return {self.name: self.module.state_dict(), **ema, **optimizer}


def _as_share(own: Tensor, whole: Tensor) -> Tensor:
    if not isinstance(whole, DTensor):
        return own
    mesh, placements = whole.device_mesh, whole.placements
    return DTensor.from_local(
        own.detach(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _fill(target: Tensor, whole: Tensor) -> None:
    """Copies the share of this process out of the whole, which all processes have."""
    if isinstance(target, DTensor):
        given = whole.to(target.device)
        mesh, placements = target.device_mesh, target.placements
        whole = distribute_tensor(given, mesh, placements, src_data_rank=None).to_local()
    local(target).copy_(whole)


def _take(target: Tensor, whole: Tensor) -> None:
    if isinstance(target, nn.Parameter):
        target.data = whole
    else:
        target.copy_(whole)


def _without_memory(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().new_empty(0), parameter.requires_grad)


def _quantities(tensors: Tensors, parameter: str) -> Tensors:
    """What an optimizer keeps of one parameter."""
    keys = {key: key.rsplit(".", 1) for key in tensors}
    return {own[1]: tensors[key] for key, own in keys.items() if own[0] == parameter}
