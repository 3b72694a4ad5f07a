"""Every command, from its command line to its exit status, on the preset `tiny`."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipelines.demo import demo
from pipelines.generation import ImageGenerationPipeline
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


def picture(path: Path, seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images in class folders."""
    for number in range(24):
        picture(tmp_path / "images" / f"class{number % 2}" / f"{number}.png", number)
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
    assert sorted(path.name for path in Path("runs/tiny").iterdir()) == ["prior", "tokenizer"]
    assert Path("runs/cache").is_dir()
    assert run("generate", "runs/tiny", "--output-dir", "out", "--num-images", "5").status == 0
    names = sorted(path.name for path in Path("out").iterdir())
    images = [*(f"{number:06d}.png" for number in range(5)), "contact_sheet.png"]
    assert names == [*images, "settings.json"]
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


def test_the_demo_leaves_a_summary_and_goes_on_where_it_was(
    tmp_path: Path, cache_dir: Path
) -> None:
    runs = tokenizer_run(tmp_path, cache_dir), prior_run(tmp_path)
    summary = demo(*runs, num_images=20, classifier_steps=3)
    assert summary == tmp_path / "summary.html"
    assert "class agreement" in summary.read_text()
    before = weight_files(tmp_path)
    demo(*runs, num_images=20, classifier_steps=3)
    assert weight_files(tmp_path) == before


def test_generate_depends_on_neither_batch_size_nor_number(
    run: Run, tiny_run: Path, tmp_path: Path
) -> None:
    options = ["--seed", "3", "--labels", "2", "5", "--sampling.temperature", "0.7"]
    for name, size, count in (("one", "1", "4"), ("all", "64", "4"), ("more", "2", "7")):
        command = [tiny_run, "--output-dir", tmp_path / name, "--num-images", count]
        assert run("generate", *command, "--batch-size", size, *options).status == 0
    for number in range(4):
        files = {(tmp_path / n / f"{number:06d}.png").read_bytes() for n in ("one", "all", "more")}
        assert len(files) == 1


def test_generate_writes_the_images_of_the_pipeline(
    run: Run, tiny_run: Path, pipeline: ImageGenerationPipeline
) -> None:
    assert run("generate", tiny_run, "--output-dir", "out", "--num-images", "5").status == 0
    for number, image in enumerate(pipeline(5, progress=False)):
        with Image.open(f"out/{number:06d}.png") as written:
            assert isinstance(image, Image.Image)
            assert written.tobytes() == image.tobytes()


@pytest.mark.parametrize("count", ["1", "40"])
def test_a_full_disk_ends_generate_with_one_line(
    count: str, tiny_run: Path, tmp_path: Path
) -> None:
    options = ["--output-dir", str(tmp_path / "out"), "--num-images", count, "--batch-size", "2"]
    job = Job("pipelines.generate", [tiny_run, *options], tmp_path, prepare=files_up_to(300))
    assert job.wrong_refusal("File too large") == ""
    assert len(list((tmp_path / "out").iterdir())) < 10


def test_reconstruct_writes_each_image_under_its_name(
    run: Run, tiny_run: Path, folder: Path, tmp_path: Path
) -> None:
    images = folder / "class0"
    assert run("reconstruct", tiny_run, images, "--output-dir", tmp_path / "out").status == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in images.iterdir()} | {"comparison.png"}
    with Image.open(tmp_path / "out" / "0.png") as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))
    one = ["--output-dir", tmp_path / "one", "--num-layers", "1", "--image-size", "32"]
    assert run("reconstruct", tiny_run, images / "0.png", *one).status == 0
    with Image.open(tmp_path / "one" / "0.png") as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize(
    "name", ["train_tokenizer", "train_prior", "generate", "reconstruct", "evaluate", "demo"]
)
def test_every_command_has_help(run: Run, name: str) -> None:
    ended = run(name, "--help")
    assert ended.status == 0
    assert f"python -m pipelines.{name}" in ended.out
    assert not any(Path().iterdir())


# Bad input: one line, exit status 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_being_stopped_while_libraries_are_imported_gives_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.train_tokenizer", "tiny"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)
    assert output == "stopped\n"
    assert not list(tmp_path.iterdir())


