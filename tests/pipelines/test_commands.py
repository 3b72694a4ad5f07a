"""Every command, from its command line to its exit status, on the preset `tiny`."""

import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load, save, save_file

from pipelines.config import TokenizerRunConfig
from pipelines.generation import ImageGenerationPipeline
from pipelines.quickstart import train_and_measure
from pipelines.run.folder import load_run
from tests.faults.jobs import Job, files_up_to
from tests.tiny_runs import (
    CrashError,
    assert_same_run,
    crash,
    prior_run,
    tokenizer_run,
    train_with,
    weight_files,
)


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs `python -m pipelines.NAME ...` in this process, in an empty folder."""

    def run_here(name: str, *arguments: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        # A module that is imported and run would be two.
        monkeypatch.delitem(sys.modules, f"pipelines.{name}", raising=False)
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(f"pipelines.{name}", run_name="__main__")
        output = capsys.readouterr()
        return Ended(int(caught.value.code or 0), output.out, output.err)

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return run_here


def assert_refused(ended: Ended, *parts: str) -> None:
    """One line on stderr that says so, and exit status 2."""
    assert ended.status == 2, ended.err
    lines = [line for line in re.split("[\r\n]+", ended.err) if line.strip()]
    lines = [line for line in lines if "%|" not in line]  # progress bars
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def write_image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in class folders."""
    for number in range(24):
        write_image(tmp_path / "images" / f"class{number % 2}" / f"{number}.png", number)
    return tmp_path / "images"


@pytest.fixture(scope="module")
def extractor(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small untrained network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), path)
    options = {"kind": "timm", "model": "test_resnet", "weights": path, "image-size": 32}
    return [part for k, v in options.items() for part in (f"--extractor.{k}", str(v))]


# The whole way


def test_the_main_job_from_training_to_numbers(run: Run, extractor: list[str]) -> None:
    """All defaults: runs and caches come to lie below the folder that the user is in."""
    assert run("train_tokenizer", "tiny").status == 0
    assert run("train_prior", "tiny").status == 0
    assert {path.name for path in Path("runs/tiny").iterdir()} >= {
        *("prior", "tokenizer", "summary.html"),
    }
    assert Path("runs/cache").is_dir()
    assert run("generate", "runs/tiny", "--output-dir", "out", "--num-images", "5").status == 0
    names = sorted(path.name for path in Path("out").iterdir())
    images = [*(f"{number:06d}.png" for number in range(5)), "contact_sheet.png"]
    assert names == [*images, "labels.json", "settings.json"]
    ended = run("evaluate", "runs/tiny", "--num-images", "20", *extractor)
    assert ended.status == 0
    assert "FD-test_resnet floor" in ended.out
    written = json.loads(Path("runs/tiny/evaluation/generation.json").read_text())
    assert written["metrics"]["FD-test_resnet"]["protocol"]["num_images"] == 20
    assert Path("runs/tiny/evaluation/reconstruction.json").is_file()


def test_a_saved_config_repeats_a_run_and_the_same_command_resumes_it(
    run: Run, tiny_run: Path, tmp_path: Path
) -> None:
    for stage in ("tokenizer", "prior"):
        config = tiny_run / stage / "config.json"
        assert run(f"train_{stage}", config, "--run-dir", tmp_path / "again").status == 0
        assert_same_run(tmp_path / "again" / stage, tiny_run / stage)
        before = weight_files(tmp_path / "again" / stage)
        assert run(f"train_{stage}", tmp_path / "again" / stage / "config.json").status == 0
        assert weight_files(tmp_path / "again" / stage) == before


def test_a_folder_of_images_goes_the_whole_way(run: Run, folder: Path) -> None:
    data = ["--data.dataset", "folder", "--data.root", folder, "--data.validation-share", "0.4"]
    small = ["--run-dir", "r", "--training.total-steps", "1"]
    assert run("train_tokenizer", "tiny", *small, *data).status == 0
    assert run("train_prior", "tiny", *small, "--targets", "posterior").status == 0
    config = json.loads(Path("r/prior/model/config.json").read_text())
    assert config["num_classes"] == 2
    assert run("generate", "r", "--output-dir", "out", "--num-images", "2").status == 0


