"""Checkpoints in shares, written while training goes on."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from torch import distributed

from pipelines.run.checkpoints import TrainingState, begin_state, publish_state
from pipelines.run.shards import staged, write_shards

logger = logging.getLogger(__name__)

NUM_ATTEMPTS = 3
PAUSE = 5.0
"""Seconds before what could not be written is tried again."""


class BackgroundWriter:
    """Writes one state after the other in a thread; never holds more than one copy.

    Args:
        accelerator: the processes, each of which has such a writer.
        folder: holds the states.
    """

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._is_main = accelerator.is_main_process
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        # Of its own: what the threads tell each other must not meet what the steps do.
        group = distributed.new_group(backend="gloo")
        assert isinstance(group, distributed.ProcessGroup)
        self._group = group

    @property
    def has_failed(self) -> bool:
        """Whether a state could not be written; `wait` then says why."""
        return self._error is not None

    def start(self, state: TrainingState, save_model: Callable[[], None]) -> None:
        """Waits for the state before, copies this one and writes it.

        Args:
            state: in shares; may change as soon as this returns.
            save_model: called first, on the main process.

        Raises:
            OSError: as `wait`.
        """
        self.wait()
        copied = state._replace(tensors=staged(state.tensors))
        self._thread = threading.Thread(
            target=self._write, args=(copied, save_model), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last state is on the disk.

        Raises:
            OSError: it could not be written; the one before it is whole. On all processes.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            raise self._error

    def _write(self, state: TrainingState, save_model: Callable[[], None]) -> None:
        try:
            for attempt in range(1, NUM_ATTEMPTS + 1):
                try:
                    self._on_main(save_model)
                    self._on_main(lambda: begin_state(self._folder, state.step))
                    temporary = self._folder / f".step_{state.step:08d}.tmp"
                    write_shards(temporary, state.tensors, self._group)
                    self._on_main(lambda: publish_state(self._folder, state, is_sharded=True))
                    return
                except OSError as error:
                    if attempt == NUM_ATTEMPTS:
                        raise
                    if self._is_main:
                        logger.warning("%s; writing the checkpoint once more", error)
                    time.sleep(PAUSE)
        except Exception as error:
            self._error = error

    def _on_main(self, action: Callable[[], object]) -> None:
        """Has the main process do something, and the others wait and fail as it fails."""
        failure: list[OSError | None] = [None]
        if self._is_main:
            try:
                action()
            except OSError as error:
                failure[0] = error
        distributed.broadcast_object_list(failure, 0, self._group)
        if failure[0] is not None:
            raise failure[0]
