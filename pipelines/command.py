"""What all commands share: how they end, and what they say of errors."""

import contextlib
import errno
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

import torch
from accelerate import PartialState
from pydantic import ValidationError

from pipelines.options import fail
from pipelines.processes import CommonInputError, is_lost_partner
from pipelines.training.divergence import DivergenceError
from tokenizer.storage.configs import describe_validation_error
from tokenizer.storage.errors import InputError

TRAINING_MEMORY = (
    "raise training.gradient-accumulation-steps, which may differ when a run goes on, or lower "
    "training.batch-size in a new run-dir"
)
"""What saves memory in both stages: all work beside the steps is cut by the same numbers."""

MAKE_ROOM = "make room there and run the same command again"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# There is no class for these: torch's CPU allocator, C++, CUDA's libraries, the system, oneDNN.
_NO_MEMORY = re.compile(
    r"out of memory|can(no|')t (allocate memory|start new thread)|bad_alloc|ALLOC_FAILED|"
    r"not create a primitive$",
    re.IGNORECASE,
)


def run_command(
    main: Callable[[], None], saves_memory: str = "use a machine with more of it"
) -> NoReturn:
    """Runs a command; an expected error becomes one line on stderr and exit status 2.

    A traceback means a bug. SIGTERM stops a command as Ctrl-C does. `saves_memory` says what to
    change where memory runs out.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("torch", "accelerate", "matplotlib", "PIL"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with contextlib.suppress(BrokenPipeError), _sigterm_like_ctrl_c(), _no_disk_errors_of_threads():
        try:
            with _lack_of_memory(saves_memory):
                main()
        except ValidationError as error:
            fail(describe_validation_error(error))
        except (InputError, DivergenceError) as error:
            if isinstance(error, CommonInputError) and os.environ.get("RANK", "0") != "0":
                time.sleep(1)  # a launcher ends all as soon as one ends
                raise SystemExit(2) from None
            fail(str(error))
        except OSError as error:
            name = error.filename2 or error.filename  # of a renaming, where it should have led
            named = f"{name}: " if name else ""
            way_on = f"; {MAKE_ROOM}" if error.errno in _NO_SPACE else ""
            fail(f"{named}{error.strerror or error}{way_on}")
        except RuntimeError as error:
            if not is_lost_partner(error):
                raise
            fail(
                "another process of this run has ended, or is silent; its own message says why; "
                "run the same command to go on"
            )
        except KeyboardInterrupt as error:
            if os.environ.get("RANK", "0") == "0":
                print(str(error) or "stopped; run the same command again", file=sys.stderr)
            raise SystemExit(130) from None
        PartialState().destroy_process_group()
    raise SystemExit(0)


@contextlib.contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _lack_of_memory(advice: str) -> Iterator[None]:
    """Turns the many errors that mean it into one; what is on disk is whole, as after a kill."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        text = str(error)
        kinds = (MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, kinds) and not _NO_MEMORY.search(text):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", text, re.I)
        reason = asked.group().replace("Tried", "tried") if asked else text.split("\n")[0]
        reason = f" ({reason})" if reason else ""
        raise InputError(f"out of memory{reason}: {advice}") from error


@contextlib.contextmanager
def _no_disk_errors_of_threads() -> Iterator[None]:
    """TensorBoard raises what fails in its thread once more in the main one."""
    previous = threading.excepthook

    def report(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            previous(failed)

    threading.excepthook = report
    try:
        yield
    finally:
        threading.excepthook = previous


def announce(message: str) -> None:
    """A line for the user, from the main process."""
    if PartialState().is_main_process:
        print(message)
