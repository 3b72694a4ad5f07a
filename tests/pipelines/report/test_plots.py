"""Laws of the charts of a run."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.report.plots import curves, usage_chart
from tokenizer.storage.errors import InputError


def log(folder: Path, *entries: dict[str, object]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def test_curves_show_what_was_logged(tmp_path: Path) -> None:
    folder = log(
        tmp_path,
        {"step": 2, "phase": "train", "tokenizer/loss": 3.0, "layer_entropy": [1.0, 2.0]},
        {"step": 4, "phase": "train", "tokenizer/loss": 2.5, "layer_entropy": [0.5, 1.5]},
        {"step": 4, "phase": "validation", "loss": float("inf")},
    )
    figure = curves(folder, {"train": ["loss", "layer_entropy"], "validation": ["loss"]})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss (train)", "layer entropy (train)", "loss (validation)"]
    values = [[line.get_ydata().tolist() for line in axes.lines] for axes in figure.axes]
    assert values == [[[3.0, 2.5]], [[1.0, 0.5], [2.0, 1.5]], [[float("inf")]]]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [2, 4]
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["layer 1", "layer 2"]
    assert figure.axes[2].lines[0].get_marker() == "."  # a point without a line
    figure.savefig(tmp_path / "curves.png")


def test_curves_leave_out_what_the_quantizer_does_not_have(tmp_path: Path) -> None:
    entry = {"step": 1, "phase": "train", "loss": 1.0, "commitment": 0.0, "layer_entropy": [0.0]}
    folder = log(tmp_path, {**entry, "dequantization_variance": []}, {**entry, "step": 2})
    names = ["loss", "commitment", "layer_entropy", "dequantization_variance", "temperature"]
    figure = curves(folder, {"train": names, "validation": ["PSNR"]})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss (train)"]
    with pytest.raises(InputError, match=r"metrics\.jsonl holds none of the metrics to show"):
        curves(folder, {"validation": ["PSNR"]})


@settings(max_examples=20)
@given(
    st.lists(
        st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any), min_size=1, max_size=9
    )
)
def test_usage_falls_with_the_rank_and_sums_to_one(layers: list[list[int]]) -> None:
    figure = usage_chart([torch.tensor(counts) for counts in layers])
    # Panels have the same size, whatever their number.
    size = (3 * min(len(layers), 4), 2.1 * -(-len(layers) // 4))
    assert tuple(figure.get_size_inches()) == pytest.approx(size)
    for number, (axes, counts) in enumerate(zip(figure.axes, layers, strict=True), 1):
        shares = axes.patches[0].get_data().values
        assert shares == pytest.approx(sorted((n / sum(counts) for n in counts), reverse=True))
        assert axes.lines[0].get_ydata()[0] == pytest.approx(1 / len(counts))
        used = sum(n > 0 for n in counts)
        assert axes.get_title(loc="left") == f"layer {number}: {used} of {len(counts)} codes"
