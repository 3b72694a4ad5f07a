"""What a run leaves on the disk: the state for resuming, and the model for use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from pipelines.processes import is_lost_partner
from pipelines.run.checkpoints import Tensors, TrainingState, save_state
from pipelines.training.divergence import NonFiniteWatch
from pipelines.training.networks import TrainedNetwork
from pipelines.training.sharding import is_sharding
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import PretrainedModule

if TYPE_CHECKING:
    from pipelines.run.background import BackgroundWriter


class Saver:
    """Saves the networks of a run, all processes together; sharded ones in the background.

    Args:
        accelerator: the processes.
        output_dir: of the run.
        networks: all of them.
        main: the one whose model people will use.
        watch: looks at what is to be saved.
        sources: hashes of what the run learns from.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        networks: Sequence[TrainedNetwork],
        main: TrainedNetwork,
        watch: NonFiniteWatch,
        sources: Mapping[str, str],
    ) -> None:
        self._accelerator = accelerator
        self._output_dir = output_dir
        self._networks = networks
        self._main = main
        self._watch = watch
        self._sources = sources
        self._writer: BackgroundWriter | None = None
        if is_sharding(accelerator):
            from pipelines.run import background  # takes a second

            self._writer = background.BackgroundWriter(accelerator, output_dir / "state")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or not is_lost_partner(error):
            self.wait()

    @property
    def has_failed(self) -> bool:
        """Whether what was started could not be written."""
        return self._writer is not None and self._writer.has_failed

    def wait(self) -> None:
        """Returns when all is on the disk.

        Raises:
            OSError: it could not be written; the checkpoint before it is whole.
        """
        if self._writer is not None:
            self._writer.wait()

    def save(self, step: int, metrics_hash: str) -> None:
        """The state for resuming, and the model for use.

        Raises:
            DivergenceError: a number is not finite.
            OSError: it, or the one before it, could not be written.
        """
        tensors: dict[str, Tensors] = {}
        for network in self._networks:
            tensors |= network.state()
        state = TrainingState(step, tensors, self._sources, metrics_hash)
        self._watch.check_state(state)
        folder = self._output_dir / "model"
        # The state last: a run that was killed in between saves the model once more.
        if self._writer is not None:
            self._writer.wait()  # before anything is copied
            copied = self._main.copy_for_saving()

            def save_model() -> None:
                assert isinstance(copied, PretrainedModule)
                copied.save_pretrained(folder)

            self._writer.start(state, save_model)
            return
        with self._main.in_use() as model:
            if self._accelerator.is_main_process:
                assert isinstance(model, PretrainedModule)
                model.save_pretrained(folder)
                save_state(self._output_dir / "state", state)
        self._accelerator.wait_for_everyone()

    def repair_model(self) -> None:
        """Saves the model of a finished run again if what is there is damaged, or of other weights.

        Otherwise it is left as it is: an earlier version may have written it.
        """
        folder = self._output_dir / "model"
        with self._main.in_use() as model:
            assert isinstance(model, PretrainedModule)
            if self._accelerator.is_main_process and not _holds(folder, model):
                model.save_pretrained(folder)


def _holds(folder: Path, model: PretrainedModule[Any]) -> bool:
    try:
        saved = type(model).from_pretrained(folder).state_dict()
    except InputError:
        return False
    weights = model.state_dict()
    return saved.keys() == weights.keys() and all(
        torch.equal(tensor, weights[name].cpu()) for name, tensor in saved.items()
    )