def test_a_real_process_gives_one_line_and_exit_status_2(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pipelines.train_tokenizer", "tiny", "--training.sead", "3"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: Unrecognized options: --training.sead, 3\n"
    assert ended.stdout == ""
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nope"], ["unknown preset 'nope'"]),
        (["tiny", "--training.sead", "3"], ["--training.sead"]),
        (["tiny", "--training.seed", "three"], ["--training.seed", "'three'"]),
        (["tiny", "--training.batch-size", "0"], ["batch_size", "greater than 0"]),
        (["tiny", "--data.image-size", "20"], ["divisible by the coarsest downsampling 8", "20"]),
        (["tiny", "--data.channels", "1"], ["data.channels", "got 1"]),
        (["tiny", "--data.dataset", "folder"], ["root"]),
        (["tiny", "--data.dataset", "folder", "--data.root", "none"], ["root", "none"]),
        (["tiny", "--backbone-weights", "w.safetensors"], ["backbone_weights"]),
    ],
)
def test_training_refuses_before_work_starts(
    run: Run, arguments: list[str], parts: list[str]
) -> None:
    assert_refused(run("train_tokenizer", *arguments), *parts)
    assert not Path("runs/tiny").exists()


def spoil_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def spoil_by_mixing(folder: Path) -> None:
    picture(folder / "stray.png")


