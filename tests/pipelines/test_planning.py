"""What quickstart sees of a folder, and what it chooses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.command_configs import QuickstartConfig
from pipelines.config import DataConfig
from pipelines.data.folder_listing import split_folders
from pipelines.data.sources import load_images
from pipelines.planning import Plan, candidates, choose, look_at, make_plan
from pipelines.presets import SMALL_NETWORKS, TOKENIZER_PRESETS
from pipelines.processes import new_accelerator
from pipelines.quickstart import has_distances
from prior import Prior, PriorConfig
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError


def write(path: Path, size: tuple[int, int], mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_a_folder_is_gray_where_all_pictures_are_and_as_large_as_most_of_them(
    tmp_path: Path,
) -> None:
    """Whatever their mode; what cannot be read is left to training, unless it is all."""
    gray = [write(tmp_path / f"{n}.png", (70 + n, 50 + n), "L") for n in range(3)]
    Image.open(gray[0]).convert("RGBA").save(gray[0])
    assert look_at(gray) == (51, 1)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert look_at([*gray, tmp_path / "broken.png"]) == (51, 1)
    assert look_at([*gray, write(tmp_path / "color.png", (51, 80))]) == (51, 3)
    with pytest.raises(InputError, match="none of"):
        look_at([tmp_path / "broken.png"])


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val"), ("train", "val")),
        (("train", "test", "notes"), ("train", "test")),
        (("train",), ("train", None)),
        (("train", "cat"), (".", None)),
        (("val",), (".", None)),
        ((), (".", None)),
    ],
)
def test_training_and_validation_folders_are_known_by_their_names(
    folders: tuple[str, ...], expected: tuple[str, str | None], tmp_path: Path
) -> None:
    for name in folders:
        (tmp_path / name).mkdir()
    train, validation = expected
    assert split_folders(tmp_path) == (tmp_path / train, validation and tmp_path / validation)


@pytest.mark.parametrize("folders", [("",), ("a",), ("a", "b")])
def test_a_folder_of_which_nothing_can_be_held_out_is_refused_before_steps_are_timed(
    folders: tuple[str, ...], tmp_path: Path
) -> None:
    for name in folders:
        write(tmp_path / name / "0.png", (40, 40))
    config = QuickstartConfig(folder=tmp_path)
    needed = len(folders) + 1
    with pytest.raises(InputError, match=f"^folder must hold {needed} images at least, .* got"):
        make_plan(config, tmp_path / "run", new_accelerator())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num_training", "num_validation", "num_images", "expected"),
    [(20, 2, 20, True), (20, 1, 20, False), (20, 2, 19, False), (20, 2, 1000, True)],
)
def test_distances_are_left_out_where_images_are_too_few_and_that_is_logged(
    num_training: int,
    num_validation: int,
    num_images: int,
    expected: bool,
    cache_dir: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sizes = {"num_images": num_training, "num_validation_images": num_validation}
    data = DataConfig(dataset="shapes", image_size=16, cache_dir=cache_dir, **sizes)
    splits = load_images(data, "train"), load_images(data, "validation")
    assert has_distances(*splits, num_images) is expected
    assert caplog.text.count("distances are left out") == (not expected)


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def chosen(
    device: torch.device, minutes: float, **seconds: float
) -> tuple[int, str, tuple[int, int]]:
    """Image size, networks and steps, where a step takes so long at 128×128 pixels.

    A quarter of it at half the size. `large` is that of the larger networks.
    """

    def time_steps(plan: Plan) -> tuple[float, float]:
        is_small = plan.tokenizer.tokenizer.networks == SMALL_NETWORKS
        each = seconds["small" if is_small else "large"]
        if not each:
            raise torch.OutOfMemoryError
        return each * (plan.tokenizer.data.image_size / 128) ** 2, each / 10

    candidate, counts, _ = choose(candidates(device), minutes * 60.0, time_steps)
    return candidate.image_size, candidate.networks_of, (counts[0], counts[1])


@pytest.mark.parametrize(
    ("device", "minutes", "seconds", "expected"),
    [
        (CPU, 30, {"small": 0.5}, (128, "images128-small", (1620, 14400))),
        (CPU, 10, {"small": 0.5}, (64, "images64-small", (2160, 4800))),
        (CPU, 1, {"small": 0.5}, (32, "images32-small", (864, 480))),
        # A GPU on which the larger networks are not worth it, one for which they are, and one
        # whose memory they do not fit.
        (GPU, 10, {"small": 0.01, "large": 0.2}, (128, "images128-small", (27000, 100000))),
        (GPU, 10, {"small": 0.2, "large": 0.2}, (64, "cifar10-sqvae2", (5400, 12000))),
        (GPU, 10, {"small": 0.01, "large": 0.05}, (128, "images128-sqvae2", (5400, 48000))),
        (GPU, 10, {"small": 0.01, "large": 0.0}, (128, "images128-small", (27000, 100000))),
    ],
)
def test_the_largest_images_and_networks_are_taken_whose_steps_fit_the_minutes(
    device: torch.device,
    minutes: float,
    seconds: dict[str, float],
    expected: tuple[int, str, tuple[int, int]],
) -> None:
    assert chosen(device, minutes, **seconds) == expected


def test_larger_networks_are_for_a_gpu_alone_and_can_be_built_and_trained() -> None:
    assert [own.networks_of for own in candidates(CPU)] == [
        f"images{size}-small" for size in (128, 64, 32)
    ]
    larger = candidates(GPU)[::2]
    assert [own.image_size for own in larger] == [128, 64, 32]
    for size, name, plan, _ in larger:
        run = plan.tokenizer
        assert (run.data.image_size, run.data.dataset) == (size, "folder")
        assert run.tokenizer.networks == TOKENIZER_PRESETS[name].tokenizer.networks
        with torch.device("meta"):
            tokenizer = Tokenizer(run.tokenizer)
            code_maps = tokenizer.code_maps(size, size)
            Prior(PriorConfig(network=plan.prior.prior, code_maps=code_maps))
        assert [own.height for own in code_maps] == [8, 16]
        # Pictures of people's own are not mirrored unasked.
        assert not run.data.horizontal_flip
        assert not plan.prior.horizontal_flip
    with pytest.raises(torch.OutOfMemoryError):
        chosen(GPU, 1, small=0.0, large=0.0)
