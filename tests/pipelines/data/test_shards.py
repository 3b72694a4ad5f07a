"""Images in tar shards: found by their index, here or elsewhere, whole or damaged."""

import http.server
import io
import itertools
import logging
import os
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.config import DataConfig
from pipelines.data import remote, shard_cache
from pipelines.data.batches import BatchOrder
from pipelines.data.cache import write_entry
from pipelines.data.dataset import ImageDataset
from pipelines.data.encoded_images import EncodedImages
from pipelines.data.shard_index import Indexed, index_shards
from pipelines.data.sources import load_images
from pipelines.data_config import ReadingConfig
from pipelines.index_config import IndexShardsConfig
from pipelines.training.loading import loading
from tests.image_files import noise
from tokenizer.storage.errors import InputError

Members = list[tuple[str, bytes]]


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 8, seed=seed)).save(buffer, "PNG")
    return buffer.getvalue()


def members(first: int, count: int) -> Members:
    return [
        (f"set/{number:03}.{field}", content)
        for number in range(first, first + count)
        for field, content in (
            ("png", png(number)),
            ("cls", str(number % 3 * 5).encode()),
            ("txt", f"picture {number}\n".encode()),
        )
    ]


def tar(parts: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content in parts:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number:02}.tar").write_bytes(tar(members(4 * number, 4)))
    return folder


def index(tmp_path: Path, shards: object, **options: Any) -> Indexed:
    fields = {"label_field": "cls", "caption_field": "txt", **options}
    return index_shards(
        IndexShardsConfig(shards=str(shards), output_dir=tmp_path / "index", **fields)
    )


def opened(tmp_path: Path, split: Any = "train", gigabytes: float = 1, **fields: Any) -> Any:
    reading = ReadingConfig(shard_cache_gb=gigabytes)
    defaults = {"root": tmp_path / "index", "cache_dir": tmp_path / "cache", "image_size": 8}
    config = DataConfig(dataset="shards", reading=reading, validation_share=0.3, **defaults)
    return load_images(config.model_copy(update=fields), split)


def seeds_of(dataset: ImageDataset) -> list[int]:
    """Which pictures they are."""
    images = dataset.images_at(np.arange(len(dataset))).permute(0, 2, 3, 1).numpy()
    known = {noise(8, 8, seed=seed).tobytes(): seed for seed in range(12)}
    return [known[image.tobytes()] for image in images]


def test_each_image_is_in_one_split_with_its_class_and_caption(
    tmp_path: Path, shards: Path
) -> None:
    found = index(tmp_path, shards)
    assert (found.num_images, found.num_shards, found.class_names) == (12, 3, ("0", "5", "10"))
    splits = [opened(tmp_path, split) for split in ("train", "validation")]
    for dataset in splits:
        assert isinstance(dataset, EncodedImages)
        assert isinstance(dataset, ImageDataset)
        assert dataset.labels.tolist() == [seed % 3 for seed in seeds_of(dataset)]
        assert dataset.captions() == [f"picture {seed}" for seed in seeds_of(dataset)]
    assert sorted(seeds_of(splits[0]) + seeds_of(splits[1])) == list(range(12))
    assert len({dataset.fingerprint for dataset in splits}) == 2


def test_a_set_of_its_own_is_for_validation_and_the_content_is_known_wherever_it_lies(
    tmp_path: Path, shards: Path
) -> None:
    index(tmp_path, shards, label_field="", caption_field="")
    shards.rename(tmp_path / "moved")
    moved = tmp_path / "moved_index"
    config = IndexShardsConfig(shards=str(tmp_path / "moved" / "*.tar"), output_dir=moved)
    index_shards(config)
    (tmp_path / "moved").rename(shards)
    whole = opened(tmp_path, validation_root=moved)
    assert seeds_of(whole) == list(range(12))
    assert whole.class_names == ()
    (shards).rename(tmp_path / "moved")
    again = opened(tmp_path, "validation", root=moved, validation_root=moved)
    assert again.fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("parts", "options", "reason"),
    [
        ([("1.cls", b"0"), ("1.txt", b"")], {}, "must have one image, has none"),
        ([("1.jpg", b""), ("1.png", b"")], {}, "has several, jpg and png: give --image-field"),
        ([("1.png", b"")], {}, "has no field cls of text"),
        ([("1.png", b""), ("1.cls", b"0")], {}, "has no field txt"),
    ],
)
def test_a_sample_without_a_part_is_named_or_left_out_and_counted(
    parts: Members, options: dict[str, Any], reason: str, tmp_path: Path, shards: Path
) -> None:
    (shards / "03.tar").write_bytes(tar(parts))
    with pytest.raises(InputError, match=f"^1 in .*03.tar .*{re.escape(reason)}"):
        index(tmp_path, shards, **options)
    found = index(tmp_path, shards, skip_unreadable=True, **options)
    assert found.num_images == 12
    assert len(found.left_out) == 1