def spoil_one_image(folder: Path) -> None:
    (folder / "class1" / "1.png").write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (spoil_nothing, "holds no PNG, JPEG or WebP images"),
        (spoil_by_mixing, "mixes 1 images with class folders"),
        (spoil_one_image, "1.png is not a readable image"),
    ],
)
def test_a_folder_of_images_that_does_not_fit_is_refused(
    run: Run, folder: Path, spoil: Callable[[Path], None], part: str
) -> None:
    spoil(folder)
    command = ["tiny", "--data.dataset", "folder", "--data.root", folder]
    assert_refused(run("train_tokenizer", *command), part)
    assert not Path("runs/tiny").exists()


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A trained run that may be spoilt."""
    shutil.copytree(tiny_run, tmp_path / "copy")
    return tmp_path / "copy"


def remove_weight(run_dir: Path) -> None:
    path = run_dir / "prior" / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["start"]
    save_file(weights, path)


def cut_off_weights(run_dir: Path) -> None:
    path = run_dir / "tokenizer" / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def swap_classes(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "prior" / "model")
    shutil.copytree(run_dir / "tokenizer" / "model", run_dir / "prior" / "model")


def change_tokenizer(run_dir: Path) -> None:
    path = run_dir / "tokenizer" / "model" / "model.safetensors"
    save_file({name: own * 1.01 for name, own in load_file(path).items()}, path)


def remove_prior(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "prior")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (remove_weight, ["lacks 1 weights", "'start'"]),
        (cut_off_weights, ["model.safetensors", "damaged"]),
        (swap_classes, ["model must be 'Prior', got 'Tokenizer'"]),
        (change_tokenizer, ["prior does not belong to tokenizer"]),
        (remove_prior, ["holds no Prior"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    run: Run, copy: Path, extractor: list[str], spoil: Callable[[Path], None], parts: list[str]
) -> None:
    spoil(copy)
    assert_refused(run("generate", copy, "--output-dir", "out"), *parts)
    assert not Path("out").exists()
    assert_refused(run("evaluate", copy, *extractor), *parts)
    assert not (copy / "evaluation").exists()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--labels", "8"], ["labels must lie in [0, 8), got 8"]),
        (["--labels", "-1"], ["labels.0", "-1"]),
        (["--sampling.temperature", "-1"], ["temperature", "greater than or equal to 0.000001"]),
        (["--sampling.top-k", "9"], ["top_k must lie in [1, 8], got 9"]),
        (["--num-images", "0"], ["num_images", "greater than 0"]),
    ],
)
def test_generate_refuses_what_is_out_of_range(
    run: Run, tiny_run: Path, options: list[str], parts: list[str]
) -> None:
    assert_refused(run("generate", tiny_run, "--output-dir", "out", *options), *parts)
    assert not list(Path().glob("out/*"))


def test_generate_overwrites_nothing(run: Run, tiny_run: Path) -> None:
    picture(Path("out/mine.png"))
    ended = run("generate", tiny_run, "--output-dir", "out")
    assert_refused(ended, "output_dir must not hold other images")
    assert [path.name for path in Path("out").iterdir()] == ["mine.png"]


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


def test_reconstruct_refuses_what_it_cannot_read_or_would_overwrite(
    run: Run, tiny_run: Path, tmp_path: Path
) -> None:
    image = picture(tmp_path / "images" / "a.png")
    command = ["--output-dir", "out"]
    assert_refused(run("reconstruct", tiny_run, "none.png", *command), "none.png does not exist")
    assert_refused(run("reconstruct", tmp_path, image, *command), "config.json: no such file")
    assert_refused(run("reconstruct", tiny_run, image, *command, "--image-size", "20"), "divisible")
    assert_refused(run("reconstruct", tiny_run, image, *command, "--num-layers", "4"), "num_layers")
    twin = picture(tmp_path / "images" / "a.webp")
    ended = run("reconstruct", tiny_run, image.parent, *command)
    assert_refused(ended, "images: two files in ", " differ only in their suffix")
    twin.unlink()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    assert_refused(run("reconstruct", tiny_run, image.parent, *command), "images:")
    picture(Path("out/a.png"), 1)
    before = Path("out/a.png").read_bytes()
    assert_refused(run("reconstruct", tiny_run, image, *command), "out/a.png exists already")
    assert Path("out/a.png").read_bytes() == before


def test_evaluate_refuses_what_it_cannot_measure(
    run: Run, tiny_run: Path, extractor: list[str]
) -> None:
    assert_refused(run("evaluate", tiny_run, "--num-images", "19", *extractor), "num_images", "19")
    inception = ["--extractor.weights", "none.pth"]
    assert_refused(run("evaluate", tiny_run, *inception), "none.pth", "no such file", "inception")


def test_a_run_in_the_same_folder_with_other_options_is_refused(run: Run, copy: Path) -> None:
    config = copy / "tokenizer" / "config.json"
    before = weight_files(copy / "tokenizer")
    options = ["--run-dir", copy, "--training.learning-rate", "0.5"]
    ended = run("train_tokenizer", config, *options)
    assert_refused(ended, "training.learning_rate is 0.001, got 0.5")
    assert weight_files(copy / "tokenizer") == before


def test_a_damaged_state_is_refused(run: Run, copy: Path) -> None:
    path = sorted(copy.glob("prior/state/*/optimizer.safetensors"))[-1]
    path.write_bytes(b"damaged")
    config = copy / "prior" / "config.json"
    assert_refused(
        run("train_prior", config, "--run-dir", copy), "optimizer.safetensors is damaged"
    )


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_a_full_disk_gives_one_line_and_what_was_saved_stays(
    stage: str,
    run: Run,
    tiny_run: Path,
    cache_dir: Path,
    tmp_path: Path,
) -> None:
    """No file may grow beyond a limit: stands for a disk without space."""
    run_dir = tmp_path / "run"
    if stage == "prior":
        shutil.copytree(tiny_run / "tokenizer", run_dir / "tokenizer")
    config = prior_run(run_dir) if stage == "prior" else tokenizer_run(run_dir, cache_dir)
    with pytest.raises(CrashError):
        train_with(config, 3, crash)
    arguments = [str(config.output_dir / "config.json")]
    for file_size in (20_000, 45_000):  # too little for a picture, for the optimizer's state
        before = weight_files(config.output_dir / "state")
        limit = files_up_to(file_size)
        job = Job(f"pipelines.train_{stage}", arguments, tmp_path, prepare=limit)
        assert job.wrong_refusal("File too large") == ""
        assert weight_files(config.output_dir / "state") == before
        assert not list(config.output_dir.rglob("*tmp*"))
    assert run(f"train_{stage}", *arguments).status == 0
    assert_same_run(config.output_dir, tiny_run / stage)
