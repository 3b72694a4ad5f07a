"""A timm model as bottom-up path."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.tokenizer.tiny import HYBRID
from tokenizer import InputError, Tokenizer, TokenizerConfig
from tokenizer.backbone import TimmBottomUpPath, load_backbone
from tokenizer.config import BackboneConfig

NAME = "mobilenetv2_035"
WEIGHTS = Path(__file__).parents[3] / "shared/weights/mobilenetv2_100.tf-same.safetensors"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"the MobileNetV2 weights are not at {WEIGHTS}"
)


def tokenizer_config(**backbone: object) -> TokenizerConfig:
    fields = {**HYBRID.model_dump(), "backbone": {"name": NAME, **backbone}}
    return TokenizerConfig.model_validate(fields)


def random_images(*size: int) -> Tensor:
    return 2 * torch.rand(2, 3, *size) - 1


@pytest.mark.parametrize("name", ["resnet10t", NAME, "mobilenetv3_small_050"])
@pytest.mark.parametrize("downsamplings", [(8, 4), (4, 8), (16,), (4, 2)])
def test_the_path_gives_a_map_per_downsampling_in_order_and_keeps_no_stage_behind_the_coarsest(
    name: str, downsamplings: tuple[int, ...]
) -> None:
    path = TimmBottomUpPath(BackboneConfig(name=name, is_frozen=False), downsamplings)
    features = path(random_images(32, 48))
    for factor, channels, found in zip(downsamplings, path.out_channels, features, strict=True):
        assert found.shape == (2, channels, 32 // factor, 48 // factor)
    # A stage behind it would cost time and space, and processes would wait for its gradients.
    torch.stack([entry.square().sum() for entry in features]).sum().backward()
    assert all(parameter.grad is not None for parameter in path.parameters())


@pytest.mark.parametrize("has_statistics", [False, True])
@pytest.mark.parametrize(
    ("name", "pad_type", "weights"),
    [(NAME, "", None), pytest.param("mobilenetv2_100", "same", WEIGHTS, marks=needs_weights)],
)
def test_weights_of_a_whole_model_give_its_features_of_images_normalized_as_config_or_entry_says(
    name: str, pad_type: Any, weights: Path | None, has_statistics: bool
) -> None:
    whole = timm.create_model(name, pad_type=pad_type).eval()  # with a head and deeper stages
    if weights is not None:
        whole.load_state_dict(load_file(weights))
    statistics = {"mean": (0.5,) * 3, "std": (0.5,) * 3} if has_statistics else {}
    config = BackboneConfig(name=name, pad_type=pad_type, **statistics)
    path = TimmBottomUpPath(config, (16, 8)).eval()
    load_backbone(path, whole.state_dict(), "weights.safetensors")
    images = normalized = random_images(96, 96)
    if not has_statistics:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        normalized = ((images + 1) / 2 - mean) / std
    with torch.no_grad():
        features = whole.bn1(whole.conv_stem(normalized))
        by_side: dict[int, Tensor] = {}
        for stage in whole.blocks:
            features = stage(features)
            by_side[96 // features.shape[-1]] = features  # the last stage of each side
        found = path(images)
    for factor, entry in zip((16, 8), found, strict=True):
        torch.testing.assert_close(entry, by_side[factor], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_frozen", [True, False])
def test_gradients_and_statistics_change_the_backbone_unless_it_is_frozen(is_frozen: bool) -> None:
    tokenizer = Tokenizer(tokenizer_config(is_frozen=is_frozen))
    path, images = tokenizer.bottom_up, random_images(32, 32)
    before = {name: value.clone() for name, value in path.named_buffers() if "running" in name}
    for prepare in (lambda: None, lambda: tokenizer.eval().train()):  # frozen from the start
        prepare()
        assert tokenizer.training
        assert all(module.training != is_frozen for module in path.model.modules())
        output = tokenizer(images)
    error = (images - output.reconstructions).square().sum()
    (error + output.latent_terms["quantization_error"]).backward()
    assert before
    for name, value in before.items():
        assert torch.equal(path.get_buffer(name), value) == is_frozen
    for name, parameter in tokenizer.named_parameters():
        if is_frozen and name.startswith("bottom_up."):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize(
    ("name", "pad_type", "downsamplings", "message"),
    [
        ("no_such_model", "", (8,), r"backbone\.name: timm cannot build 'no_such_model'"),
        (NAME, "", (64, 8), r"backbone\.name: .* not at \[64\]"),
        ("vit_tiny_patch16_224", "", (8,), r"backbone\.name: .* not at \[8\]"),
        ("resnet10t", "same", (8,), "backbone"),
    ],
)
def test_a_model_that_does_not_fit_is_rejected(
    name: str, pad_type: Any, downsamplings: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TimmBottomUpPath(BackboneConfig(name=name, pad_type=pad_type), downsamplings)


def test_weights_that_lack_one_or_have_another_shape_are_rejected() -> None:
    path = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4))
    weights = timm.create_model(NAME).state_dict()
    name = "blocks.1.0.conv_dw.weight"
    removed = weights.pop(name)
    for wrong, message in (
        (weights, f" lacks .* '{name}'"),
        ({**weights, name: removed[:1]}, f": '{name}' must have shape"),
    ):
        with pytest.raises(InputError, match=rf"^w\.safetensors{message}"):
            load_backbone(path, wrong, "w.safetensors")


def test_pretrained_weights_fill_the_backbone_and_a_failed_download_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4))
    downloaded = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4)).model

    def create_model(*_: object, pretrained: bool, **__: object) -> nn.Module:
        if pretrained and is_reachable:
            return downloaded
        raise OSError("no route to host\nmore lines")

    monkeypatch.setattr(timm, "create_model", create_model)
    is_reachable = True
    path.load_pretrained()
    for name, value in path.model.state_dict().items():
        assert torch.equal(value, downloaded.state_dict()[name])
    is_reachable = False
    with pytest.raises(InputError, match=rf"backbone_weights: .*'{NAME}': no route to host$"):
        path.load_pretrained()
