"""Laws of what codes say of pixels and classes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelines.data.shapes import draw_shapes
from pipelines.evaluation.code_statistics import (
    EncodedImages,
    class_counts,
    class_entropy,
    class_information,
    encode,
    errors_by_layer,
    nearest_others,
    same_class_chance,
    same_class_share,
    shared_codes,
)
from pipelines.evaluation.metrics import image_errors, reconstruction_metrics
from pipelines.images import to_float, to_uint8
from tests.tokenizer.tiny import make_tokenizer

NUM_CODES, NUM_CLASSES = 5, 3


def pairs(seed: int, num_images: int = 40) -> tuple[Tensor, Tensor]:
    """Codes of 2×2 maps that depend on the class, and classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(NUM_CLASSES, (num_images,), generator=generator)
    noise = torch.randint(NUM_CODES, (num_images, 2, 2), generator=generator)
    keeps = torch.rand(num_images, 2, 2, generator=generator) < 0.4
    return torch.where(keeps, labels.view(-1, 1, 1), noise), labels


@settings(max_examples=15)
@given(st.integers(0, 1000))
def test_plug_in_information_is_the_sum_over_all_pairs_of_code_and_class(seed: int) -> None:
    codes, labels = pairs(seed)
    joint = np.zeros((NUM_CLASSES, NUM_CODES))
    for image, label in zip(codes, labels, strict=True):
        for code in image.flatten():
            joint[label, code] += 1 / codes.numel()
    expected = sum(
        p * math.log2(p / (joint[row].sum() * joint[:, column].sum()))
        for (row, column), p in np.ndenumerate(joint)
        if p
    )
    assert class_information(codes, labels, NUM_CODES).plug_in_bits == pytest.approx(expected)
    counts = class_counts(codes, labels, NUM_CODES)
    assert np.allclose(counts.numpy()[: len(joint)], joint[: len(counts)] * codes.numel())


def test_codes_that_are_the_class_tell_all_of_it() -> None:
    labels = torch.arange(4).repeat(200)
    found = class_information(labels.view(-1, 1, 1).expand(-1, 2, 2), labels, 4)
    assert found.plug_in_bits == pytest.approx(2) == pytest.approx(class_entropy(labels))
    assert found.bits == found.plug_in_bits - found.shuffled_bits
    assert found.bits == pytest.approx(2, abs=0.02)


def test_independent_codes_tell_nothing_though_codes_of_an_image_are_alike() -> None:
    """All codes of an image are equal, so that a count of places would hide most of the bias."""
    found = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(32, (100, 1, 1), generator=generator).expand(-1, 4, 4)
        labels = torch.randint(5, (100,), generator=generator)
        found.append(class_information(codes, labels, 32))
    bias = np.mean([one.plug_in_bits for one in found])
    assert bias > 5 * 31 * 4 / (2 * 1600 * math.log(2))  # Miller-Madow of 1,600 places
    assert abs(np.mean([one.bits for one in found])) < 0.05 * bias


@pytest.fixture(scope="module")
def encoded() -> EncodedImages:
    tokenizer = make_tokenizer().eval()
    images = torch.from_numpy(draw_shapes(0, "train", np.arange(12), 16, 3)).movedim(-1, 1)
    return EncodedImages(images, encode(tokenizer, images), torch.arange(12) % 3)


def test_the_last_layer_has_the_errors_of_the_whole_reconstruction(encoded: EncodedImages) -> None:
    tokenizer = make_tokenizer().eval()
    errors = errors_by_layer(tokenizer, encoded)
    whole = to_uint8(tokenizer.reconstruct(to_float(encoded.images)))
    assert errors[-1] == reconstruction_metrics(image_errors(encoded.images, whole))
    assert len(errors) == len(tokenizer.codebook_sizes) == len(encoded.layers)


def test_images_share_all_codes_with_themselves_and_as_many_both_ways(
    encoded: EncodedImages,
) -> None:
    shares = shared_codes(encoded)
    assert torch.equal(shares.diag(), torch.ones(12))
    assert torch.allclose(shares, shares.T)
    expected = np.mean([(layer[3] == layer[7]).double().mean() for layer in encoded.layers])
    assert shares[3, 7].item() == pytest.approx(expected)


def test_the_nearest_is_another_and_chance_is_the_mean_over_all_others() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1])
    similarity = torch.rand(5, 5)
    neighbors = nearest_others(similarity, 9)
    assert neighbors.shape == (5, 4)
    for item, found in enumerate(neighbors):
        assert sorted(found.tolist()) == [one for one in range(5) if one != item]
        assert (similarity[item][found].diff() <= 0).all()
    same = [labels[i] == labels[j] for i in range(5) for j in range(5) if i != j]
    assert same_class_chance(labels) == pytest.approx(np.mean(same))
    assert same_class_share(torch.tensor([[1], [0], [1], [0], [3]]), labels) == 0.8
