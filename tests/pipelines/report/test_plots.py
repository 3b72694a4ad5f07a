"""Laws of the pictures of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from pipelines.images import MODES, comparison, image_grid, to_pil
from pipelines.report.plots import curves, usage_chart
from tokenizer.storage.errors import InputError


def noise(count: int, channels: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, size, size), generator=generator).to(torch.uint8)


def log(folder: Path, *entries: dict[str, object]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def data_of(figure: Figure) -> list[list[list[float]]]:
    """Of each panel, of each of its lines, the values."""
    return [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]


def titles_of(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


@pytest.mark.parametrize("channels", sorted(MODES))
def test_an_image_keeps_its_values_in_pillow(channels: int) -> None:
    image = noise(1, channels, 5)[0]
    pixels = np.asarray(to_pil(image)).reshape(5, 5, channels)
    assert np.array_equal(pixels, image.movedim(0, -1).numpy())


@given(
    count=st.integers(1, 7),
    columns=st.integers(1, 4),
    channels=st.sampled_from(sorted(MODES)),
    scale=st.integers(1, 3),
)
def test_a_grid_holds_image_i_in_row_i_over_columns(
    count: int, columns: int, channels: int, scale: int
) -> None:
    size = 3
    images = noise(count, channels, size, seed=count)
    picture = np.asarray(image_grid(images, columns, scale))
    picture = picture.reshape(*picture.shape[:2], channels)
    used = min(columns, count)
    rows = -(-count // used)
    if count > 1:  # torchvision gives a single image without a frame
        assert picture.shape[:2] == (
            scale * (rows * (size + 2) + 2),
            scale * (used * (size + 2) + 2),
        )
    offset = 2 if count > 1 else 0
    for number, image in enumerate(images):
        top = scale * (offset + number // used * (size + 2))
        left = scale * (offset + number % used * (size + 2))
        cell = picture[top : top + scale * size, left : left + scale * size]
        for row in range(scale):
            for column in range(scale):
                shrunk = cell[row::scale, column::scale]
                assert np.array_equal(shrunk, image.movedim(0, -1).numpy())


@pytest.mark.parametrize(("size", "factor"), [(16, 4), (32, 2), (64, 1), (128, 1)])
def test_small_images_are_enlarged_to_64_pixels(size: int, factor: int) -> None:
    picture = image_grid(noise(2, 3, size), 2)
    assert picture.size == (factor * (2 * size + 6), factor * (size + 4))


def test_a_comparison_alternates_originals_and_reconstructions() -> None:
    originals, reconstructions = noise(3, 3, 4, 1), noise(3, 3, 4, 2)
    mixed = [image for pair in zip(originals, reconstructions, strict=True) for image in pair]
    assert comparison(originals, reconstructions) == image_grid(torch.stack(mixed), 8)


def test_curves_show_what_was_logged(tmp_path: Path) -> None:
    folder = log(
        tmp_path,
        {"step": 2, "phase": "train", "loss": 3.0, "layer_entropy": [1.0, 2.0]},
        {"step": 4, "phase": "train", "loss": 2.5, "layer_entropy": [0.5, 1.5]},
        {"step": 4, "phase": "validation", "loss": 9.0},
    )
    figure = curves(folder, {"train": ["loss", "layer_entropy"], "validation": ["loss"]})
    assert titles_of(figure) == ["loss (train)", "layer entropy (train)", "loss (validation)"]
    assert data_of(figure) == [[[3.0, 2.5]], [[1.0, 0.5], [2.0, 1.5]], [[9.0]]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [2, 4]
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["layer 1", "layer 2"]


def test_a_single_point_is_visible(tmp_path: Path) -> None:
    folder = log(tmp_path, {"step": 1, "phase": "train", "loss": 1.0})
    figure = curves(folder, {"train": ["loss"]})
    assert figure.axes[0].lines[0].get_marker() == "."


def test_curves_leave_out_what_was_not_logged(tmp_path: Path) -> None:
    folder = log(
        tmp_path, {"step": 1, "phase": "train", "loss": 1.0, "dequantization_variance": []}
    )
    figure = curves(folder, {"train": ["loss", "dequantization_variance"], "validation": ["PSNR"]})
    assert titles_of(figure) == ["loss (train)"]


def test_curves_of_nothing_are_an_error(tmp_path: Path) -> None:
    folder = log(tmp_path, {"step": 1, "phase": "train", "loss": 1.0})
    with pytest.raises(InputError, match=r"metrics\.jsonl holds none of the metrics to show"):
        curves(folder, {"validation": ["PSNR"]})


def test_curves_of_exact_reconstructions_can_be_drawn(tmp_path: Path) -> None:
    folder = log(tmp_path, *({"step": n, "phase": "train", "PSNR": float("inf")} for n in (1, 2)))
    curves(folder, {"train": ["PSNR"]}).savefig(tmp_path / "curves.png")


@settings(max_examples=20)
@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), min_size=1, max_size=6
    )
)
def test_usage_falls_with_the_rank_and_sums_to_one(layers: list[list[int]]) -> None:
    figure = usage_chart([torch.tensor(counts) for counts in layers])
    assert len(figure.axes) == len(layers)
    for number, (axes, counts) in enumerate(zip(figure.axes, layers, strict=True), 1):
        shares = axes.patches[0].get_data().values
        assert shares == pytest.approx(sorted((n / sum(counts) for n in counts), reverse=True))
        assert axes.lines[0].get_ydata()[0] == pytest.approx(1 / len(counts))
        used = sum(n > 0 for n in counts)
        assert axes.get_title(loc="left") == f"layer {number}: {used} of {len(counts)} codes"


@settings(max_examples=12)
@given(st.integers(1, 12))
def test_panels_have_the_same_size_whatever_their_number(count: int) -> None:
    width, height = usage_chart([torch.ones(2)] * count).get_size_inches()
    assert width == 3 * min(count, 4)
    assert height == pytest.approx(2.1 * -(-count // 4))
