"""Pictures to codes and back without a prior."""

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import ImageGenerationPipeline, TokenizerPipeline
from pipelines.evaluate import EvaluateConfig, ExtractorConfig, evaluate
from pipelines.images import to_float
from tests.image_files import noise
from tokenizer import Tokenizer
from tokenizer.search_config import SearchConfig
from tokenizer.storage.errors import InputError

V1 = Path(__file__).parent.parent / "fixtures" / "v1"


@pytest.fixture(scope="module")
def own(tiny_run: Path) -> TokenizerPipeline:
    return TokenizerPipeline.from_pretrained(tiny_run)


def assert_same_codes(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_training_saves_what_becomes_of_pictures(own: TokenizerPipeline, tmp_path: Path) -> None:
    assert own.image_size == 16
    tokenizer = own.tokenizer
    bare = tokenizer.config.model_copy(update={"preprocessing": None})
    copy = Tokenizer(bare)
    copy.load_state_dict(tokenizer.state_dict())
    assert copy.content_hash() == tokenizer.content_hash()
    copy.save_pretrained(tmp_path)
    unsized = TokenizerPipeline.from_pretrained(tmp_path)
    assert unsized.image_size is None
    picture = noise(30, 41)
    assert [own.shape for own in unsized.encode(picture)] == [(1, 2, 3, 5), (1, 1, 6, 10)]
    assert_same_codes(unsized.encode(picture), own.encode(picture, image_size="original"))
    assert_same_codes(unsized.encode(picture, image_size=16), own.encode(picture))


def test_an_old_folder_takes_the_size_of_its_prior() -> None:
    whole = ImageGenerationPipeline.from_pretrained(V1 / "pipeline")
    assert whole.image_size == 16
    alone = TokenizerPipeline.from_pretrained(V1 / "pipeline")
    assert alone.image_size is None
    assert_same_codes(whole.encode(noise(20, 30)), alone.encode(noise(20, 30), image_size=16))
    assert "center cropped to multiples of 8 pixels" in repr(alone)


def test_a_tokenizer_is_found_wherever_it_lies(
    own: TokenizerPipeline, tiny_run: Path, tmp_path: Path
) -> None:
    own.save_pretrained(tmp_path)
    places = (tiny_run / "tokenizer", tiny_run / "tokenizer" / "model", tmp_path)
    for folder in (*places, str(tmp_path / "tokenizer")):
        loaded = TokenizerPipeline.from_pretrained(folder, device="cpu", dtype=torch.bfloat16)
        assert loaded.dtype == torch.bfloat16
        assert loaded.tokenizer.has_hash(own.tokenizer.content_hash())


def test_output_comes_in_the_kind_that_is_asked_for(own: TokenizerPipeline) -> None:
    picture = noise(16, 16)
    floats = own.reconstruct(own.preprocess(picture))
    assert isinstance(floats, torch.Tensor)
    assert floats.is_floating_point()
    pixels = own.reconstruct(picture, output="pt")
    assert torch.equal(pixels, ((floats + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    array = own.reconstruct(picture, output="np")
    np.testing.assert_array_equal(array, pixels.movedim(1, -1))
    for images in (own.reconstruct(picture), own.decode(own.encode(picture), output="pil")):
        assert isinstance(images, list)
        np.testing.assert_array_equal(np.asarray(images[0]), array[0])
    # What comes out goes in again.
    for output in ("pil", "np", "pt"):
        again = own.encode(own.decode(own.encode(picture), output=output))
        assert_same_codes(again, own.encode(to_float(pixels)))
    coarse = own.reconstruct(picture, num_layers=1, output="pt")
    assert torch.equal(coarse, own.decode(own.encode(picture), 1, output="pt"))


def test_a_search_finds_codes_that_draw_pictures_better(own: TokenizerPipeline) -> None:
    images = own.preprocess([noise(16, 16, seed=seed) for seed in range(3)])
    search = SearchConfig(candidates=4)
    found = own.reconstruct(images, search=search)
    assert torch.equal(found, own.decode(own.encode(images, search=search)))
    plain = own.reconstruct(images)
    errors = [(own_images - images).square().sum((1, 2, 3)) for own_images in (plain, found)]
    assert (errors[1] <= errors[0]).all()
    assert (errors[1] < errors[0]).any()


def test_a_tensor_is_not_resized(own: TokenizerPipeline) -> None:
    images = torch.zeros(1, 3, 32, 32)
    assert own.preprocess(images, 32) is images
    with pytest.raises(InputError, match="image_size must be None for a tensor of another, got 16"):
        own.encode(images, image_size=16)


def test_features_are_the_chosen_code_vectors(own: TokenizerPipeline) -> None:
    pictures = [noise(16, 16, seed=seed) for seed in range(3)]
    features, indices = own.features(pictures), own.encode(pictures)
    vectors = own.tokenizer.code_vectors()
    for group, (found, codes) in enumerate(zip(features.maps, indices, strict=True)):
        assert found.shape == (3, own.tokenizer.config.groups[group].code_dim, *codes.shape[2:])
        expected = sum(vectors[group][n][codes[2, n, 1, 0]] for n in range(codes.shape[1]))
        torch.testing.assert_close(found[2, :, 1, 0], expected)
    expected = torch.cat([own.mean((2, 3)) for own in features.maps], 1)
    assert torch.equal(features.pooled, expected)


def test_a_path_between_pictures_ends_in_their_reconstructions(own: TokenizerPipeline) -> None:
    first, second = noise(20, 30), Image.new("RGB", (16, 16), "teal")
    path = own.interpolate(first, second, 5, output="pt")
    assert path.shape == (5, 3, 16, 16)
    assert torch.equal(path[:1], own.reconstruct(first, output="pt"))
    assert torch.equal(path[-1:], own.reconstruct(second, output="pt"))
    backwards = own.interpolate(second, first, 5, output="pt")
    assert (path.int() - backwards.flip(0).int()).abs().max() <= 1  # rounding of the mixture
    bare = inspect.unwrap(TokenizerPipeline.interpolate)  # without the tests' type checker
    for pictures, name in (
        (("none.png", second), "first: none.png"),
        ((first, "none.png"), "second: none.png"),
        ((first, np.zeros(3)), "second must"),
    ):
        with pytest.raises(InputError, match=f"^{name}"):
            bare(own, *pictures)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device must be such as 'cpu' or 'cuda:0', got 'gpu'"),
        ("cuda:99", "device must be one of this machine, got 'cuda:99': "),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(
    own: TokenizerPipeline, device: str, message: str
) -> None:
    for act in (own.to, lambda name: TokenizerPipeline.from_pretrained("none", device=name)):
        with pytest.raises(InputError, match=message) as caught:
            act(device)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"dtype must be one of .* got torch\.int8"):
        own.to(torch.int8)


def test_a_pipeline_says_what_it_is(pipeline: ImageGenerationPipeline) -> None:
    lines = repr(pipeline).splitlines()
    assert lines[0] == "ImageGenerationPipeline("
    assert lines[1].startswith("  images: 3 channels, shorter side resized to 16 (Pillow bicubic")
    assert "  codes: 2 x 2 of 8 + 8, 4 x 4 of 8; 72 bits per image" in lines
    assert lines[-3].startswith("  classes: 8: 0 disc, 1 square, ")


def test_a_cast_pipeline_saves_a_prior_that_belongs_to_its_tokenizer(
    tiny_run: Path, tmp_path: Path
) -> None:
    cast = ImageGenerationPipeline.from_pretrained(tiny_run).to("cpu", torch.float16)
    cast.save_pretrained(tmp_path)
    loaded = ImageGenerationPipeline.from_pretrained(tmp_path)
    assert loaded.dtype == next(loaded.prior.parameters()).dtype == torch.float16


def test_a_card_has_the_numbers_with_their_protocol_and_is_not_overwritten(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = EvaluateConfig(
        run_dir=run, what="reconstruction", extractor=ExtractorConfig(kind="none")
    )
    psnr = evaluate(config)["reconstruction"]["PSNR"]
    # A folder of the machine, as a data set of files has it in its description.
    path = run / "evaluation" / "reconstruction.json"
    fields: dict[str, Any] = json.loads(path.read_text())
    fields["metrics"]["PSNR"]["protocol"]["reference"] = "/home/me/photos, 9 | files"
    path.write_text(json.dumps(fields))
    saved = tmp_path / "saved"
    TokenizerPipeline.from_pretrained(run).save_pretrained(saved)
    card = (saved / "README.md").read_text()
    assert f"| PSNR | {psnr['value']:.5g} |" in card
    assert f'"reference_hash": "{psnr["protocol"]["reference_hash"]}"' in card
    assert "…/photos, 9 | files" in card
    assert "/home/me" not in card + (saved / "evaluation/reconstruction.json").read_text()
    assert "TokenizerPipeline.from_pretrained" in card
    assert "license:" in card
    # Of a copy the same; what a user has written stays.
    again = TokenizerPipeline.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text() == card
    (saved / "README.md").write_text("mine")
    again.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "mine"
    (saved / "evaluation/reconstruction.json").write_text('{"metrics": 3}')
    with pytest.raises(InputError, match=r"reconstruction\.json: .*metrics"):
        TokenizerPipeline.from_pretrained(saved).save_pretrained(tmp_path / "third")