def test_the_image_of_several_is_the_field_that_is_named(tmp_path: Path, shards: Path) -> None:
    (shards / "03.tar").write_bytes(tar([("1.mask.png", b""), ("1.jpg", b""), *members(1, 1)]))
    index(tmp_path, shards, image_field="png", skip_unreadable=True)
    assert opened(tmp_path, skip_unreadable=True).store.count == 13


@pytest.mark.parametrize("damage", ["cut", "header", "no tar", "no end"])
def test_a_damaged_shard_is_named_or_kept_up_to_the_damage(
    damage: str, tmp_path: Path, shards: Path
) -> None:
    path = shards / "01.tar"
    content = bytearray(path.read_bytes())
    second = next(
        place
        for place in range(512, len(content), 512)
        if content[place:].startswith(b"set/006.png")
    )
    if damage == "cut":
        content = content[: second + 600]
    elif damage == "header":
        content[second + 150] ^= 1
    elif damage == "no end":
        content = content[: len(bytes(content).rstrip(b"\0")) // 512 * 512 + 512]
    else:
        content = bytearray(b"no tar")
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"01\.tar cannot be read to its end: .*skip-unreadable"):
        index(tmp_path, shards)
    found = index(tmp_path, shards, skip_unreadable=True)
    # The one before the damage may have lost a part: only whole samples count.
    assert found.num_images == {"cut": 9, "header": 9, "no tar": 8, "no end": 11}[damage]


