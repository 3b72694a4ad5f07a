"""Perceptual distances: features of a frozen network, of images and of reconstructions."""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import TokenizerRunConfig
from pipelines.recipe import PerceptualConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import file_sha256
from tokenizer.storage.hashes import weights_hash
from tokenizer.storage.pretrained import load_weights
from tokenizer.storage.untrusted import load_safetensors

Maps = list[Float[Tensor, "batch _ _ _"]]


class _Architecture(NamedTuple):
    build: Callable[..., nn.Module]
    layers: tuple[int, ...]
    """Of `features`, whose outputs LPIPS compares."""
    heads: str = ""
    """Name of the published weights of the channels, in torchmetrics."""


# LPIPS, arXiv 1801.03924: after the first activation and before each pooling, or each fire module.
_VGG = _Architecture(torchvision.models.vgg16, (3, 8, 15, 22, 29), "vgg")
_ALEXNET = _Architecture(torchvision.models.alexnet, (1, 4, 7, 9, 11), "alex")
_SQUEEZENET = _Architecture(torchvision.models.squeezenet1_1, (1, 4, 7, 9, 10, 11, 12), "squeeze")
TORCHVISION = {
    "squeezenet1_0": _Architecture(torchvision.models.squeezenet1_0, (1, 5, 10, 12)),
    "squeezenet1_1": _SQUEEZENET,
    "vgg16": _VGG,
}
LPIPS = {
    "lpips-squeezenet1_1": _SQUEEZENET,
    "lpips-vgg16": _VGG,
    "lpips-alexnet": _ALEXNET,
}
# Of the inputs on [0, 1]: LPIPS's shift and scale on [-1, 1] are these to three digits.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PerceptualDistance(nn.Module):
    """Mean over positions of ‖f(x) - f(x̂)‖², f of unit length over the channels (LPIPS).

    Maps are weighted by the config, or each channel by the published heads (arXiv 1801.03924), and
    only with its own network the distance is called LPIPS. The network is frozen, in evaluation
    mode and in float32; gray images are repeated to three channels.

    Raises:
        InputError: the network or its weights cannot be had or do not fit, or the images are too
            small for it or have an alpha channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig, channels: int, image_size: int) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise InputError(
                f"recipe.perceptual.weight must be 0 for images of {channels} channels: "
                f"{config.network} sees three, or one that is repeated"
            )
        self.config = config
        is_timm = config.network not in {**TORCHVISION, **LPIPS}
        build = _timm_features if is_timm else _torchvision_features
        self.network, entry, sha256 = build(config)
        self.identity = f"{config.network.removeprefix('lpips-')} {sha256}"
        """What must not judge what was trained with it; see `TokenizerConfig.loss_networks`."""
        self.network.eval().requires_grad_(False)
        for name, values in (
            ("mean", config.mean or entry.get("mean", MEAN)),
            ("std", config.std or entry.get("std", STD)),
        ):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self._check_maps(config.image_size or image_size)
        self.heads = _heads(config.network) if config.network in LPIPS else None

    @classmethod
    def of_run(
        cls, config: TokenizerRunConfig, device: torch.device
    ) -> "PerceptualDistance | None":
        """That of the run's recipe; None where its weight is 0."""
        perceptual, data = config.recipe.perceptual, config.data
        if not perceptual.weight:
            return None
        with torch.random.fork_rng([]):  # the tokenizer's first weights are the same with it
            return cls(perceptual, data.channels, data.image_size).to(device)

    def train(self, mode: bool = True) -> "PerceptualDistance":
        """Stays in evaluation mode, whatever contains it."""
        return super().train(False)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        reconstructions: Float[Tensor, "batch channels height width"],
    ) -> Float[Tensor, ""]:
        """Mean distance of the pairs, both on [-1, 1]; the gradient reaches `reconstructions`."""
        most = self.config.max_shift
        place = torch.randint(most + 1, (2,)).tolist() if most else [0, 0]
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = list(map(_unit, self.maps(images, place)))
            found = map(_unit, self.maps(reconstructions, place))
            differences = [(one - own).square() for one, own in zip(wanted, found, strict=True)]
            if self.heads is not None:
                weighted = zip(differences, self.heads, strict=True)
                distances = [(own * head).sum(1).mean() for own, head in weighted]
                return torch.stack(distances).sum()
            distances = [own.sum(1).mean() for own in differences]
            shares = images.new_tensor(self.config.layer_weights or [1.0] * len(distances))
            return torch.stack(distances) @ (shares / shares.sum())

    def maps(
        self, images: Float[Tensor, "batch channels height width"], place: Sequence[int] = (0, 0)
    ) -> Maps:
        """Features of images on [-1, 1], cropped by `max_shift` with a corner at `place`."""
        size = self.config.image_size
        if size is not None:
            images = functional.interpolate(images, (size, size), mode="bilinear")
        for dim, start in zip((-2, -1), place, strict=True):
            images = images.narrow(dim, start, images.shape[dim] - self.config.max_shift)
        images = (images.expand(-1, 3, -1, -1) + 1) / 2
        maps: Maps = self.network((images - self.mean) / self.std)
        return maps

    def _check_maps(self, side: int) -> None:
        """Refuses images without positions, and weights of another number of maps."""
        name = self.config.network
        if side < 2 * self.config.max_shift:
            raise InputError(
                f"recipe.perceptual.max_shift must be at most half of {side}, the images' side, "
                f"got {self.config.max_shift}"
            )
        try:
            maps = self.maps(torch.zeros(1, 3, side, side))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(
                f"recipe.perceptual.image_size must be larger than {side} for {name}: {reason}"
            ) from error
        if any(own.ndim != 4 or own.shape[2] < 1 for own in maps):
            raise InputError(f"recipe.perceptual.network must give feature maps, got {name!r}")
        weights = self.config.layer_weights
        if weights and len(weights) != len(maps):
            raise InputError(
                f"recipe.perceptual.layer_weights must be {len(maps)} numbers for {name}, "
                f"got {len(weights)}"
            )