def test_quickstart_plans_trains_and_goes_on(run: Run, tmp_path: Path) -> None:
    """With training and validation folders; the plan stands in place of presets."""
    root = tmp_path / "images"
    for number in range(40):
        split = "val" if number % 5 == 0 else "train"
        write_image(root / split / "ab"[number % 2] / f"{number}.png", number)
    arguments = ("quickstart", root, "--minutes", "0.01", "--run-dir", "quick")
    ended = run(*arguments)
    assert (ended.status, ended.out.split()[-2:]) == (0, ["open", "quick/summary.html"])
    plan = load_run(TokenizerRunConfig, Path("quick/plan/tokenizer.json"))
    assert (plan.data.channels, plan.data.image_size) == (3, 32)
    assert plan.data.validation_root == root / "val"
    before = weight_files(Path("quick/prior"))
    again = run("train_tokenizer", "quick/plan/tokenizer.json", "--run-dir", "quick")
    assert again.status == 0, again.err
    Path("quick/summary.html").unlink()
    assert run(*arguments).status == 0
    assert weight_files(Path("quick/prior")) == before
    assert Path("quick/summary.html").is_file()
    (tmp_path / "empty").mkdir()
    assert_refused(run("quickstart", root / "val", "--run-dir", "quick"), "run_dir must be")
    assert_refused(run("quickstart", tmp_path / "empty", "--run-dir", "new"), "empty holds no PNG")


def test_the_demo_leaves_a_summary_and_goes_on_where_it_was(
    tmp_path: Path, cache_dir: Path
) -> None:
    runs = tokenizer_run(tmp_path, cache_dir), prior_run(tmp_path)
    summary = train_and_measure(*runs, "a command", 20, 3)
    assert summary == tmp_path / "summary.html"
    assert "class agreement" in summary.read_text()
    before = weight_files(tmp_path)
    train_and_measure(*runs, "a command", 20, 3)
    assert weight_files(tmp_path) == before


def test_generate_writes_the_images_of_the_pipeline_whatever_batch_size_and_number(
    run: Run, tiny_run: Path, pipeline: ImageGenerationPipeline
) -> None:
    class_names = pipeline.prior.config.class_names
    options = ["--seed", "3", "--sampling.temperature", "0.7", "--labels", class_names[2], "5"]
    for name, size, count in (("one", "1", "4"), ("all", "64", "4"), ("more", "2", "7")):
        command = [tiny_run, "--output-dir", name, "--num-images", count]
        assert run("generate", *command, "--batch-size", size, *options).status == 0
    images = pipeline(4, [2, 5, 2, 5], 3, temperature=0.7, progress=False)
    for number, image in enumerate(images):
        files = {Path(f"{name}/{number:06d}.png").read_bytes() for name in ("one", "all", "more")}
        assert len(files) == 1
        with Image.open(f"one/{number:06d}.png") as written:
            assert isinstance(image, Image.Image)
            assert written.tobytes() == image.tobytes()
    labels = json.loads(Path("more/labels.json").read_text())
    assert labels == {f"{own:06d}.png": class_names[(2, 5)[own % 2]] for own in range(7)}
    wrong = ["--output-dir", "wrong", "--labels", class_names[2][:-1]]
    assert_refused(run("generate", tiny_run, *wrong), f"did you mean {class_names[2]!r}")


@pytest.mark.parametrize("count", ["1", "40"])
def test_a_full_disk_ends_generate_with_one_line(
    count: str, tiny_run: Path, tmp_path: Path
) -> None:
    options = ["--output-dir", tmp_path / "out", "--num-images", count, "--batch-size", "2"]
    job = Job("pipelines.generate", [tiny_run, *options], tmp_path, prepare=files_up_to(300))
    assert job.wrong_refusal("File too large") == ""
    assert len(list((tmp_path / "out").iterdir())) < 10


def test_reconstruct_writes_each_image_under_its_name(
    run: Run, tiny_run: Path, folder: Path, tmp_path: Path
) -> None:
    images = folder / "class0"
    names = {str(path.relative_to(folder)) for path in folder.glob("*/*.png")} | {"comparison.png"}
    (images / "._0.png").write_bytes(b"what another system keeps beside a file")
    shutil.copy(images / "0.png", folder / "contact_sheet.png")  # as `generate` leaves it
    out = tmp_path / "out"
    assert run("reconstruct", tiny_run, folder, "--output-dir", out).status == 0
    assert {str(path.relative_to(out)) for path in out.rglob("*.png")} == names
    with Image.open(out / "class0" / "0.png") as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))
    one = ["--output-dir", tmp_path / "one", "--num-layers", "1", "--image-size", "32"]
    assert run("reconstruct", tiny_run, images / "0.png", *one).status == 0
    with Image.open(tmp_path / "one" / "0.png") as image:
        assert image.size == (32, 32)
    searched = ["--output-dir", tmp_path / "searched", "--search.candidates", "4"]
    assert run("reconstruct", tiny_run, folder, *searched).status == 0
    path = Path("class0") / "0.png"
    assert (tmp_path / "searched" / path).read_bytes() != (out / path).read_bytes()


# Bad input: one line, exit status 2


