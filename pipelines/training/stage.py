"""What the training loop has to know: a stage names its networks and computes their losses."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from accelerate import Accelerator
from PIL import Image
from torch import nn

from pipelines.run.log import Metrics
from pipelines.training.losses.base import Loss
from pipelines.training.optimizer import Network

LoadedT = TypeVar("LoadedT")
BatchT = TypeVar("BatchT")


@runtime_checkable
class Stage(Protocol[LoadedT, BatchT]):
    """A training task, generic in what is loaded on the host and in the batch made of it.

    A class that derives from it may leave out `initialize`, `before_step`, `after_step`, `finish`.
    """

    num_items: int
    """Training items."""
    sources: Mapping[str, str]
    """Hashes of what the run learns from, by name; they must not change in its course."""
    networks: Mapping[str, Network]
    """What is trained, by name."""
    main_network: str
    """Name of the network that people will use, a `PretrainedModule`: it is saved in `model/`."""

    description: str = ""
    """What it learns from, for people."""
    smaller_preset: str = ""
    """That a CPU does sooner; empty where none is known."""

    is_scattered: bool = False
    """Whether the order of the items is `BatchOrder.scattered()`: there may be very many."""
    sees_whole_batch: bool = False
    """Whether `before_step` is called: all micro-batches of a step then lie in memory at once."""

    def initialize(self) -> None:
        """Prepares fresh weights; called once, before the first step of a new run."""
        return

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> LoadedT:
        """What the host knows of these training items; runs in a thread of its own, one ahead."""

    def prepare(self, batch: LoadedT) -> BatchT:
        """The micro-batch, from what was loaded and has been copied to the device."""

    def before_step(
        self, modules: Mapping[str, nn.Module], batches: Sequence[BatchT], step: int
    ) -> None:
        """Sees all micro-batches of a step first; only called if `sees_whole_batch` is set."""
        return

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: BatchT, step: int) -> Loss:
        """The loss of network `name`; called for each network of a micro-batch, in their order.

        Args:
            name: of the network to train.
            modules: all networks. The one to train is to be called through its forward alone; the
                parameters of the others have no gradient meanwhile.
            batch: from `prepare`.
            step: from 0.
        """

    def after_step(self, accelerator: Accelerator) -> None:
        """What has to follow an optimizer step: the baselines' codebooks."""
        return

    def finish(self, model: nn.Module) -> None:
        """What has to follow the last step, done to the model in use; on all processes alike."""
        return

    def validate(self, model: nn.Module, accelerator: Accelerator) -> Metrics:
        """Metrics of the main network over the validation items, shared by all processes."""

    def preview(self, model: nn.Module) -> Image.Image:
        """A grid for people; called on the main process alone."""
