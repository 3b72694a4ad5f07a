"""The benchmark of files: other codecs, ratios at equal quality, and one run of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin (the extra `bench`) is missing")

from benchmarks.rate import codecs
from benchmarks.rate.codec_report import ratios, table, time_table
from benchmarks.rate.files import FORMATS, coded, multiscale_similarity, opened, to_picture, within
from pipelines.data.shapes import draw_shapes
from pipelines.images import save_png


def pictures(count: int) -> torch.Tensor:
    images = draw_shapes(0, "train", np.arange(count), 128, 3)
    return torch.from_numpy(images).movedim(-1, 1)


@pytest.mark.parametrize("codec", FORMATS)
def test_a_codec_spends_more_bytes_on_fewer_errors(codec: str) -> None:
    form, images = FORMATS[codec], pictures(2)
    results = [
        coded(images, lambda picture, q=quality: form.encode(picture, q), opened)
        for quality in (form.qualities[0], form.qualities[-1])
    ]
    errors = [(own.images.float() - images).square().mean() for own in results]
    assert errors[0] > errors[1]
    assert sum(results[0].num_bytes) < sum(results[1].num_bytes)
    assert form.header_bytes(form.qualities[0]) < min(results[0].num_bytes)
    similarities = [multiscale_similarity(images, own.images) for own in results]
    assert similarities[0] < similarities[1] < 1
    assert multiscale_similarity(images, images) == pytest.approx(1)


def test_pictures_at_equal_bytes_are_the_best_that_fit_or_the_smallest() -> None:
    form, image = FORMATS["JPEG"], pictures(1)[0]
    picture = to_picture(image)
    limits = [len(form.encode(picture, quality)) for quality in (1, 20, 60)]
    sizes = [within(image, form, limit)[1] for limit in (1, limits[1], limits[2] - 1)]
    assert sizes[0] == limits[0]
    assert sizes[1] == limits[1] < sizes[2] < limits[2]


def test_ratios_are_of_whole_files_and_without_headers() -> None:
    def point(num_bytes: float, header: float, psnr: float) -> dict[str, float]:
        return {"bytes": num_bytes, "header_bytes": header, "PSNR": psnr, "MS-SSIM": psnr / 100}

    other = {"points": [point(600, 500, 20), point(1100, 500, 30)]}
    assert ratios(point(300, 20, 20), other, "PSNR") == "0.50 / 2.80"
    assert ratios(point(550, 10, 30), other, "MS-SSIM") == "0.50 / 0.90"
    assert ratios(point(300, 20, 10), other, "PSNR").count("*") == 2
    assert ratios(point(300, 20, 20), None, "PSNR") == ""


def test_the_command_trains_codes_and_reports_and_repeats_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("codec_cells", "codec_report"):
        monkeypatch.setattr(f"benchmarks.rate.{module}.FORMATS", {"WebP": FORMATS["WebP"]})
    for name in ("flowers/train", "flowers/val", "emoji"):
        (tmp_path / name).mkdir(parents=True)
        for number, image in enumerate(pictures(4)):
            save_png(to_picture(image), tmp_path / name / f"{number}.png")
    words = ["--flowers", str(tmp_path / "flowers"), "--emoji", str(tmp_path / "emoji")]
    words += ["--budget", "tiny", "--run-dir", str(tmp_path / "run")]
    codecs.main(words)
    path = tmp_path / "run" / "rate_codecs_tiny.json"
    results = json.loads(path.read_text())
    assert [row["codec"] for row in results] == 2 * ["WebP", "8x8x2-k8"]
    assert str(tmp_path) not in path.read_text()
    assert len(table(results).splitlines()) == 2 + 2 * 2
    assert len(time_table(results).splitlines()) == 2 + len(results)
    for name in ("flowers", "emoji"):
        assert (tmp_path / "run" / f"rate_codecs_tiny_{name}.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == len(results)
    codecs.main(words)
    assert not capsys.readouterr().out
