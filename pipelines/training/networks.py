"""The networks of a run while they are trained, and their part of its state."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from pipelines.config import TrainingConfig
from pipelines.processes import gathered
from pipelines.run.checkpoints import Tensors, TrainingState
from pipelines.training.blocks import compile_blocks, recompute_blocks
from pipelines.training.optimizer import (
    Network,
    make_optimizer,
    optimizer_tensors,
    parameter_groups,
    restore_optimizer,
    set_learning_rate,
)
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule, load_weights

COMPILER = "inductor"
"""Backend of torch.compile."""


class TrainedNetwork:
    """A network with its optimizer and its EMA, ready for steps.

    Args:
        name: of the network.
        network: what is trained, and how.
        config: where the weights lie, and whether they are compiled.
        accelerator: the processes of the run.
        saved: what `state` gave; None at the start of a run.
    """

    def __init__(
        self,
        name: str,
        network: Network,
        config: TrainingConfig,
        accelerator: Accelerator,
        saved: Mapping[str, Tensors] | None,
    ) -> None:
        self.name = name
        self.module = network.module
        self.network = network
        self._accelerator = accelerator
        self._build(config, saved)
        self._clipped = network.clipped()
        self.parameters = [
            parameter for parameter in self.module.parameters() if parameter.requires_grad
        ]

    def _build(self, config: TrainingConfig, saved: Mapping[str, Tensors] | None) -> None:
        network, name, accelerator = self.network, self.name, self._accelerator
        if saved is not None:
            tensors = {**network.added, **saved[name]}
            load_weights(self.module, tensors, f"run_dir: the checkpoint of {name}")
        self.module.to(accelerator.device)
        if config.channels_last:
            self.module.to(memory_format=torch.channels_last)
        decay = network.ema_decay
        self._ema = ModelEmaV3(self.module, decay=decay, use_warmup=True) if decay else None
        self._optimizer = make_optimizer(network)
        if saved is not None:
            restore_optimizer(self._optimizer, saved[f"{name}_optimizer"])
            if self._ema is not None:
                self._ema.module.load_state_dict(saved[f"{name}_ema"])
        if config.compile and not config.activation_checkpointing:
            self.module.compile(backend=COMPILER)
        else:
            self._change_blocks(config)
        self.prepared, self._prepared_optimizer = accelerator.prepare(self.module, self._optimizer)

    def _change_blocks(self, config: TrainingConfig) -> None:
        """As the config says; copies that are made before stay as they are."""
        if config.compile:
            compile_blocks(self.module, COMPILER)
        if config.activation_checkpointing:
            recompute_blocks(self.module)

    @contextlib.contextmanager
    def in_use(self, *, is_changed: bool = False) -> Iterator[nn.Module]:
        """The EMA, if the network has one, or the module; all processes ask for it together.

        Args:
            is_changed: whether its weights are changed meanwhile.
        """
        yield self.module if self._ema is None else self._ema.module

    def copy_for_saving(self) -> nn.Module | None:
        """The model in use on the CPU of the main process, None on others; in sharded runs."""
        raise NotImplementedError

    def set_gradient(self, is_needed: bool) -> None:
        """Has the parameters take gradients, or not."""
        for parameter in self.parameters:
            parameter.requires_grad_(is_needed)

    def set_learning_rate(self, step: int) -> None:
        """To that of a step."""
        set_learning_rate(self._optimizer, self.network.learning_rate(step))

    def follow_gradient(self, minimized: Tensor) -> Tensor:
        """Backward, and after the last micro-batch of a step the optimizer.

        Returns:
            The gradient's norm, without parameters apart; 0 before the last micro-batch.
        """
        self._accelerator.backward(minimized)
        norm = torch.zeros((), device=self._accelerator.device)
        if self._accelerator.sync_gradients:
            max_norm = self.network.max_gradient_norm
            norm, *_ = [self._accelerator.clip_grad_norm_(own, max_norm) for own in self._clipped]
            norm = gathered(norm)
        self._prepared_optimizer.step()
        self._prepared_optimizer.zero_grad()
        return norm

    def update_ema(self, num_steps: int) -> None:
        """Moves the EMA after so many steps."""
        if self._ema is not None:
            self._ema.update(self.module, step=num_steps)

    def state(self) -> dict[str, Tensors]:
        """Weights, EMA and optimizer under the names of the files of a checkpoint."""
        ema = {} if self._ema is None else {f"{self.name}_ema": self._ema.module.state_dict()}
        optimizer = {f"{self.name}_optimizer": optimizer_tensors(self._optimizer)}
        return {self.name: self.module.state_dict(), **ema, **optimizer}


@contextlib.contextmanager
def without_gradient(networks: Iterable[TrainedNetwork]) -> Iterator[None]:
    """Turns gradients off for the parameters of some networks."""
    networks = list(networks)
    for network in networks:
        network.set_gradient(False)
    try:
        yield
    finally:
        for network in networks:
            network.set_gradient(True)


def saved_networks(
    state: TrainingState, networks: Mapping[str, Network], main: str
) -> Mapping[str, Tensors]:
    """The tensors of a state by today's names.

    Raises:
        InputError: they are of other networks.
    """
    tensors = state.tensors if state.format > 1 else _of_version_1(state.tensors, networks, main)
    wanted = {
        f"{name}{part}"
        for name, network in networks.items()
        for part in ("", "_optimizer", *(["_ema"] if network.ema_decay else []))
    }
    if tensors.keys() != wanted:
        raise InputError(
            f"run_dir: the checkpoint of step {state.step} holds {', '.join(sorted(tensors))}, "
            f"the run trains {', '.join(sorted(wanted))}; give another run-dir"
        )
    return tensors


def _of_version_1(
    tensors: Mapping[str, Tensors], networks: Mapping[str, Network], main: str
) -> dict[str, Tensors]:
    """Format 1 had one network, and its optimizer knew the parameters by number."""
    model = networks[main].module
    assert isinstance(model, PretrainedModule)
    groups = parameter_groups(networks[main], model.parameter_order_of_version_1())
    names = [name for group in groups.values() for name in group]
    optimizer = {}
    for key, tensor in tensors["optimizer"].items():
        number, quantity = key.split(".")
        optimizer[f"{names[int(number)]}.{quantity}"] = tensor
    upgraded: dict[str, Tensors] = {f"{main}_optimizer": optimizer}
    for part, name in (("model", main), ("ema", f"{main}_ema")):
        if tensors[part]:  # without an EMA the file is empty
            upgraded[name] = model.upgrade_weights(dict(tensors[part]), 1)
    return upgraded
