"""Model folders from strangers: each crafted one is refused, without memory, time or a pickle."""

import os
import resource
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prior import Prior
from tests.faults.configuration import small_pipeline
from tests.faults.crafted import MARKER, Craft, Crafted, choose
from tests.faults.crafted_configs import backbone, config_field, config_sizes, config_text
from tests.faults.crafted_weights import (
    damage,
    header_entry,
    header_length,
    header_text,
    other_weights,
    pickles,
)
from tests.faults.tally import Tally
from tokenizer import InputError, Tokenizer

NUM_TRIALS = 500
MEMORY = 2**29
"""Bytes of address space that a trial may take beyond what the process has already."""
SECONDS = 20
"""Processor time of a trial."""
LONGEST_MESSAGE = 2_500
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect")


CRAFTS: tuple[Craft, ...] = (
    header_length,
    header_entry,
    header_text,
    other_weights,
    config_field,
    config_sizes,
    config_text,
    backbone,
    pickles,
    damage,
)


def load(folder: Path) -> str:
    """What becomes of loading a folder; run in a process of its own."""
    events: list[str] = []
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FORBIDDEN or (event == "import" and "evil" in str(arguments[0])):
            events.append(f"{event} {arguments}")

    sys.addaudithook(note)
    try:
        Tokenizer.from_pretrained(folder / "tokenizer")
        Prior.from_pretrained(folder / "prior")
        outcome = "loaded"
    except InputError as error:
        outcome = f"refused: {error}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    return f"{events[0]} after {outcome}" if events else outcome


def in_child(function: Callable[[Path], str], folder: Path) -> str:
    """Runs a function in a fork of this process, whose limits end with it."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # torch has threads, of which the child needs none.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            os.write(writing, function(folder).encode(errors="replace")[:60_000])
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return outcome or f"ended with status {status}"


def judge(outcome: str, crafted: Crafted) -> str:
    """What is wrong with an outcome; nothing if it is as promised."""
    if outcome == "loaded":
        return "" if crafted.is_valid else "loaded"
    if not outcome.startswith("refused: "):
        return outcome[:500]
    if len(outcome) > LONGEST_MESSAGE or not outcome.isprintable():
        return f"not a printable line of at most {LONGEST_MESSAGE}: {outcome[:200]!r}"
    return ""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Loads crafted copies of a small pipeline."""
    notes = []
    small_pipeline().save_pretrained(folder / "sound")
    outcome = in_child(load, folder / "sound")
    assert outcome == "loaded", outcome
    for number in range(num_trials):
        generator = np.random.default_rng([seed, number])
        copy = folder / "copy"
        shutil.copytree(folder / "sound", copy)
        craft = CRAFTS[number % len(CRAFTS)]
        crafted = craft(generator, copy / choose(generator, ["tokenizer", "prior"]))
        problem = judge(in_child(load, copy), crafted)
        if (copy / MARKER).exists():
            problem = "a pickle was executed"
        if problem:
            notes.append(f"{number}: {craft.__name__}, {crafted.description}: {problem}")
        shutil.rmtree(copy)
    return Tally(num_trials, num_trials - len(notes), len(notes), notes)
