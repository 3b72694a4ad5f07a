"""Ctrl-C and SIGTERM: the step under way is finished and saved, on all processes the same one."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether a run has been asked to stop."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.is_noted = False
        """Whether this process got a signal."""
        self.is_alone = accelerator.num_processes == 1
        self._is_main = accelerator.is_main_process
        # The flags meet on the CPUs, so that no process has to wait for its GPU. Where the usual
        # group does so, there is no other: a process that dies meanwhile would be awaited for long.
        self._group: distributed.ProcessGroup | None = None
        if not self.is_alone and distributed.get_backend() != "gloo":
            group = distributed.new_group(backend="gloo")
            assert isinstance(group, distributed.ProcessGroup)
            self._group = group

    def is_agreed(self) -> bool:
        """Whether any process got a signal; all processes ask together, and get one answer."""
        if self.is_alone:
            return self.is_noted
        is_noted = torch.tensor(int(self.is_noted))
        distributed.all_reduce(is_noted, distributed.ReduceOp.MAX, self._group)
        return bool(is_noted)

    def note(self, number: int, frame: object) -> None:
        """A signal handler: a second signal stops at once.

        Not so among several processes, where a launcher passes on what the terminal has sent to
        all of them already.
        """
        if self.is_noted and self.is_alone:
            raise KeyboardInterrupt("stopped at once; run the same command to go on")
        self.is_noted = True
        if self._is_main:
            print("\nstopping after this step", file=sys.stderr, flush=True)


@contextmanager
def noted_signals(accelerator: Accelerator) -> Iterator[Stop]:
    """Notes Ctrl-C and SIGTERM in place of obeying them."""
    stop = Stop(accelerator)
    previous = {number: signal.signal(number, stop.note) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