def test_a_shard_that_is_gone_or_cut_short_is_named_or_its_images_are_left_out(
    tmp_path: Path, shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index(tmp_path, shards)
    (shards / "00.tar").unlink()
    os.truncate(shards / "02.tar", 2_000)
    with pytest.raises(InputError, match=r"^data\.root: the shard .*00\.tar is missing"):
        opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        splits = [opened(tmp_path, own, skip_unreadable=True) for own in ("train", "validation")]
    assert sorted(seeds_of(splits[0]) + seeds_of(splits[1])) == [4, 5, 6, 7]
    assert "02.tar, which has 2,000 bytes, the index says" in caplog.text


def test_what_is_no_index_or_no_shards_is_refused(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(InputError, match=r"^data\.root: .* is no index of shards"):
        opened(tmp_path, root=shards)
    with pytest.raises(InputError, match=r"^SHARDS: there are no \.tar files in"):
        index(tmp_path, tmp_path / "none")
    index(tmp_path, shards)
    with pytest.raises(InputError, match=r"^output_dir: .* exists already"):
        index(tmp_path, shards)


# Elsewhere


@pytest.fixture
def in_memory(shards: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for path in shards.iterdir():
        system.pipe_file(f"/set/{path.name}", path.read_bytes())
        path.unlink()
    yield "memory://set"
    system.rm("/set", recursive=True)


def test_shards_elsewhere_are_kept_here_up_to_a_bound(tmp_path: Path, in_memory: str) -> None:
    index(tmp_path, in_memory)
    size = len(tar(members(0, 4)))
    dataset = opened(tmp_path, gigabytes=2.5 * size / 1e9)
    assert all(seed < 12 for seed in seeds_of(dataset))
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) == 2
    fsspec.filesystem("memory").rm("/set/00.tar")
    fsspec.filesystem("memory").rm("/set/01.tar")
    assert seeds_of(opened(tmp_path, gigabytes=2.5 * size / 1e9)) == seeds_of(dataset)


def test_workers_read_shards_elsewhere_from_any_step_on(tmp_path: Path, in_memory: str) -> None:
    index(tmp_path, in_memory)
    dataset = opened(tmp_path)

    class Reader:
        encoded, is_scattered = dataset, False

        def loaded(self, images: torch.Tensor, is_flipped: np.ndarray) -> torch.Tensor:
            return images

        def load(self, items: np.ndarray, is_flipped: np.ndarray) -> None: ...

    order = BatchOrder(len(dataset), 4, seed=0)
    tasks = loading(Reader(), order, range(3, 5), 1, torch.device("cpu"))
    for step, task in enumerate(tasks, 3):
        assert torch.equal(task(), dataset.images_at(order.at(step)[0]))


def test_a_full_disk_says_what_to_do_in_one_line(
    tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path, in_memory)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_cache, "read_range", fail)
    with pytest.raises(InputError, match=r"^data\.cache_dir: no room in .*shard_cache_gb$"):
        seeds_of(opened(tmp_path))
    assert not list((tmp_path / "cache" / "shards").glob("*.[tp]*"))


def test_what_stops_answering_is_asked_three_times_in_bounded_time(
    tmp_path: Path, in_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index(tmp_path, in_memory)
    tries = itertools.count()

    def wait(*_: object, **__: object) -> bytes:
        next(tries)
        time.sleep(2)
        return b""

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", wait)
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.05)
    with pytest.raises(InputError, match=r"does not answer: 3 tries of at most 0\.05 s"):
        opened(tmp_path, gigabytes=0).store.read(0)
    assert next(tries) == 3


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests for parts of files."""

    files: dict[str, bytes]
    ranges: list[str]

    def do_HEAD(self) -> None:
        self._answer(False)

    def do_GET(self) -> None:
        self._answer(True)

    def _answer(self, has_body: bool) -> None:
        content = self.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        body = content[int(asked[1]) : int(asked[2]) + 1] if asked else content
        if asked:
            self.ranges.append(asked[0])
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{asked[2]}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_shards_come_by_http_in_ranges(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("aiohttp")
    Handler.files = {f"/{path.name}": path.read_bytes() for path in shards.iterdir()}
    Handler.ranges = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        index(tmp_path, f"{address}/{{00..02}}.tar")
        asked = len(Handler.ranges)
        dataset = opened(tmp_path, gigabytes=0)
        assert dataset.labels.tolist() == [seed % 3 for seed in seeds_of(dataset)]
        assert len(Handler.ranges) == asked + len(dataset)
        missing = tmp_path / "other"
        with pytest.raises(InputError, match=r"03\.tar cannot be read to its end"):
            index_shards(IndexShardsConfig(shards=f"{address}/{{02..03}}.tar", output_dir=missing))
        Handler.files.clear()
        with pytest.raises(InputError, match=r"00\.tar/set/.* is not a readable image"):
            seeds_of(dataset)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_million_images_are_opened_without_an_object_for_each(tmp_path: Path) -> None:
    import tracemalloc

    count, folder = 10**6, tmp_path / "index"
    folder.mkdir()
    (tmp_path / "0.tar").write_bytes(tar(members(0, 1)))
    np.save(folder / "names.npy", np.zeros(8 * count, np.uint8) + ord("a"))
    np.save(folder / "name_ends.npy", np.arange(1, count + 1) * 8)
    for name, kind in (("offsets", "i8"), ("sizes", "i8"), ("labels", "i4"), ("shards", "i4")):
        np.save(folder / f"{name}.npy", np.zeros(count, kind))
    size = (tmp_path / "0.tar").stat().st_size
    shards = {"shards": [str(tmp_path / "0.tar")], "shard_sizes": [size]}
    write_entry(folder, {**shards, "num_images": count, "class_names": ["a"], "content": "a"})
    tracemalloc.start()
    dataset = opened(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20 * count  # a tenth of it is what ten million may take
    assert len(dataset) > 600_000


def test_damaged_pixels_are_an_error_that_names_shard_and_file(
    tmp_path: Path, shards: Path
) -> None:
    content = (shards / "00.tar").read_bytes()
    (shards / "00.tar").write_bytes(content.replace(b"IDAT", b"IDOT"))
    index(tmp_path, shards)
    with pytest.raises(InputError, match=r"00\.tar/set/00\d\.png is not a readable image"):
        seeds_of(opened(tmp_path))
    kept = opened(tmp_path, skip_unreadable=True)
    assert [seed % 3 for seed in seeds_of(kept)] == kept.labels.tolist()
    assert min(seeds_of(kept)) >= 4