def _unit(features: Tensor) -> Tensor:
    """Of length 1 over the channels; where all are 0 they stay so."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


class _ChosenLayers(nn.Module):
    """The outputs of some layers of torchvision's `features`; what follows the last is dropped."""

    def __init__(self, features: nn.Sequential, layers: Sequence[int]) -> None:
        super().__init__()
        self.features = features[: max(layers) + 1]
        self._layers = set(layers)
        for module in self.features.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False  # it would overwrite an output that is compared

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for number, layer in enumerate(self.features):
            images = layer(images)
            if number in self._layers:
                maps.append(images)
        return maps


def _torchvision_features(config: PerceptualConfig) -> tuple[nn.Module, dict[str, Any], str]:
    """Network, what is known of its inputs, and what identifies its weights."""
    architecture = {**TORCHVISION, **LPIPS}[config.network]
    network: Any
    if config.weights == "pretrained":
        try:
            network = architecture.build(weights="DEFAULT", progress=False)
        except Exception as error:  # urllib's and the hub's errors have no common class
            raise _no_download(config, error) from error
    else:
        network = architecture.build(weights=None)
    source = _fill(network, config)
    layers = config.layers or architecture.layers
    if max(layers) >= len(network.features):
        raise InputError(
            f"recipe.perceptual.layers must be below {len(network.features)} for "
            f"{config.network}, got {max(layers)}"
        )
    return _ChosenLayers(network.features, layers), {}, source


def _timm_features(config: PerceptualConfig) -> tuple[nn.Module, dict[str, Any], str]:
    options: dict[str, Any] = {"pad_type": config.pad_type} if config.pad_type else {}
    try:
        network: Any = timm.create_model(config.network, **options)
    except (RuntimeError, TypeError) as error:
        known = ", ".join([*TORCHVISION, *LPIPS])
        raise InputError(
            f"recipe.perceptual.network must be one of {known}, or a model of timm, "
            f"got {config.network!r}"
        ) from error
    if config.weights == "pretrained":
        try:
            network = timm.create_model(config.network, pretrained=True, **options)
        except Exception as error:  # the hub client's errors have no common class
            raise _no_download(config, error) from error
    source = _fill(network, config)
    if config.layers:
        options["out_indices"] = config.layers
    try:
        features = timm.create_model(config.network, features_only=True, **options)
    except (RuntimeError, TypeError, AttributeError, AssertionError, IndexError) as error:
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise InputError(
            f"recipe.perceptual.layers: timm gives no maps {config.layers or ''} of "
            f"{config.network!r}: {reason}"
        ) from error
    weights = network.state_dict()
    needed = {name: weights[name] for name in features.state_dict() if name in weights}
    load_weights(features, needed, f"recipe.perceptual.weights: {config.weights}")
    return features, network.pretrained_cfg, source


def _fill(network: nn.Module, config: PerceptualConfig) -> str:
    """Loads a file, if there is one; gives the hash of what the network then is."""
    if isinstance(config.weights, Path):
        source = (
            f"recipe.perceptual.weights must be those of recipe.perceptual.network "
            f"{config.network!r}: {config.weights}"
        )
        load_weights(network, load_safetensors(config.weights), source)
        return file_sha256(config.weights)
    return weights_hash(network.state_dict())


def _no_download(config: PerceptualConfig, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:150] or type(error).__name__
    return InputError(
        f"recipe.perceptual.weights: the download for {config.network!r} failed ({reason}); "
        "give a .safetensors file"
    )


def _heads(name: str) -> nn.ParameterList:
    """Published weights of the channels of each map, (1, C, 1, 1), that come with torchmetrics."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise InputError(
            f"recipe.perceptual.network {name!r} needs the package torchmetrics: "
            "pip install 'hqvae[lpips]'"
        )
    folder = Path(package.origin).parent / "functional" / "image" / "lpips_models"
    path = folder / f"{LPIPS[name].heads}.pth"
    if not path.is_file():
        raise InputError(f"recipe.perceptual.network: torchmetrics has no {path.name} any more")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    heads = [weights[f"lin{number}.model.1.weight"] for number in range(len(weights))]
    return nn.ParameterList(nn.Parameter(head, requires_grad=False) for head in heads)