def test_training_refuses_before_work_starts(run: Run, folder: Path) -> None:
    (folder / "class1" / "1.png").write_bytes(b"not an image")
    for options, message in (
        (["--data.image-size", "20"], "must be divisible by the coarsest downsampling 8, got 20"),
        (["--data.channels", "1"], "data.channels must equal tokenizer.channels 3, got 1"),
        (["--data.dataset", "folder", "--data.root", "none"], "root"),
        (["--data.dataset", "folder", "--data.root", folder], "1.png is not a readable image"),
        (["--backbone-weights", "w.safetensors"], "backbone_weights"),
    ):
        assert_refused(run("train_tokenizer", "tiny", *options), message)
        assert not Path("runs/tiny").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(
    run: Run, tiny_run: Path, extractor: list[str]
) -> None:
    shutil.copytree(tiny_run, "copy")
    weights = Path("copy/tokenizer/model/model.safetensors")
    whole = weights.read_bytes()
    other = save({name: weight * 1.01 for name, weight in load(whole).items()})
    for content, message in (
        (whole[:-100], "model.safetensors is damaged"),
        (other, "prior does not belong to tokenizer"),
    ):
        weights.write_bytes(content)
        assert_refused(run("generate", "copy", "--output-dir", "out"), message)
        assert_refused(run("evaluate", "copy", *extractor), message)
    weights.write_bytes(whole)
    shutil.rmtree("copy/prior")
    assert_refused(run("generate", "copy", "--output-dir", "out"), "copy/prior holds no Prior")
    assert [path.name for path in Path().iterdir()] == ["copy"]
    assert not Path("copy/evaluation").exists()


def test_generate_goes_on_with_the_same_settings_alone(run: Run, tiny_run: Path) -> None:
    command = ["generate", tiny_run, "--output-dir", "out", "--seed", "3", "--num-images"]
    assert run(*command, "5").status == 0
    whole = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    Path("out/000003.png").unlink()
    Path("out/000001.png").write_bytes(whole["000002.png"])  # is not drawn again
    assert run(*command, "5").status == 0
    assert Path("out/000003.png").read_bytes() == whole["000003.png"]
    assert Path("out/000001.png").read_bytes() == whole["000002.png"]
    ended = run(*command, "5", "--sampling.temperature", "0.7")
    assert_refused(ended, "images of other settings: its sampling.temperature is 1.0, got 0.7")
    Path("out/settings.json").unlink()
    assert_refused(run(*command, "5"), "output_dir must not hold other images")
    file = ["--output-dir", "out/000000.png"]
    assert_refused(run("generate", tiny_run, *file), "output_dir must be a folder, got out/000000")
    assert {path.name for path in Path("out").iterdir()} == whole.keys() - {"settings.json"}


def test_reconstruct_refuses_what_it_cannot_read_or_would_overwrite(
    run: Run, tiny_run: Path, tmp_path: Path
) -> None:
    image = write_image(tmp_path / "images" / "a.png")
    command = ["--output-dir", "out"]
    assert_refused(run("reconstruct", tiny_run, "none.png", *command), "none.png does not exist")
    assert_refused(run("reconstruct", tmp_path, image, *command), "must hold a trained tokenizer")
    assert_refused(run("reconstruct", tiny_run, image, *command, "--image-size", "20"), "divisible")
    assert_refused(run("reconstruct", tiny_run, image, *command, "--num-layers", "4"), "num_layers")
    twin = write_image(tmp_path / "images" / "a.webp")
    ended = run("reconstruct", tiny_run, image.parent, *command)
    assert_refused(ended, "images: a.png and a.webp in ", " differ only in their suffix")
    twin.unlink()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert_refused(run("reconstruct", tiny_run, image.parent, *command), "images:")
    write_image(Path("out/a.png"), 1)
    before = Path("out/a.png").read_bytes()
    assert_refused(run("reconstruct", tiny_run, image, *command), "out/a.png exists already")
    assert Path("out/a.png").read_bytes() == before


def test_evaluate_refuses_what_it_cannot_measure(
    run: Run, tiny_run: Path, extractor: list[str]
) -> None:
    assert_refused(run("evaluate", tiny_run, "--num-images", "19", *extractor), "num_images", "19")
    inception = ["--extractor.weights", "none.pth"]
    assert_refused(run("evaluate", tiny_run, *inception), "none.pth", "no such file", "inception")


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_full_disk_gives_one_line_and_what_was_saved_stays(
    stage: str, run: Run, tiny_run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    if stage == "prior":
        shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    config = prior_run(run_dir) if stage == "prior" else tokenizer_run(run_dir, cache_dir)
    with pytest.raises(CrashError):
        train_with(config, 3, crash)
    command = f"train_{stage}", config.output_dir / "config.json"
    for file_size in (20_000, 45_000):  # too little for a preview, for the optimizer's state
        before = weight_files(config.output_dir / "state")
        limit = files_up_to(file_size)
        job = Job(f"pipelines.{command[0]}", command[1:], tmp_path, prepare=limit)
        assert job.wrong_refusal("File too large") == ""
        assert weight_files(config.output_dir / "state") == before
        assert not list(config.output_dir.rglob("*tmp*"))
    assert run(*command).status == 0
    assert_same_run(config.output_dir, tiny_run / stage)
