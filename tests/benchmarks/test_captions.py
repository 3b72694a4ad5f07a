"""The benchmark of captions: what is said of shapes, what is seen in them, what was measured."""

import csv
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.captioned_shapes import attributes, caption, describe, write_folder
from benchmarks.captions import RESULTS, CharacterEncoder, Judge, agreement
from pipelines.data.shapes import ShapeFactors, draw_shapes


def test_a_caption_says_size_color_shape_and_place() -> None:
    star = ShapeFactors(radius=0.56, turn=0.0, x=-0.2, y=-0.2, hue=0.99)
    assert caption(attributes("star", star)) == "a small red star left above"
    ring = ShapeFactors(radius=0.66, turn=0.0, x=0.0, y=0.2, hue=0.6667)
    assert caption(attributes("ring", ring)) == "a large blue ring below"


def test_the_judge_sees_what_the_captions_of_real_images_say() -> None:
    images = draw_shapes(0, "validation", np.arange(160, dtype=np.int64), 32, 3)
    found = Judge.from_shapes(2_000).attributes(torch.from_numpy(images).movedim(-1, 1))
    shares = agreement(found, describe("validation", 160))
    least = {"size": 0.7, "color": 0.97, "shape": 0.9, "horizontal": 0.9, "vertical": 0.9}
    assert all(shares[name] > share for name, share in least.items()), shares


def test_an_encoder_of_characters_gives_each_word_a_token() -> None:
    tokens, mask = CharacterEncoder()(["a red star", "star", "a rats"], 8)
    assert mask.sum(1).tolist() == [3, 1, 2]
    assert torch.equal(tokens[0, 2], tokens[1, 0])
    assert not torch.isclose(tokens[2, 1], tokens[1, 0]).any()


def test_a_folder_has_a_row_for_each_image(tmp_path: Path) -> None:
    write_folder(tmp_path, "train", 9, 16)
    with (tmp_path / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["file_name"] for row in rows} == {path.name for path in tmp_path.glob("*.png")}
    assert [row["text"] for row in rows] == [caption(own) for own in describe("train", 9)]


def test_the_committed_images_show_what_their_captions_say() -> None:
    results = json.loads((RESULTS / "captions_cpu.json").read_text())["agreement"]
    guided = max(
        (own for own in results if own.startswith("samples")), key=lambda n: results[n]["all"]
    )
    for name, share in results["other captions"].items():
        assert results[guided][name] > share + 0.15, name
    assert results[guided]["all"] > 0.7 * results["reconstructions"]["all"]
