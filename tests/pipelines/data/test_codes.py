"""The code cache: whole, keyed by what it was made from, and made once."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pipelines.data.codes import CodeDataset, extract_codes, finished_entries
from pipelines.data.dataset import ImageDataset
from pipelines.data.decoded_images import DecodedImages
from pipelines.data.sources import load_images
from pipelines.images import to_float
from pipelines.presets import TOKENIZER_PRESETS
from tests.tiny_runs import tokenizer_run
from tokenizer import Tokenizer
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tiny_run: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")


@pytest.fixture(scope="module")
def images(cache_dir: Path) -> ImageDataset:
    return load_images(tokenizer_run(Path(), cache_dir).data, "train")


def extract(
    tokenizer: Tokenizer,
    images: ImageDataset,
    folder: Path,
    flips: bool = False,
    keeps_latents: bool = False,
    search: SearchConfig = NO_SEARCH,
) -> CodeDataset:
    return extract_codes(
        *(tokenizer, images, folder, Accelerator()),
        flips=flips,
        keeps_latents=keeps_latents,
        search=search,
    )


def encoded(tokenizer: Tokenizer, images: ImageDataset, flipped: bool = False) -> list[np.ndarray]:
    batch = to_float(images.images_at(np.arange(len(images))))
    codes = tokenizer.encode(batch.flip(-1) if flipped else batch)
    return [group.numpy() for group in codes]


def test_the_cache_holds_the_codes_of_every_image_and_then_of_the_mirrored_ones(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    plain = extract(tokenizer, images, tmp_path)
    codes = extract(tokenizer, images, tmp_path, flips=True)
    count = len(images)
    for group, array in enumerate(codes.indices):
        assert isinstance(array, np.memmap)
        np.testing.assert_array_equal(array[:count], encoded(tokenizer, images)[group])
        np.testing.assert_array_equal(array[count:], encoded(tokenizer, images, True)[group])
        np.testing.assert_array_equal(array[:count], plain.indices[group])
    entries = np.array([5, 0, 5, count + 5])
    batch = codes.indices_at(entries)
    assert [group.dtype for group in batch] == [torch.int64] * 2
    assert torch.equal(batch[0][0], batch[0][2])
    assert codes.labels_at(entries).tolist() == images.labels[entries % count].tolist()
    assert codes.latents == []


def test_kept_latents_give_the_posterior_of_the_tokenizer(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    codes = extract(tokenizer, images, tmp_path, keeps_latents=True)
    entries = np.arange(10)
    batch = to_float(images.images_at(entries))
    encoding = tokenizer.encode_with_latents(batch)
    for ours, theirs in zip(codes.latents_at(entries), encoding.latents, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    posteriors = tokenizer.log_posteriors(codes.latents_at(entries), codes.indices_at(entries))
    for layers, group in zip(posteriors, encoding.indices, strict=True):
        agreements = [
            (layer.argmax(-1) == group[:, n]).float().mean() for n, layer in enumerate(layers)
        ]
        assert min(agreements) > 0.95


def test_another_tokenizer_other_images_or_options_make_another_cache(
    tokenizer: Tokenizer, images: ImageDataset, cache_dir: Path, tmp_path: Path
) -> None:
    other_tokenizer = Tokenizer(TOKENIZER_PRESETS["tiny"].tokenizer).eval()
    other_images = load_images(tokenizer_run(Path(), cache_dir).data, "validation")
    extract(tokenizer, images, tmp_path)
    extract(other_tokenizer, images, tmp_path)
    extract(tokenizer, other_images, tmp_path)
    extract(tokenizer, images, tmp_path, flips=True)
    extract(tokenizer, images, tmp_path, keeps_latents=True)
    keys = sorted(path.name for path in tmp_path.iterdir())
    assert len(keys) == 5
    facts = [json.loads((tmp_path / key / "facts.json").read_text()) for key in keys]
    assert {own["tokenizer"] for own in facts} == {
        tokenizer.identity_hash(),
        other_tokenizer.identity_hash(),
    }
    assert {own["data"] for own in facts} == {images.fingerprint, other_images.fingerprint}


def test_searched_codes_have_a_cache_of_their_own(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    search = SearchConfig(candidates=3)
    codes = extract(tokenizer, images, tmp_path, search=search)
    extract(tokenizer, images, tmp_path)
    extract(tokenizer, images, tmp_path, search=SearchConfig(candidates=2))
    assert len(list(tmp_path.iterdir())) == 3
    batch = to_float(images.images_at(np.arange(len(images))))
    expected = tokenizer.encode(batch, search)
    for found, group in zip(codes.indices, expected, strict=True):
        np.testing.assert_array_equal(found, group.numpy())
    assert any(
        (found != plain).any()
        for found, plain in zip(codes.indices, encoded(tokenizer, images), strict=True)
    )


def test_codes_are_taken_from_the_cache_whatever_the_decoder_and_the_version(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    earlier = copy.deepcopy(tokenizer)
    earlier.identities = lambda: (tokenizer.content_hash(),)  # type: ignore[method-assign]
    before = extract(earlier, images, tmp_path)
    tuned = copy.deepcopy(tokenizer)
    with torch.no_grad():
        tuned.last_decoder_weight.add_(1)
    tuned.take_place_of(tokenizer)
    assert not before.latents
    for other in (tokenizer, tuned):
        extract(other, images, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


class InterruptedImages(DecodedImages):
    """Images of which the last ones cannot be read."""

    def images_at(self, item_indices: np.ndarray) -> torch.Tensor:
        if len(self) - 1 in item_indices:
            raise KeyboardInterrupt
        return super().images_at(item_indices)


def test_an_interrupted_extraction_is_not_taken_for_whole(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    interrupted = InterruptedImages(**vars(images))
    with pytest.raises(KeyboardInterrupt):
        extract(tokenizer, interrupted, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
    codes = extract(tokenizer, images, tmp_path)
    np.testing.assert_array_equal(codes.indices[1], encoded(tokenizer, images)[1])
    assert [path.suffix for path in tmp_path.iterdir()] == [""]


class CountedImages(DecodedImages):
    """Images that count how many of them are read."""

    count = 0

    def images_at(self, item_indices: np.ndarray) -> torch.Tensor:
        type(self).count += len(item_indices)
        return super().images_at(item_indices)


def test_an_interrupted_extraction_goes_on_and_its_finished_codes_are_readable_meanwhile(
    tokenizer: Tokenizer,
    images: ImageDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipelines.data.codes._ENTRIES_PER_BLOCK", 7)
    with pytest.raises(KeyboardInterrupt):
        extract(tokenizer, InterruptedImages(**vars(images)), tmp_path)
    (folder,) = tmp_path.iterdir()
    finished = finished_entries(folder)
    assert 0 < len(finished) < len(images)
    indices = np.load(folder / "indices_1.npy", mmap_mode="r")
    expected = encoded(tokenizer, images)[1]
    np.testing.assert_array_equal(indices[finished], expected[finished])
    counted = CountedImages(**vars(images))
    codes = extract(tokenizer, counted, tmp_path)
    assert counted.count == len(images) - len(finished) + 1  # one for their shape
    np.testing.assert_array_equal(codes.indices[1], expected)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_of_other_codes_is_refused_by_name(
    tokenizer: Tokenizer, images: ImageDataset, tmp_path: Path
) -> None:
    extract(tokenizer, images, tmp_path)
    (folder,) = tmp_path.iterdir()
    extract(tokenizer, images, tmp_path, flips=True)
    (other,) = set(tmp_path.iterdir()) - {folder}
    for path in folder.iterdir():
        path.write_bytes((other / path.name).read_bytes())
    message = f"does not hold the codes of this tokenizer and data; delete {folder} and start"
    with pytest.raises(InputError, match=f"{folder} {message}"):
        extract(tokenizer, images, tmp_path)
