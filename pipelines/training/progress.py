"""What a run tells people: what it does, how long that will take, how far it is."""

import contextlib
import logging
import sys
import time

import torch
from accelerate import Accelerator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from pipelines.config import TrainingConfig
from pipelines.presets import describe_time

logger = logging.getLogger(__name__)

DAY = 86_400
NUM_TIMED = 3
MAX_TIMED_SECONDS = 5.0
"""The estimate comes after so many steps, or after the first that ends later than this."""


class Progress:
    """A bar in a terminal, otherwise a line from time to time; of the main process alone.

    Args:
        config: of the loop.
        accelerator: its processes.
        first_step: from which it goes on.
        description: of what it learns from.
        smaller_preset: that a CPU does sooner; empty where none is known.
        num_parameters: that are trained.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        first_step: int,
        description: str,
        smaller_preset: str,
        num_parameters: int,
    ) -> None:
        self.config = config
        self._smaller_preset = smaller_preset
        self._is_main = accelerator.is_main_process
        self._device: torch.device = accelerator.device
        # A bar is drawn over itself, which a file or a pipe would keep line by line.
        self._has_bar = self._is_main and sys.stdout.isatty() and sys.stderr.isatty()
        self._bar = tqdm(
            total=config.total_steps * config.batch_size,
            initial=first_step * config.batch_size,
            unit="image",
            unit_scale=True,
            disable=not self._has_bar,
        )
        self._above_bar = logging_redirect_tqdm() if self._has_bar else contextlib.nullcontext()
        self._seconds: list[float] = []
        self._last_line = 0.0
        self._is_timed = first_step >= config.total_steps
        if self._is_main and not self._is_timed:
            number = accelerator.num_processes
            processes = f"{number} processes" if number > 1 else "one process"
            going_on = f", from step {first_step:,}" if first_step else ""
            logger.info("%s, %s, %s", self._device_words(), config.precision, processes)
            if description:
                logger.info("%s", description)
            logger.info(
                "%s parameters, %s steps of %s images%s",
                f"{num_parameters:,}",
                f"{config.total_steps:,}",
                f"{config.batch_size:,}",
                going_on,
            )
        self._started = time.perf_counter()

    def _device_words(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        threads = torch.get_num_threads()
        return f"{self._device.type} with {threads} thread{'s' if threads > 1 else ''}"

    def __enter__(self) -> "Progress":
        self._above_bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._above_bar.__exit__(None, None, None)
        self._bar.close()

    def note_step(self, finished: int) -> None:
        """Counts a step, and tells the time that all of them will take once it is known."""
        self._bar.update(self.config.batch_size)
        if self._is_timed:
            return
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)  # for these few steps
        now = time.perf_counter()
        self._seconds.append(now - self._started)
        self._started = now
        if len(self._seconds) == NUM_TIMED or sum(self._seconds) > MAX_TIMED_SECONDS:
            self._is_timed = True
            if self._is_main:
                self._tell_time(min(self._seconds), self.config.total_steps - finished)

    def _tell_time(self, seconds: float, num_left: int) -> None:
        left = seconds * num_left
        logger.info("a step takes %.3g s: %s to go", seconds, describe_time(left))
        if left > DAY:
            smaller = ""
            if self._device.type == "cpu" and self._smaller_preset:
                smaller = f"; the preset {self._smaller_preset} is made for a CPU"
            logger.warning(
                "that is over a day, in which this machine does %s steps (training.total-steps)%s",
                f"{round(DAY / seconds):,}",
                smaller,
            )

    def tell(self, finished: int, loss: float, images_per_second: float) -> None:
        """How far the run is."""
        self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        now = time.perf_counter()
        is_due = now - self._last_line > 1.0 or finished == self.config.total_steps
        if self._is_main and not self._has_bar and is_due:
            self._last_line = now
            left = (self.config.total_steps - finished) * self.config.batch_size
            logger.info(
                "step %s of %s: loss %.4g, %.4g images/s, %s to go",
                f"{finished:,}",
                f"{self.config.total_steps:,}",
                loss,
                images_per_second,
                describe_time(left / images_per_second),
            )
