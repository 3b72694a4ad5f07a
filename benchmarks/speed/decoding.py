"""Images that are decoded each time: images/s beside torchvision, and how long training waits.

    python -m benchmarks.speed.decoding FOLDER [RESULTS]

writes `RESULTS/decoding_cpu.json`. FOLDER holds images, a folder for each class. Both sides read
the same images in one process, in turn; processor time, so that other programs count less. The
larger images are those of FOLDER, enlarged. Training is of the preset `images128-small` on one
thread, with two worker processes.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.machine import origin
from pipelines.config import DataConfig
from pipelines.data.batches import BatchOrder
from pipelines.data.encoded_images import EncodedImages
from pipelines.data.files import open_files
from pipelines.prefetch import one_ahead
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.training import loop
from pipelines.training.loading import loading
from pipelines.training.tokenizer_stage import TokenizerStage
from tokenizer.storage.files import replace_file

RESULTS = Path(__file__).parents[1] / "results"
PRESET = "images128-small"
SIZE = 128
LARGE_SIDE = 512
BATCH = 50
NUM_IMAGES = 500
ROUNDS = 11
STEPS = 100


class Reader:
    """What `loading` asks a stage for."""

    is_scattered = True

    def __init__(self, encoded: EncodedImages) -> None:
        self.encoded = encoded

    def load(self, items: Any, is_flipped: Any) -> Any:
        """Not called: its images are encoded."""
        raise NotImplementedError

    def loaded(self, images: torch.Tensor, is_flipped: Any) -> torch.Tensor:
        """The images."""
        return images


def copy_images(source: Path, target: Path, side: int | None) -> None:
    """Some of the images of each class; enlarged to `side`, if it is given."""
    folders = [path for path in sorted(source.iterdir()) if path.is_dir()]
    for folder in folders:
        (target / folder.name).mkdir(parents=True)
        for path in sorted(folder.iterdir())[: NUM_IMAGES // len(folders)]:
            if side is None:
                (target / folder.name / path.name).write_bytes(path.read_bytes())
                continue
            with Image.open(path) as image:
                large = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
                large.save(target / folder.name / path.name, quality=90)


def opened(root: Path, cache_dir: Path, **reading: Any) -> DataConfig:
    """The folder, decoded each time."""
    return DataConfig.model_validate(
        {
            **{"dataset": "files", "root": root, "cache_dir": cache_dir, "image_size": SIZE},
            **{"reading": reading, "validation_share": 0.02},
        }
    )


def ours(images: EncodedImages) -> Callable[[], int]:
    """Reads all images once; gives their number."""
    order = BatchOrder(len(images), BATCH, 0, 0, 1, flip=True)

    def read() -> int:
        steps = range(len(images) // BATCH)
        tasks = loading(Reader(images), order, steps, 1, torch.device("cpu"))
        return sum(len(task()) for task in tasks)

    return read


def theirs(root: Path) -> Callable[[], int]:
    """The same by torchvision."""
    bicubic = v2.InterpolationMode.BICUBIC
    transform = v2.Compose([v2.Resize(SIZE, bicubic), v2.CenterCrop(SIZE), v2.PILToTensor()])
    loader: Any = DataLoader(ImageFolder(str(root), transform), BATCH, shuffle=True, drop_last=True)
    return lambda: sum(len(images) for images, _ in loader)


def compare(root: Path, cache_dir: Path) -> dict[str, float]:
    """Images per second of processor time, and the median of the ratios of turns."""
    config = opened(root, cache_dir, num_workers=0)
    sides = {"ours": ours(open_files(config, "train")), "torchvision": theirs(root)}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS + 1):
        for name, read in sides.items():
            started = time.process_time()
            count = read()
            if number:  # the first one reads the files from the disk
                speeds[name].append(count / (time.process_time() - started))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    return {**medians, "ratio": statistics.median(ratios), "least": min(ratios)}


def waiting(root: Path, folder: Path) -> dict[str, float]:
    """Seconds of training from its second step on, and how many of them it waits for images."""
    preset = TOKENIZER_PRESETS[PRESET]
    update = {"total_steps": STEPS, "validation_interval": STEPS, "num_validation_images": 10}
    config = preset.model_copy(
        update={
            "run_dir": folder / "run",
            "data": opened(root, folder / "cache", num_workers=2),
            "training": preset.training.model_copy(update=update),
        }
    )
    waits: list[float] = []
    moments: list[float] = []

    def timed(tasks: Any) -> Iterator[Any]:
        loaded = one_ahead(tasks)
        try:
            while True:
                started = time.perf_counter()
                batch = next(loaded, None)
                moments.append(time.perf_counter())
                waits.append(moments[-1] - started)
                if batch is None:
                    return
                yield batch
        finally:
            loaded.close()

    accelerator = loop.make_accelerator(config)
    setattr(loop, "one_ahead", timed)  # noqa: B010  # nothing follows in this process
    loop.train(TokenizerStage(config, accelerator), config, accelerator)
    seconds, waited = moments[STEPS - 1] - moments[0], sum(waits[1:STEPS])
    return {"seconds": seconds, "waited": waited, "share": waited / seconds}


def main() -> None:
    """Measures both, and writes what was found."""
    torch.set_num_threads(1)
    source = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        speeds = {}
        for name, side in (("as they are", None), (f"{LARGE_SIDE} pixels", LARGE_SIDE)):
            copy_images(source, folder / name, side)
            speeds[name] = compare(folder / name, folder / "cache")
            print(name, speeds[name], flush=True)
        waited = waiting(folder / "as they are", folder)
        print(waited)
    results = {
        **origin("python -m benchmarks.speed.decoding FOLDER"),
        **{"num_images": NUM_IMAGES, "image_size": SIZE, "preset": PRESET, "num_workers": 2},
        **{"images_per_second": speeds, "training": waited},
    }
    target = Path(sys.argv[2]) if len(sys.argv) == 3 else RESULTS
    text = json.dumps(results, indent=1) + "\n"
    replace_file(target / "decoding_cpu.json", lambda own: own.write_text(text))


if __name__ == "__main__":
    main()
