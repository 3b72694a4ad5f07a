"""A folder of fuzzed files: none may crash, hang or exhaust what reads it.

Every file is decoded by a process that reports before and after each. Then training's loader
reads the whole folder, and `check_data` must have said of every file what the loader did.
"""

import json
import queue
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

from pipelines.check_data import CheckDataConfig, check_data
from pipelines.config import DataConfig
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.folder_scan import printable
from pipelines.data.sources import load_images
from tests.faults.fuzzed_files import originals, write
from tests.faults.tally import Tally

NUM_TRIALS = 1_000
IMAGE_SIZE = 16
MOST_SECONDS = 60.0
"""Processor time for one file; the largest image that is allowed takes a third of it."""
MOST_MEMORY = 2 * 2**30
"""Growth of the reader's peak over the whole folder, in bytes."""
PATIENCE = 600.0
"""Seconds of silence until the reader counts as hanging, on a busy machine."""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Writes the files and reads them in all ways."""
    files, held_out = folder / "files", folder / "held_out"
    for path in (files, held_out):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    sound = originals()
    paths = [write(files, number, seed, sound) for number in range(num_trials)]
    # Certainly sound: a folder without any readable image is refused as a whole.
    for path in (files, held_out):
        (path / "sound.png").write_bytes(sound["PNG RGB"][1])
    losses = _decode_apart([path for path in paths if not path.is_dir()])
    if not losses:  # what a single file does to its reader, it would do to the loader
        losses = _compare(folder, files, held_out)
    notes = [f"{printable(name)}: {complaint}" for name, complaint in sorted(losses.items())]
    num_lost = min(len(losses), num_trials)
    return Tally(num_trials, num_trials - num_lost, num_lost, notes)


def _decode_apart(paths: list[Path]) -> dict[str, str]:
    """Has another process decode each file, and a new one where it ends; complaints by name."""
    losses: dict[str, str] = {}
    done = 0
    while done < len(paths):
        reader = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.data"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        with reader, reader.stdin, reader.stdout:
            reader.stdin.write(json.dumps([str(path) for path in paths[done:]]))
            reader.stdin.close()
            lines: queue.Queue[str] = queue.Queue()
            threading.Thread(target=_forward, args=(reader.stdout, lines), daemon=True).start()
            while done < len(paths):
                try:
                    line = lines.get(timeout=PATIENCE)
                except queue.Empty:
                    reader.kill()
                    line = ""
                if not line:
                    losses[paths[done].name] = f"hangs, or ends the reader ({reader.wait()})"
                    done += 1
                    break
                complaint = json.loads(line)
                if complaint:
                    losses[paths[done].name] = complaint
                done += 1
    return losses


def _forward(file: IO[str], lines: "queue.Queue[str]") -> None:
    for line in file:
        lines.put(line)
    lines.put("")


def _read_all() -> None:
    """The other process: a line for each file, empty JSON text where all is well."""
    paths = [Path(name) for name in json.load(sys.stdin)]
    first_peak = _peak_memory()
    for path in paths:
        started = time.process_time()
        complaint = ""
        try:
            pixels = decode_image(path, IMAGE_SIZE, 3).pixels
            if pixels.shape != (IMAGE_SIZE, IMAGE_SIZE, 3):
                complaint = f"has shape {pixels.shape}"
        except UnreadableImageError as error:
            if not str(error) or "\n" in str(error):
                complaint = f"is refused without a reason in one line: {error}"
        except Exception as error:  # each is a failure to be counted
            complaint = f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        if seconds > MOST_SECONDS:
            complaint = f"takes {seconds:.0f} seconds"
        if _peak_memory() - first_peak > MOST_MEMORY:
            complaint = "brings the memory beyond its bound"
        print(json.dumps(complaint), flush=True)


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _compare(folder: Path, files: Path, held_out: Path) -> dict[str, str]:
    """Whether the loader leaves out what `check_data` says, and for the same reasons."""
    cache_dir = folder / "cache"
    config = DataConfig(
        dataset="folder",
        root=files,
        validation_root=held_out,
        image_size=IMAGE_SIZE,
        skip_unreadable=True,
        cache_dir=cache_dir,
    )
    dataset = load_images(config, "train")
    report = check_data(CheckDataConfig(folder=files, image_size=IMAGE_SIZE, skip_unreadable=True))
    counts = report.num_files
    start = "is not a readable image: "
    said = {
        f"{printable(problem.file)}: {problem.reason.removeprefix(start)}"
        for problem in report.problems
        if problem.treatment == "skipped" and problem.reason.startswith(start)
    }
    (facts,) = cache_dir.glob("folder-train-*/facts.json")
    done = set(json.loads(facts.read_text())["unreadable"])
    shutil.rmtree(cache_dir)
    losses = {line: "is treated in two ways" for line in said ^ done}
    if counts["used"] + counts["converted"] != len(dataset):
        losses["counts"] = f"{counts}, but {len(dataset)} are loaded"
    num_files = sum(not path.is_dir() for path in files.iterdir())
    if sum(counts.values()) != num_files:
        losses["sum"] = f"{counts} of {num_files} files"
    return losses


if __name__ == "__main__":
    _read_all()
