"""What is cached, decoded images and codes: whole or refused, and not read at each start."""

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator

from pipelines.config import DataConfig
from pipelines.data.cache import open_entry, verify_cache
from pipelines.data.codes import extract_codes
from pipelines.data.decoded_images import ImageBlock, ImageSource, load_or_store
from pipelines.data.shapes import CLASS_NAMES, draw_shapes
from pipelines.data.sources import load_images
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.run.manifest import read_manifest, write_manifest
from tests.image_files import empty, flip_bit, truncate
from tokenizer import Tokenizer
from tokenizer.storage.errors import InputError


def open_images(cache_dir: Path) -> object:
    return load_images(DataConfig(num_images=20, image_size=16, cache_dir=cache_dir), "train")


@pytest.fixture(scope="module")
def open_codes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], object]:
    images = load_images(
        DataConfig(num_images=20, image_size=16, cache_dir=tmp_path_factory.mktemp("images")),
        "train",
    )
    tokenizer = Tokenizer(TOKENIZER_PRESETS["tiny"].tokenizer).eval()
    return lambda folder: extract_codes(
        tokenizer, images, folder, Accelerator(), flips=False, keeps_latents=True
    )


@pytest.fixture(params=["images", "codes"])
def open_cached(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    """Makes or opens an entry in the given folder."""
    return open_images if request.param == "images" else request.getfixturevalue("open_codes")


@pytest.fixture
def entry(
    open_cached: Callable[[Path], object], tmp_path: Path, request: pytest.FixtureRequest
) -> Path:
    cache_dir = tmp_path / request.node.callspec.params["open_cached"]
    open_cached(cache_dir)
    (folder,) = cache_dir.iterdir()
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of each file."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def damage_unseen(path: Path, place: int) -> None:
    """As a disk does that rots: size and time stay."""
    status = path.stat()
    flip_bit(path, place)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# Opening


def test_opening_again_changes_nothing(open_cached: Callable[[Path], object], entry: Path) -> None:
    before = snapshot(entry)
    open_cached(entry.parent)
    assert snapshot(entry) == before


def shift_byte(path: Path) -> None:
    flip_bit(path, -9)
    os.utime(path, ns=(0, 10**9))  # another time, however coarse the clock of the disk is


@pytest.mark.parametrize("damage", [shift_byte, truncate, empty, Path.unlink])
def test_a_damaged_file_is_refused_by_name(
    damage: Callable[[Path], None], open_cached: Callable[[Path], object], entry: Path
) -> None:
    for path in sorted(entry.iterdir()):
        if (path.name, damage, entry.parent.name) == ("facts.json", Path.unlink, "codes"):
            continue  # they are extracted once more
        whole, time = path.read_bytes(), path.stat().st_mtime_ns
        damage(path)
        message = rf"^{path} is damaged: .+; delete {entry} and start again$"
        with pytest.raises(InputError, match=message):
            open_cached(entry.parent)
        path.write_bytes(whole)
        os.utime(path, ns=(time, time))
    open_cached(entry.parent)


def test_a_flipped_bit_that_leaves_size_and_time_alone_shows_when_the_cache_is_verified(
    open_cached: Callable[[Path], object], entry: Path
) -> None:
    largest = max(entry.glob("*.npy"), key=lambda path: path.stat().st_size)
    assert list(verify_cache(entry.parent)) == [(entry, "")]
    damage_unseen(largest, -9)
    open_cached(entry.parent)
    ((_, damage),) = verify_cache(entry.parent)
    assert damage.startswith(f"{largest} is damaged: ")
    # Its header is read at each start all the same.
    damage_unseen(largest, 30)
    with pytest.raises(InputError, match=f"^{largest} is damaged: .+; delete {entry} and start"):
        open_cached(entry.parent)


def test_only_entries_are_verified_and_there_must_be_one(entry: Path) -> None:
    for name in (".left.tmp", "notes"):
        (entry.parent / name).mkdir()
        (entry.parent / name / "images.txt").touch()
    (entry.parent / ".left.tmp" / "images.npy").touch()
    (entry / "facts.json").unlink()
    ((folder, damage),) = verify_cache(entry.parent)
    assert (folder, damage.split(": ")[0]) == (entry, f"{entry / 'facts.json'} is damaged")
    with pytest.raises(InputError, match=r"^cache_dir: .* holds no decoded images and no codes$"):
        list(verify_cache(entry / "none"))


# Copies, and what version 0.1 has left


def copy_without_times(entry: Path) -> None:
    shutil.copytree(entry, entry.with_name("copy"), copy_function=shutil.copyfile)
    shutil.rmtree(entry)
    entry.with_name("copy").rename(entry)


def write_as_version_01(entry: Path) -> None:
    manifest = read_manifest(entry / "facts.json")
    (entry / "facts.json").unlink()
    dropped = ("files", "sha256", "mtime_ns")
    metadata = {name: value for name, value in manifest.items() if name not in dropped}
    write_manifest(entry / "facts.json", metadata)
    assert "mtime_ns" not in read_manifest(entry / "facts.json")


@pytest.mark.parametrize("change", [copy_without_times, write_as_version_01])
def test_an_entry_without_its_times_is_compared_with_its_hashes_once(
    change: Callable[[Path], None], open_cached: Callable[[Path], object], entry: Path
) -> None:
    change(entry)
    open_cached(entry.parent)
    before = snapshot(entry)
    times = {name: time for name, (time, _) in before.items() if name != "facts.json"}
    assert read_manifest(entry / "facts.json")["mtime_ns"] == times
    open_cached(entry.parent)
    assert snapshot(entry) == before
    change(entry)
    damage_unseen(min(entry.glob("*.npy")), -9)
    with pytest.raises(InputError, match=f"{entry} and start again$"):
        open_cached(entry.parent)


def test_times_may_be_recorded_several_times_at_once(entry: Path) -> None:
    files = read_manifest(entry / "facts.json")["files"]
    for time in (1, 2, 3):
        for name in files:
            os.utime(entry / name, ns=(0, time))
        with ThreadPoolExecutor(6) as pool:
            opened = list(pool.map(open_entry, [entry] * 6))
        recorded = read_manifest(entry / "facts.json")
        assert recorded["files"] == files
        times = [manifest["mtime_ns"] for manifest in (*opened, recorded)]
        assert times == [dict.fromkeys(files, time)] * 7
        assert {path.name for path in entry.iterdir()} == {"facts.json", *files}


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing more bytes than that into a file fails, much as on a full disk.

    Not a fixture: the reports of pytest may go into a file, too.
    """
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_where_times_cannot_be_recorded_each_start_reads_all_and_says_so(
    open_cached: Callable[[Path], object],
    entry: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    copy_without_times(entry)
    before = snapshot(entry)
    for _ in range(2):
        caplog.clear()
        with files_up_to(10):
            open_cached(entry.parent)
        assert f"{entry}: cannot record that it is whole, so each start reads all" in caplog.text
    assert snapshot(entry) == before


# Writing


def test_the_fingerprint_is_that_of_images_labels_and_class_names(tmp_path: Path) -> None:
    dataset = load_images(DataConfig(num_images=3, image_size=4, cache_dir=tmp_path), "train")
    content = draw_shapes(0, "train", np.arange(3), 4, 3).tobytes()
    content += np.arange(3, dtype="<i8").tobytes()
    content += json.dumps([3, 4, 4, 3, *CLASS_NAMES]).encode()
    assert dataset.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"^data.cache_dir: .* cannot be written: "):
            load_images(DataConfig(cache_dir=cache_dir), "train")


def test_no_space_left_is_an_error_of_the_system_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    match = f"File too large: '{tmp_path}/shapes-train-"
    with files_up_to(100_000), pytest.raises(OSError, match=match):
        load_images(DataConfig(num_images=40, cache_dir=tmp_path), "train")
    assert list(tmp_path.iterdir()) == []


def test_writers_at_the_same_time_agree_and_the_first_wins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    everybody_is_writing = threading.Barrier(4, timeout=20)

    def blocks() -> Iterator[ImageBlock]:
        everybody_is_writing.wait()
        for number in range(50):
            yield ImageBlock(np.full((20, 8, 8, 3), number, np.uint8), np.zeros(20, np.int64))

    source = ImageSource("made", "made up", {}, lambda: (("a",), blocks()))
    with ThreadPoolExecutor(4) as pool:
        attempts = [pool.submit(load_or_store, tmp_path, source, (8, 8, 3)) for _ in range(4)]
    for attempt in attempts:
        np.testing.assert_array_equal(attempt.result().images[::20, 0, 0, 0], np.arange(50))
        assert attempt.result().class_names == ("a",)
    assert len(list(tmp_path.iterdir())) == 1
    assert caplog.text.count("was stored by another process meanwhile") == 3
