"""A timm model as bottom-up path."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenizer import InputError, Tokenizer, TokenizerConfig, hq_vae
from tokenizer.backbone import TimmBottomUpPath, load_backbone
from tokenizer.config import BackboneConfig, NetworkConfig

NAME = "mobilenetv2_035"
NETWORKS = NetworkConfig(width=8, max_width=8, num_blocks=1)
WEIGHTS = Path(__file__).parents[3] / "shared/weights/mobilenetv2_100.tf-same.safetensors"
needs_weights = pytest.mark.skipif(
    not WEIGHTS.is_file(), reason=f"the MobileNetV2 weights are not at {WEIGHTS}"
)


def tokenizer_config(**backbone: object) -> TokenizerConfig:
    config = hq_vae((8, 4), (2, 1), 6, 4, networks=NETWORKS).model_dump()
    config["backbone"] = {"name": NAME, **backbone}
    return TokenizerConfig.model_validate(config)


def random_images(*size: int) -> Tensor:
    return 2 * torch.rand(2, 3, *size) - 1


def batch_norm_state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.named_buffers() if "running" in name}


@pytest.mark.parametrize("name", ["resnet10t", NAME])
@pytest.mark.parametrize("downsamplings", [(8, 4), (4, 8), (16,)])
def test_the_path_gives_a_map_per_downsampling_in_the_given_order(
    name: str, downsamplings: tuple[int, ...]
) -> None:
    path = TimmBottomUpPath(BackboneConfig(name=name), downsamplings)
    features = path(random_images(32, 48))
    for factor, channels, found in zip(downsamplings, path.out_channels, features, strict=True):
        assert found.shape == (2, channels, 32 // factor, 48 // factor)


def test_the_features_are_those_of_timm_for_images_normalized_as_the_config_or_its_entry_says() -> (
    None
):
    images = random_images(32, 32)
    network = timm.create_model(NAME, features_only=True).eval()
    half, mean, std = (0.5,) * 3, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    unit = (images + 1) / 2
    by_entry = torch.stack([(unit[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    for given, normalized in (({}, by_entry), ({"mean": half, "std": half}, images)):
        path = TimmBottomUpPath(BackboneConfig(name=NAME, **given), (8, 4))
        network.load_state_dict(path.model.state_dict(), strict=False)
        expected = dict(zip(network.feature_info.reduction(), network(normalized), strict=True))
        for factor, found in zip((8, 4), path(images), strict=True):
            torch.testing.assert_close(found, expected[factor])


def test_a_frozen_backbone_stays_in_evaluation_mode_from_the_start() -> None:
    tokenizer = Tokenizer(tokenizer_config())
    path = tokenizer.bottom_up
    before = batch_norm_state(path)
    assert before
    for prepare in (lambda: None, tokenizer.train, tokenizer.eval, tokenizer.train):
        prepare()
        assert not any(module.training for module in path.model.modules())
        tokenizer.encode(random_images(16, 16))
    tokenizer(random_images(16, 16))
    for name, value in batch_norm_state(path).items():
        assert torch.equal(value, before[name])
    assert tokenizer.training


@pytest.mark.parametrize("is_frozen", [True, False])
def test_gradients_reach_the_backbone_unless_it_is_frozen(is_frozen: bool) -> None:
    tokenizer = Tokenizer(tokenizer_config(is_frozen=is_frozen))
    images = random_images(32, 32)
    output = tokenizer(images)
    error = (images - output.reconstructions).square().sum()
    (error + output.latent_terms["quantization_error"]).backward()
    assert all(own.training != is_frozen for own in tokenizer.bottom_up.model.modules())
    for name, parameter in tokenizer.named_parameters():
        if is_frozen and name.startswith("bottom_up."):
            assert parameter.grad is None
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad != 0).any(), name


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "mobilenetv3_small_050"])
def test_no_stage_is_kept_behind_the_coarsest_map(name: str) -> None:
    # It would cost time and space, and processes that share gradients would wait for its own.
    path = TimmBottomUpPath(BackboneConfig(name=name, is_frozen=False), (4, 2))
    outputs = [entry.square().sum() for entry in path(random_images(32, 32))]
    torch.stack(outputs).sum().backward()
    for name_of_parameter, parameter in path.named_parameters():
        assert parameter.grad is not None, name_of_parameter


def test_a_saved_tokenizer_brings_its_backbone(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tokenizer_config()).eval()
    tokenizer.save_pretrained(tmp_path)
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.content_hash() == tokenizer.content_hash()
    images = random_images(16, 24)
    assert torch.equal(loaded.reconstruct(images), tokenizer.reconstruct(images))
    assert not any(parameter.requires_grad for parameter in loaded.bottom_up.parameters())


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


def test_weights_of_a_whole_model_fill_the_backbone() -> None:
    path = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4))
    weights = timm.create_model(NAME).state_dict()  # with a head and deeper stages
    load_backbone(path, weights, "weights.safetensors")
    for name, value in path.model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_weights_that_lack_one_or_have_another_shape_change_nothing() -> None:
    path = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4))
    before = {name: value.clone() for name, value in path.model.state_dict().items()}
    weights = timm.create_model(NAME).state_dict()
    name = "blocks.1.0.conv_dw.weight"
    lacking = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(InputError, match=rf"w\.safetensors lacks .* '{name}'"):
        load_backbone(path, lacking, "w.safetensors")
    with pytest.raises(InputError, match=rf"w\.safetensors: '{name}' must have shape"):
        load_backbone(path, {**weights, name: torch.zeros(1)}, "w.safetensors")
    for key, value in path.model.state_dict().items():
        assert torch.equal(value, before[key])


def test_pretrained_weights_fill_the_backbone_and_a_failed_download_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = TimmBottomUpPath(BackboneConfig(name=NAME), (8, 4))
    build, built = timm.create_model, []

    def downloaded(*arguments: object, pretrained: bool = False, **options: object) -> nn.Module:
        built.append(build(*arguments, **options))
        assert pretrained
        return built[-1]

    monkeypatch.setattr(timm, "create_model", downloaded)
    path.load_pretrained()
    for name, value in path.model.state_dict().items():
        assert torch.equal(value, built[0].state_dict()[name])

    def unreachable(*_: object, **__: object) -> nn.Module:
        raise OSError("no route to host\nmore lines")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(InputError, match=rf"backbone_weights: .*'{NAME}': no route to host$"):
        path.load_pretrained()


@needs_weights
def test_the_tensorflow_weights_give_the_features_of_the_whole_model() -> None:
    config = BackboneConfig(
        name="mobilenetv2_100", pad_type="same", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    path = TimmBottomUpPath(config, (16, 8)).eval()
    weights = load_file(WEIGHTS)
    load_backbone(path, weights, str(WEIGHTS))
    whole = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    whole.load_state_dict(weights)
    images = random_images(96, 96)
    with torch.no_grad():
        features = whole.bn1(whole.conv_stem(images))
        by_side: dict[int, Tensor] = {}
        for stage in whole.blocks:
            features = stage(features)
            by_side[96 // features.shape[-1]] = features  # the last stage of each side
        found = path(images)
    for factor, entry in zip((16, 8), found, strict=True):
        torch.testing.assert_close(entry, by_side[factor], rtol=1e-4, atol=1e-4)
