"""Feature extractors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)

from pipelines.command_configs import ExtractorConfig
from pipelines.evaluation import features
from pipelines.evaluation.features import (
    FeatureExtractor,
    InceptionExtractor,
    TimmExtractor,
    load_extractor,
)
from pipelines.images import to_pil
from tests.image_files import Malicious
from tokenizer.storage.errors import InputError


def random_images(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with RANDOM weights: it shows that files load, not what the features are worth."""

    class Architecture(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state_dict: dict[str, Tensor], **_: Any) -> None:
            """Keeps the random weights."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Architecture("random", ["2048"], str(folder / "empty.pth"))
    torch.save(network.state_dict(), folder / "random.pth")
    return folder / "random.pth"


@pytest.fixture(scope="module")
def inception(random_inception: Path) -> InceptionExtractor:
    return InceptionExtractor(random_inception)


@pytest.fixture(scope="module")
def small_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("timm") / "small.safetensors"
    safetensors.torch.save_file(timm.create_model("test_efficientnet").state_dict(), path)
    return path


@pytest.fixture(scope="module")
def small(small_weights: Path) -> TimmExtractor:
    config = ExtractorConfig(
        kind="timm", model="test_efficientnet", weights=small_weights, image_size=32
    )
    return TimmExtractor(config)


def test_the_inception_file_is_the_one_that_torch_fidelity_names() -> None:
    assert features.INCEPTION_URL == URL_INCEPTION_V3


def test_an_inception_file_gives_the_features_of_torch_fidelity(
    random_inception: Path, inception: InceptionExtractor
) -> None:
    images = random_images(0, 2, 3, 20, 24)
    reference = FeatureExtractorInceptionV3(
        "reference", ["2048", "logits_unbiased"], str(random_inception)
    )
    expected_features, expected_logits = reference(images)
    output = inception(images)
    torch.testing.assert_close(output.features, expected_features, rtol=0, atol=0)
    torch.testing.assert_close(output.logits, expected_logits, rtol=0, atol=0)
    assert output.features.shape == (2, 2048)
    assert output.logits.shape == (2, 1008)


def test_only_the_published_weights_are_called_inception(
    random_inception: Path, inception: InceptionExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = str(inception.protocol["weights_sha256"])
    assert inception.name == f"Inception-{sha256[:8]}"
    assert inception.suffix == f"-{inception.name}"
    monkeypatch.setattr(features, "INCEPTION_SHA256", sha256)
    published = InceptionExtractor(random_inception)
    assert (published.name, published.suffix) == ("Inception", "")


@pytest.fixture
def download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a download of `tmp_path/published.pth` lands."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(features, "INCEPTION_URL", (tmp_path / "published.pth").as_uri())
    return tmp_path / "hub" / "checkpoints" / features.INCEPTION_FILE


def test_a_failed_inception_download_says_which_file_to_put_where(download: Path) -> None:
    with pytest.raises(InputError, match=r"give its path as extractor\.weights") as raised:
        load_extractor(ExtractorConfig())
    assert f"put it at {download}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_download_of_another_file_is_rejected_and_leaves_nothing(
    download: Path, tmp_path: Path
) -> None:
    (tmp_path / "published.pth").write_bytes(b"another file")
    with pytest.raises(InputError, match="what came is another file"):
        load_extractor(ExtractorConfig())
    assert not list(download.parent.iterdir())


def test_a_download_is_kept_used_again_and_refused_when_damaged(
    random_inception: Path,
    inception: InceptionExtractor,
    download: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "INCEPTION_SHA256", inception.protocol["weights_sha256"])
    published = tmp_path / "published.pth"
    published.symlink_to(random_inception)
    assert load_extractor(ExtractorConfig()).name == "Inception"
    published.unlink()
    assert load_extractor(ExtractorConfig()).name == "Inception"
    download.write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"is damaged: its SHA-256 is .*; delete it"):
        load_extractor(ExtractorConfig())


def test_an_inception_file_with_code_is_rejected_unexecuted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Malicious()}, "malicious.pth")
    with pytest.raises(InputError, match="holds more than weights"):
        InceptionExtractor(Path("malicious.pth"))
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "weights.pth is damaged"),
        (b"PK\x03\x04 torn", "weights.pth is damaged"),
        ({"fc.weight": torch.zeros(2, 2)}, "weights.pth holds no Inception weights"),
        ([1, 2], "weights.pth holds no Inception weights"),
        (None, "weights.pth: no such file; FID needs weights-inception"),
    ],
)
def test_what_holds_no_inception_weights_is_named_on_one_line(
    content: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match=message) as raised:
        load_extractor(ExtractorConfig(weights=path))
    assert "\n" not in str(raised.value)


def test_timm_features_are_the_pooled_ones_before_the_classifier(
    small: TimmExtractor, small_weights: Path
) -> None:
    images = random_images(1, 3, 3, 48, 40)
    model: Any = timm.create_model("test_efficientnet").eval()
    model.load_state_dict(safetensors.torch.load_file(small_weights))
    resized = F.interpolate(
        images.float() / 127.5 - 1, (32, 32), mode="bicubic", antialias=True, align_corners=False
    )
    mean = torch.tensor(model.pretrained_cfg["mean"]).view(1, 3, 1, 1)
    std = torch.tensor(model.pretrained_cfg["std"]).view(1, 3, 1, 1)
    with torch.no_grad():
        feature_map = model.forward_features(((resized + 1) / 2 - mean) / std)
        pooled = feature_map.mean(dim=(2, 3))
        logits = pooled @ model.classifier.weight.T + model.classifier.bias
    assert small.suffix == "-test_efficientnet"
    assert small.protocol["weights"] == small_weights.name
    assert small.protocol["resize"] == "bicubic, antialiased, to a square"
    output = small(images)
    torch.testing.assert_close(output.features, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)


def test_mean_and_deviation_of_one_half_feed_images_between_minus_one_and_one(
    small_weights: Path,
) -> None:
    halves = (0.5, 0.5, 0.5)
    extractor = TimmExtractor(
        ExtractorConfig(
            kind="timm",
            model="test_efficientnet",
            weights=small_weights,
            image_size=32,
            mean=halves,
            std=halves,
        )
    )
    images = random_images(2, 2, 3, 32, 32)
    network: Any = extractor.network
    with torch.no_grad():
        expected = network.forward_head(
            network.forward_features(images.float() / 127.5 - 1), pre_logits=True
        )
    torch.testing.assert_close(extractor(images).features, expected, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 99), st.integers(1, 5), st.integers(8, 40))
def test_features_of_an_image_do_not_depend_on_its_batch(
    small: TimmExtractor, seed: int, num_images: int, side: int
) -> None:
    images = random_images(seed, num_images, 3, side, side)
    together = small(images).features
    alone = torch.cat([small(image[None]).features for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_gray_images_count_as_three_equal_channels(
    small: TimmExtractor, inception: InceptionExtractor
) -> None:
    gray = random_images(3, 1, 1, 32, 32)
    extractors: tuple[FeatureExtractor, ...] = (small, inception)
    for extractor in extractors:
        expected = extractor(gray.repeat(1, 3, 1, 1)).features
        torch.testing.assert_close(extractor(gray).features, expected, rtol=0, atol=0)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_with_alpha_are_composited_on_white(small: TimmExtractor, channels: int) -> None:
    images = random_images(4, 1, channels, 32, 32)
    picture = to_pil(images[0]).convert("RGBA")
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    on_white = torch.from_numpy(np.array(white.convert("RGB"))).movedim(-1, 0)[None]
    composited = features.composite_on_white(images)
    assert (composited.int() - on_white.int()).abs().max() <= 1  # Pillow rounds twice
    torch.testing.assert_close(small(images), small(composited), rtol=0, atol=0)


def test_an_extractor_stays_frozen_in_evaluation_mode_and_float32(small: TimmExtractor) -> None:
    images = random_images(5, 2, 3, 32, 32)
    before = small(images)
    torch.nn.Sequential(small).train()
    assert not any(module.training for module in small.modules())
    assert not any(parameter.requires_grad for parameter in small.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = small(images)
    assert after.features.dtype == after.logits.dtype == torch.float32
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "no_such_model"}, "Unknown model"),
        ({"model": "test_vit", "pad_type": "same"}, "'test_vit' takes no pad_type"),
        # timm has the architecture alone: it must not start from random weights.
        ({"model": "efficientnet_cc_b0_4e"}, r"download of .* failed \(.*give a \.safetensors"),
        ({"model": "test_resnet", "weights": "small"}, "has unknown|lacks"),
        ({"model": "test_resnet", "weights": "absent"}, "no such file"),
        ({"model": "test_efficientnet", "weights": "text"}, "damaged or not a safetensors file"),
    ],
)
def test_a_timm_model_that_cannot_be_had_is_an_error(
    fields: dict[str, Any], message: str, small_weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("text")
    if "weights" in fields:
        path = small_weights if fields["weights"] == "small" else tmp_path / fields["weights"]
        fields = fields | {"weights": path}
    with pytest.raises(InputError, match=message) as raised:
        load_extractor(ExtractorConfig(kind="timm", **fields))
    assert "\n" not in str(raised.value)


def test_an_image_size_that_the_model_does_not_take_fails_before_work_starts(
    tmp_path: Path,
) -> None:
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(timm.create_model("test_vit3").state_dict(), path)
    with pytest.raises(InputError, match="'test_vit3' gives no pooled features at image_size 96"):
        load_extractor(ExtractorConfig(kind="timm", model="test_vit3", weights=path))


@pytest.mark.parametrize(
    "fields", [{"image_size": 64}, {"model": "resnet18"}, {"mean": (0.5, 0.5, 0.5)}]
)
def test_options_of_timm_are_refused_with_inception(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(fields))} applies to kind 'timm' alone"):
        ExtractorConfig(**fields)
