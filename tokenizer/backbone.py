"""A timm model as bottom-up path."""

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import Tensor, nn

from tokenizer.config import BackboneConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.pretrained import load_weights


def _create(config: BackboneConfig, **options: Any) -> Any:
    if config.pad_type:
        options["pad_type"] = config.pad_type
    try:
        model = timm.create_model(config.name, features_only=True, **options)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"backbone.name: timm cannot build {config.name!r}: {error}") from error
    if isinstance(model, EfficientNetFeatures | MobileNetV3Features):
        # Unlike other families, these keep and compute the stages behind the last map, whose
        # parameters would get no gradient.
        last = max(entry["stage"] for entry in model.feature_info.get_dicts())
        model.blocks = model.blocks[:last]
    return model


class TimmBottomUpPath(nn.Module):
    """Image to features of a timm model at each requested resolution.

    Built with random weights: `load_backbone` fills it before training, and a saved tokenizer
    brings its own.

    Raises:
        InputError: timm has no such model, or it has no map at a requested resolution.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: BackboneConfig, downsamplings: Sequence[int]) -> None:
        super().__init__()
        self.config = config
        self.is_frozen = config.is_frozen
        reductions = _create(config).feature_info.reduction()
        missing = set(downsamplings) - set(reductions)
        if missing:
            raise InputError(
                f"backbone.name: {config.name!r} has maps at downsampling {reductions}, "
                f"not at {sorted(missing)}"
            )
        positions = [reductions.index(factor) for factor in downsamplings]
        self._out_indices = sorted(positions)
        self.model = _create(config, out_indices=self._out_indices)
        self._order = [self._out_indices.index(position) for position in positions]
        channels = self.model.feature_info.channels()
        self.out_channels = [channels[position] for position in self._order]
        entry = timm.get_pretrained_cfg(config.name)
        for name in ("mean", "std"):
            values = getattr(config, name) or getattr(entry, name, (0.5, 0.5, 0.5))
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)
        if self.is_frozen:
            self.model.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TimmBottomUpPath":
        """Sets the mode; frozen weights stay in evaluation mode (batch statistics, dropout)."""
        super().train(mode)
        if self.is_frozen:
            self.model.eval()
        return self

    def load_pretrained(self) -> None:
        """Downloads timm's weights.

        Raises:
            InputError: there are none, or they cannot be had.
        """
        try:
            model = _create(self.config, out_indices=self._out_indices, pretrained=True)
        except Exception as error:  # the hub client's errors have no common class
            reason = str(error).splitlines()[0]
            raise InputError(
                f"backbone_weights: no pretrained weights of {self.config.name!r}: {reason}"
            ) from error
        self.model.load_state_dict(model.state_dict())

    def forward(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> list[Float[Tensor, "batch _ _ _"]]:
        """Features in the order of the requested resolutions; `images` on [-1, 1]."""
        normalized = ((images + 1) / 2 - self.mean) / self.std
        features = self.model(normalized)
        return [features[position] for position in self._order]


def load_backbone(path: TimmBottomUpPath, weights: Mapping[str, Tensor], source: str) -> None:
    """Fills the backbone from a full timm model's weights; its unused head is left out.

    Raises:
        InputError: a weight of the backbone is missing or of another shape.
    """
    needed = path.model.state_dict().keys()
    chosen = {name: tensor for name, tensor in weights.items() if name in needed}
    load_weights(path.model, chosen, source)
