"""Perceptual distances against their formula, LPIPS against the library that has its heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines.config import TokenizerRecipe
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.judges import check_extractor
from pipelines.options import parse_run
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.recipe import TORCHVISION_NETWORKS, PerceptualConfig
from pipelines.training.losses.bound import Bound
from pipelines.training.losses.perceptual import LPIPS, TORCHVISION, PerceptualDistance
from tests.tiny_runs import make_stage, tokenizer_run
from tokenizer import Tokenizer, TokenizerOutput
from tokenizer.storage.errors import InputError


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of random weights."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    for name in ("squeezenet1_0", "squeezenet1_1"):
        save_file(getattr(torchvision.models, name)().state_dict(), folder / name)
    return {path.name: path for path in folder.iterdir()}


def pair(size: int = 32, channels: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(2, channels, size, size) * 2 - 1
    return images, (images + 0.2 * torch.randn_like(images)).requires_grad_()


def test_the_distance_is_that_of_its_formula(weights: dict[str, Path]) -> None:
    config = PerceptualConfig(
        weights=weights["squeezenet1_0"],
        layers=(1, 4),
        layer_weights=(1, 3),
        image_size=24,
        max_shift=0,
    )
    distance = PerceptualDistance(config, 3, 32)
    images, reconstructions = pair()
    network: Any = torchvision.models.squeezenet1_0()
    network.load_state_dict(load_file(weights["squeezenet1_0"]))
    network.double()
    expected = torch.zeros((), dtype=torch.float64)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    for last, share in ((1, 0.25), (4, 0.75)):
        vectors = []
        for own in (images, reconstructions.detach()):
            resized = nn.functional.interpolate(own.double(), (24, 24), mode="bilinear")
            maps = ((resized + 1) / 2 - mean) / std
            for layer in network.features[: last + 1]:
                maps = layer(maps)
            vectors.append(maps / maps.norm(dim=1, keepdim=True).clamp_min(1e-12))
        height, width = vectors[0].shape[-2:]
        total = (vectors[0] - vectors[1]).square().sum() / (2 * height * width)
        expected += share * total
    torch.testing.assert_close(distance(images, reconstructions).double(), expected)


def test_lpips_is_that_of_the_library_with_the_same_network(weights: dict[str, Path]) -> None:
    from torchmetrics.functional.image.lpips import _LPIPS

    config = PerceptualConfig(
        network="lpips-squeezenet1_1", weights=weights["squeezenet1_1"], max_shift=0
    )
    reference = _LPIPS(net="squeeze", pnet_rand=True)
    for number, layer in enumerate(torchvision_features(weights["squeezenet1_1"])):
        own = dict(reference.net.named_modules())
        (name,) = [key for key in own if key.count(".") == 2 and key.endswith(f".{number}")]
        own[name].load_state_dict(layer.state_dict())
    images, reconstructions = pair(64)
    expected = reference(images, reconstructions).mean()
    found = PerceptualDistance(config, 3, 64)(images, reconstructions)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def torchvision_features(path: Path) -> nn.Sequential:
    network: Any = torchvision.models.squeezenet1_1()
    network.load_state_dict(load_file(path))
    return network.features


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_images_have_no_distance_and_others_a_finite_gradient(
    channels: int, weights: dict[str, Path]
) -> None:
    distance = PerceptualDistance(
        PerceptualConfig(weights=weights["squeezenet1_0"]), channels, 32
    ).train()
    assert not distance.network.training
    images, reconstructions = pair(32, channels)
    assert distance(images, images) == 0
    with torch.no_grad():
        reconstructions[:, :, :16] = 0  # where whole areas are the same
    distance(images, reconstructions).backward()
    assert reconstructions.grad is not None
    assert reconstructions.grad.isfinite().all()
    assert reconstructions.grad.any()
    assert all(parameter.grad is None for parameter in distance.parameters())


def test_the_energy_holds_the_distance_and_gradients_of_parts_are_those_of_the_batch(
    weights: dict[str, Path],
) -> None:
    recipe = TokenizerRecipe(
        perceptual=PerceptualConfig(weight=0.3, weights=weights["squeezenet1_0"], max_shift=0)
    )
    distance = PerceptualDistance(recipe.perceptual, 3, 32)
    bound = Bound(recipe, True, distance)
    images, reconstructions = pair()
    output = TokenizerOutput(reconstructions, [], torch.zeros(2), {})
    found = bound(images, output)
    num_values = 3 * 32 * 32
    energy = (images - reconstructions).square().sum() / 2
    energy = energy + 0.3 * num_values * distance(images, reconstructions)
    expected = num_values / 2 * torch.log(energy / num_values)
    torch.testing.assert_close(found.terms["reconstruction"], expected)
    (whole,) = torch.autograd.grad(found.minimized, reconstructions)
    parts = []
    for number in range(2):
        one = output._replace(reconstructions=reconstructions[number : number + 1])
        loss = bound(images[number : number + 1], one, energy.detach())
        torch.testing.assert_close(loss.terms["reconstruction"], expected)
        parts.append(torch.autograd.grad(loss.minimized, reconstructions)[0])
    torch.testing.assert_close(sum(parts) / 2, whole)


@pytest.mark.parametrize(
    ("changes", "channels", "message"),
    [
        ({"network": "vgg99"}, 3, "network must be one of squeezenet1_0.*got 'vgg99'"),
        ({"layers": (1, 99)}, 3, "layers must be below 13 for squeezenet1_0, got 99"),
        ({"layer_weights": (1, 1)}, 3, "layer_weights must be 4 numbers for squeezenet1_0, got 2"),
        ({"image_size": 20}, 3, "image_size must be larger than 20 for squeezenet1_0"),
        ({"max_shift": 17}, 3, "max_shift must be at most half of 32, the images' side, got 17"),
        ({}, 4, "weight must be 0 for images of 4 channels"),
        ({"weights": Path("missing.safetensors")}, 3, "missing.safetensors"),
        (
            {"network": "squeezenet1_1"},
            3,
            r"recipe\.perceptual\.weights must be those of .*network 'squeezenet1_1': .* lacks 12",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    changes: dict[str, Any], channels: int, message: str, weights: dict[str, Path]
) -> None:
    config = PerceptualConfig(**{"weight": 1, "weights": weights["squeezenet1_0"], **changes})
    with pytest.raises(InputError, match=message) as caught:
        PerceptualDistance(config, channels, 32)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight": 1}, "weights must be a .safetensors file, or 'pretrained'"),
        ({"layers": (1,), "layer_weights": (1, 2)}, "layer_weights must be as many as layers, 1"),
        ({"layers": (4, 1)}, "layers must ascend, each named once"),
        ({"layers": (4, 4)}, "layers must ascend, each named once"),
        ({"pad_type": "same"}, "pad_type applies to models of timm alone, got 'same'"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean applies to models of timm alone"),
        ({"layer_weights": (0,)}, "layer_weights must not all be 0"),
        ({"network": "lpips-vgg16", "layers": (1,)}, "must be empty with LPIPS"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerceptualConfig(**fields)


def test_what_a_tokenizer_was_trained_with_is_saved_and_never_judges_it(
    weights: dict[str, Path], tmp_path: Path, cache_dir: Path
) -> None:
    config = tokenizer_run(tmp_path, cache_dir)
    recipe = config.recipe.model_copy(
        update={
            "perceptual": PerceptualConfig(
                weight=1, weights=weights["squeezenet1_0"], image_size=40
            )
        }
    )
    stage: Any = make_stage(config.model_copy(update={"recipe": recipe}))
    plain: Any = make_stage(config)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], weight), name
    stage.model.save_pretrained(tmp_path / "model")
    loaded = Tokenizer.from_pretrained(tmp_path / "model")
    (network,) = loaded.config.loss_networks
    name, sha256 = network.split(" ")
    assert name == "squeezenet1_0"
    for protocol in ({"model": "x", "weights_sha256": sha256}, {"model": "squeezenet1_0.tv_in1k"}):
        judge = FeatureExtractor(nn.Identity(), "judge", protocol)
        with pytest.raises(InputError, match="whose features the training compared"):
            check_extractor(judge, loaded)
        check_extractor(judge, Tokenizer(TOKENIZER_PRESETS["tiny"].tokenizer))


def test_the_crop_is_the_same_of_both_and_another_in_the_next_step(
    weights: dict[str, Path],
) -> None:
    config = PerceptualConfig(weights=weights["squeezenet1_0"], max_shift=8)
    distance = PerceptualDistance(config, 3, 40)
    images, reconstructions = pair(40)
    whole = PerceptualDistance(config.model_copy(update={"max_shift": 0}), 3, 32)
    torch.manual_seed(3)
    found = {round(distance(images, reconstructions).item(), 6) for _ in range(8)}
    crops = {
        round(
            whole(*(own[..., y : y + 32, x : x + 32] for own in (images, reconstructions))).item(),
            6,
        )
        for y in range(9)
        for x in range(9)
    }
    assert len(found) > 1
    assert found <= crops


def test_the_word_pretrained_is_no_path_on_a_command_line(tmp_path: Path) -> None:
    words = ["tiny", "--run-dir", str(tmp_path), "--recipe.perceptual.weights"]
    config = parse_run(TOKENIZER_PRESETS, "train_tokenizer", [*words, "pretrained"])
    assert config.recipe.perceptual.weights == "pretrained"
    config = parse_run(TOKENIZER_PRESETS, "train_tokenizer", [*words, "a.safetensors"])
    assert config.recipe.perceptual.weights == Path("a.safetensors")


def test_the_networks_that_the_recipe_knows_are_those_that_can_be_built() -> None:
    assert set(TORCHVISION_NETWORKS) == {*TORCHVISION, *LPIPS}
