"""A second judge beside timm's networks: SqueezeNet 1.0 of torchvision."""

from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.nn import functional

from pipelines.command_configs import ExtractorConfig
from pipelines.evaluation.features import FeatureExtractor, FeatureOutput, load_extractor
from tokenizer.storage.files import file_sha256
from tokenizer.storage.pretrained import load_weights
from tokenizer.storage.untrusted import load_safetensors


class SqueezeNetExtractor(FeatureExtractor):
    """512 features, the mean of the last map before the classifier."""

    def __init__(self, weights: Path, image_size: int) -> None:
        network: Any = torchvision.models.squeezenet1_0()
        load_weights(network, load_safetensors(weights), str(weights))
        super().__init__(
            network,
            "SqueezeNet",
            {
                "model": "squeezenet1_0",
                "weights": weights.name,
                "weights_sha256": file_sha256(weights),
                "resize": "bicubic, antialiased, to a square",
                "image_size": image_size,
            },
        )
        self.image_size = image_size
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1))
        self.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1))

    def _extract(self, images: Tensor) -> FeatureOutput:
        side = (self.image_size, self.image_size)
        resized = functional.interpolate(images / 255, side, mode="bicubic", antialias=True)
        network: Any = self.network
        maps = network.features((resized - self.mean) / self.std)
        logits = network.classifier(maps).mean((2, 3))
        return FeatureOutput(maps.mean((2, 3)), logits)


def mobilenet_config(weights: Path, image_size: int = 96) -> ExtractorConfig:
    """MobileNetV2 as its weights want it."""
    half = (0.5, 0.5, 0.5)
    return ExtractorConfig(
        kind="timm", weights=weights, pad_type="same", mean=half, std=half, image_size=image_size
    )


def load_judges(mobilenet: Path, squeezenet: Path, image_size: int) -> dict[str, FeatureExtractor]:
    """Both judges by name, at images of one size, at least 96 pixels."""
    side = max(image_size, 96)
    return {
        "MobileNetV2": load_extractor(mobilenet_config(mobilenet, side)),
        "SqueezeNet": SqueezeNetExtractor(squeezenet, side),
    }
