"""The pipeline object: what it draws, keeps, refuses and saves."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipelines.class_labels import class_number
from pipelines.generation import ImageGenerationPipeline
from prior import Prior, PriorConfig
from tokenizer import Tokenizer
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig
from tokenizer.storage.errors import InputError


def drawn(pipeline: ImageGenerationPipeline, num_images: int, **arguments: Any) -> torch.Tensor:
    images = pipeline(num_images, progress=False, output="tensor", **arguments)
    assert isinstance(images, torch.Tensor)
    return images


def small_pipeline(pipeline: ImageGenerationPipeline, channels: int = 3) -> ImageGenerationPipeline:
    """An untrained one without classes."""
    networks = NetworkConfig(width=8, max_width=8, num_blocks=1)
    tokenizer = Tokenizer(hq_vae((8, 4), (1, 1), 8, 4, networks=networks, channels=channels))
    prior = Prior(
        PriorConfig(
            network=pipeline.prior.config.network,
            code_maps=tokenizer.code_maps(16, 16),
            tokenizer_hash=tokenizer.content_hash(),
        )
    )
    prior.load_code_vectors(tokenizer.code_vectors())
    return ImageGenerationPipeline(tokenizer, prior)


def test_an_image_depends_on_seed_number_and_label_alone(
    pipeline: ImageGenerationPipeline,
) -> None:
    images = drawn(pipeline, 7, seed=3)
    assert images.shape == (7, 3, 16, 16)
    assert images.dtype == torch.uint8
    for batch_size in (1, 2, 5):
        assert torch.equal(drawn(pipeline, 7, seed=3, batch_size=batch_size), images)
    assert torch.equal(drawn(pipeline, 3, seed=3), images[:3])
    (share,) = pipeline.draw([5, 2], [5, 2], seed=3)
    assert torch.equal(share, images[[5, 2]])
    assert not torch.equal(drawn(pipeline, 7, seed=4), images)


def test_without_labels_the_classes_come_in_turn(pipeline: ImageGenerationPipeline) -> None:
    labels = [number % 8 for number in range(10)]
    assert torch.equal(drawn(pipeline, 10), drawn(pipeline, 10, labels=labels))
    assert torch.equal(drawn(pipeline, 3, labels=2), drawn(pipeline, 3, labels=[2, 2, 2]))
    condition = torch.tensor(labels)
    assert torch.equal(drawn(pipeline, 10, condition=condition), drawn(pipeline, 10))


def test_a_class_is_meant_by_its_name_or_its_number(pipeline: ImageGenerationPipeline) -> None:
    names = pipeline.prior.config.class_names
    assert len(set(names)) == 8
    expected = drawn(pipeline, 3, labels=[5, 2, 0])
    for labels in ([names[5], 2, "0"], torch.tensor([5, 2, 0])):
        assert torch.equal(drawn(pipeline, 3, labels=labels), expected)
    assert torch.equal(drawn(pipeline, 2, labels=names[5]), drawn(pipeline, 2, labels=5))
    fields = {"code_maps": pipeline.prior.config.code_maps, "num_classes": 3}
    numbers = PriorConfig(**fields, class_names=("1", "2", "10"))
    assert class_number("2", numbers) == 1  # the name
    assert class_number("0", numbers) == 0  # no name
    twins = PriorConfig(**fields, class_names=("crane", "crane", "tern"))
    with pytest.raises(InputError, match=r"'crane' names several .* number of \[0, 1\]"):
        class_number("crane", twins)
    with pytest.raises(InputError, match=r"'crane': this prior was saved without names"):
        class_number("crane", PriorConfig(**fields))
    for wrong in (("a",), ("a", "b", "c" * 2**20)):
        with pytest.raises(ValidationError, match="class_names must h"):
            PriorConfig(**fields, class_names=wrong)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_pipeline_of_16_bits_draws_saves_and_loads(
    pipeline: ImageGenerationPipeline, tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline.save_pretrained(tmp_path / "whole")
    cast = ImageGenerationPipeline.from_pretrained(tmp_path / "whole", dtype=dtype)
    cast.save_pretrained(tmp_path / "cast")
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path / "cast")
    models = (loaded.tokenizer, loaded.prior)
    assert {own.dtype for model in models for own in model.parameters()} == {dtype}
    assert torch.equal(drawn(loaded, 3), drawn(cast, 3))
    size = (tmp_path / "cast/prior/model.safetensors").stat().st_size
    assert size < 0.7 * (tmp_path / "whole/prior/model.safetensors").stat().st_size
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    reconstructions = loaded.reconstruct(images)
    assert reconstructions.dtype == torch.float32
    assert torch.equal(loaded.decode(loaded.encode(images)), reconstructions)
    for own, other in zip(loaded.encode(images), pipeline.encode(images), strict=True):
        assert (own == other).double().mean() > 0.9
    Prior.from_pretrained(tmp_path / "whole/prior", dtype).save_pretrained(tmp_path / "cast/prior")
    with pytest.raises(InputError, match="prior does not belong to tokenizer"):
        ImageGenerationPipeline.from_pretrained(tmp_path / "cast")


def test_a_pipeline_saved_and_loaded_draws_the_same_images(
    pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["README.md", "prior", "tokenizer"]
    loaded = ImageGenerationPipeline.from_pretrained(str(tmp_path / "saved"))
    assert torch.equal(drawn(loaded, 3), drawn(pipeline, 3))


def test_known_codes_are_kept(pipeline: ImageGenerationPipeline) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    known = pipeline.encode(images)
    all_known = drawn(pipeline, 2, known=known)
    decoded = ((pipeline.decode(known) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(all_known, decoded)
    coarse = [known[0], torch.full_like(known[1], -1)]
    assert not torch.equal(drawn(pipeline, 2, known=coarse), decoded)
    for batch_size in (1, 2):
        with pytest.raises(InputError, match=r"known must hold 3 images.*, got 2"):
            drawn(pipeline, 3, known=known, batch_size=batch_size)
        with pytest.raises(InputError, match=r"known must hold 1 images.*, got 2"):
            drawn(pipeline, 1, known=known, batch_size=batch_size)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_images_have_the_mode_of_their_channels(
    pipeline: ImageGenerationPipeline, channels: int, mode: str
) -> None:
    small = small_pipeline(pipeline, channels)
    images = small(2, progress=False)
    assert isinstance(images, list)
    assert [image.mode for image in images] == [mode] * 2
    expected = drawn(small, 2)[1].movedim(0, -1).numpy()
    np.testing.assert_array_equal(np.asarray(images[1]).reshape(16, 16, channels), expected)


def test_images_are_encoded_decoded_and_reconstructed(pipeline: ImageGenerationPipeline) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    indices = pipeline.encode(images)
    assert [group.shape for group in indices] == [(2, 2, 2, 2), (2, 1, 4, 4)]
    torch.testing.assert_close(pipeline.decode(indices), pipeline.reconstruct(images))
    assert not torch.equal(pipeline.decode(indices, 1), pipeline.decode(indices))
    assert pipeline.to("cpu").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be >= 1, got 0"),
        ({"labels": 8}, r"labels must lie in \[0, 8\), got 8"),
        ({"labels": [0]}, "labels must have 2 entries, got 1"),
        ({"labels": [0, None]}, "labels must be numbers or names of classes, got None"),
        ({"labels": True}, "labels must be numbers or names of classes, got True"),
        ({"labels": 1.5}, "labels must be numbers or names of classes, got 1.5"),
        ({"labels": "Squar"}, "no class is called 'Squar'; did you mean 'square'"),
        ({"labels": ["qqqq", 1]}, "no class is called 'qqqq'; there are 0 disc, 1 square, "),
        ({"condition": "a star"}, "condition must be None .* takes labels, got 'a star'"),
        ({"num_images": "3"}, "num_images must be a whole number, got '3'"),
        ({"seed": [1, 2]}, r"seed must be a whole number, got \[1, 2\]"),
        ({"temperature": "hot"}, "temperature.*valid number, got 'hot'"),
        ({"known": torch.zeros(2)}, "known must be a list of int64 tensors .* got Tensor"),
        ({"condition": 3}, "^condition must be None .* takes labels, got 3"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"temperature": 0.0}, "temperature.*or equal to 0.000001"),
        ({"temperature": [1.0, 1.0]}, "temperature must hold 3 values"),
        ({"top_k": 0}, "top_k.*greater than 0"),
        ({"top_p": 1.5}, "top_p.*less than or equal to 1"),
        ({"guidance_scale": -1.0}, "guidance_scale.*greater than or equal to 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_refused_on_one_line(
    pipeline: ImageGenerationPipeline,
    arguments: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    call = inspect.unwrap(ImageGenerationPipeline.__call__)  # without the tests' type checker
    for name in ("_draw", "_sample"):
        bare = inspect.unwrap(getattr(ImageGenerationPipeline, name))
        monkeypatch.setattr(ImageGenerationPipeline, name, bare)
    with pytest.raises(InputError, match=message) as caught:
        call(pipeline, **{"num_images": 2, "progress": False, **arguments})
    assert "\n" not in str(caught.value)


def test_another_kind_of_output_is_refused(pipeline: ImageGenerationPipeline) -> None:
    call = inspect.unwrap(ImageGenerationPipeline.__call__)  # without the tests' type checker
    with pytest.raises(InputError, match=r"output must be 'pil', 'np', .* got 'numpy'"):
        call(pipeline, 1, output="numpy")


def test_settings_may_differ_by_layer(pipeline: ImageGenerationPipeline) -> None:
    likeliest = drawn(pipeline, 4, top_k=1)
    assert torch.equal(drawn(pipeline, 4, top_k=[1, 1, 1], temperature=[9.0, 1.0, 0.1]), likeliest)
    assert not torch.equal(drawn(pipeline, 4, top_k=[1, 1, None]), likeliest)


def test_guidance_is_for_a_conditional_prior_alone(pipeline: ImageGenerationPipeline) -> None:
    assert torch.equal(drawn(pipeline, 4, guidance_scale=1.0), drawn(pipeline, 4))
    assert not torch.equal(drawn(pipeline, 8, guidance_scale=30.0), drawn(pipeline, 8))
    with pytest.raises(InputError, match="guidance_scale must be 1 without labels"):
        drawn(small_pipeline(pipeline), 1, guidance_scale=2.0)


def test_an_unconditional_prior_takes_no_labels(pipeline: ImageGenerationPipeline) -> None:
    small = small_pipeline(pipeline)
    assert drawn(small, 2).shape == (2, 3, 16, 16)
    with pytest.raises(InputError, match="labels must be None for a prior without classes, got 1"):
        small(2, 1, progress=False)


def test_a_changed_weight_makes_another_tokenizer(
    pipeline: ImageGenerationPipeline, tmp_path: Path
) -> None:
    pipeline.save_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "tokenizer")
    next(tokenizer.parameters()).data[0] += 1e-6
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(InputError, match="prior does not belong to tokenizer"):
        ImageGenerationPipeline.from_pretrained(tmp_path)


def test_models_in_training_mode_are_put_to_use(pipeline: ImageGenerationPipeline) -> None:
    expected = drawn(pipeline, 2)
    again = ImageGenerationPipeline(pipeline.tokenizer.train(), pipeline.prior.train())
    assert torch.equal(drawn(again, 2), expected)
