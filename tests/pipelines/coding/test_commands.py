"""`hqvae compress` and `hqvae decompress`, from the command line to the files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import TokenizerPipeline
from pipelines.command_configs import CompressConfig, DecompressConfig
from pipelines.compress import compress
from pipelines.decompress import decompress
from pipelines.options import parse_options
from tests.image_files import noise, save
from tokenizer import InputError


def run(verb: str, *arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    if verb == "compress":
        compress(parse_options(CompressConfig, "pipelines.compress", words))
    else:
        decompress(parse_options(DecompressConfig, "pipelines.decompress", words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of several sizes."""
    save(tmp_path / "in" / "a" / "0.png", noise(20, 31))
    save(tmp_path / "in" / "1.png", noise(5, 5))
    return tmp_path / "in"


def test_pictures_become_files_and_pictures_again(
    tiny_run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = save(tmp_path / "2.png", noise(9, 8, seed=2))
    small, out = tmp_path / "small", tmp_path / "out"
    run("compress", tiny_run, folder, more, "--output-dir", small, "--model", "counts")
    files = {str(path.relative_to(small)) for path in small.rglob("*") if path.is_file()}
    assert files == {"a/0.hq", "1.hq", "2.hq"}
    run("decompress", tiny_run, small / "2.hq", small / "a", "--output-dir", out)
    assert {path.name for path in out.iterdir()} == {"0.png", "2.png"}
    pipeline = TokenizerPipeline.from_pretrained(tiny_run)
    content = (small / "a" / "0.hq").read_bytes()
    assert content == pipeline.compress(folder / "a" / "0.png")
    with Image.open(out / "0.png") as found:
        expected = pipeline.decompress(content, output="np")
        np.testing.assert_array_equal(np.asarray(found)[None], expected)  # type: ignore[arg-type]
        assert found.size == (31, 20)
    lines = capsys.readouterr().out.splitlines()
    num_bytes = sum(path.stat().st_size for path in small.rglob("*.hq"))
    assert lines == [f"3 files of {num_bytes} bytes are in {small}", f"2 pictures are in {out}"]


def test_files_by_stored_counts_and_by_the_prior(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = save(tmp_path / "0.png", noise(16, 15))
    run_dir, bare = tmp_path / "run", tmp_path / "bare"
    shutil.copytree(tiny_run, run_dir)
    shutil.copytree(tiny_run, bare)
    contents, pictures = {}, []
    for model in ("counts", "marginals", "prior"):
        small, out = tmp_path / model, tmp_path / f"{model}-out"
        for _ in range(2):  # what was counted is not counted again
            shutil.rmtree(small, ignore_errors=True)
            run("compress", run_dir, picture, "--output-dir", small, "--model", model)
        contents[model] = (small / "0.hq").read_bytes()
        run("decompress", run_dir, small, "--output-dir", out)
        pictures.append((out / "0.png").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    assert len({*contents.values()}) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" in ")[0] for line in lines if "counted" in line] == [
        "codes of 64 training images are counted"
    ]
    with pytest.raises(InputError, match=r"0\.hq: .* this one has no 'marginals'"):
        run("decompress", bare, tmp_path / "marginals", "--output-dir", tmp_path / "none")


def test_what_is_wrong_is_said_before_anything_is_written(
    tiny_run: Path, folder: Path, tmp_path: Path
) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    twin = save(tmp_path / "1.png", noise(9, 8))
    only_one = tmp_path / "only_one"
    shutil.copytree(tiny_run / "tokenizer", only_one / "tokenizer")
    broken = tmp_path / "broken.hq"
    broken.write_bytes(b"no picture")
    to_small, to_out = ("--output-dir", small), ("--output-dir", out)
    for arguments, message in (
        (("compress", tiny_run, tmp_path / "none.png", *to_small), "none.png does not exist"),
        (("compress", tiny_run, empty, *to_small), "files: .*empty"),
        (("compress", tiny_run, folder, twin, *to_small), "1.png would both become 1.hq"),
        (("compress", tiny_run, folder, broken, *to_small), "broken.hq is not a readable image"),
        (("compress", tiny_run, folder, *to_small, "--quality", "1"), "quality must be None"),
        (("compress", tiny_run, folder, *to_small, "--model", "own"), "model must be 'counts'"),
        (
            ("compress", tiny_run, folder, *to_small, "--model", "prior"),
            "must have 16 by 16 pixels",
        ),
        (("compress", only_one, twin, *to_small, "--model", "prior"), "needs a trained prior"),
        (("compress", only_one, broken, *to_small, "--model", "marginals"), "not a readable image"),
        (("decompress", tiny_run, empty, *to_out), r"files: there are no \.hq files in"),
        (("decompress", tiny_run, broken, *to_out), "broken.hq: content must be a picture"),
    ):
        with pytest.raises(InputError, match=message):
            run(*arguments)
        assert not small.exists()
        assert not out.exists()
    assert not (only_one / "tokenizer" / "model" / "marginals.json").exists()
    run("compress", tiny_run, twin, *to_small)
    with pytest.raises(InputError, match=r"1\.hq exists already"):
        run("compress", tiny_run, twin, *to_small)
