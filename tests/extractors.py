"""Feature extractors that need no weights."""

import torch
from torch import Tensor, nn

from pipelines.evaluation.features import FeatureExtractor, FeatureOutput


class Colors(FeatureExtractor):
    """Mean and deviation of each channel: 6 features."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), "Colors", {})

    def _extract(self, images: Tensor) -> FeatureOutput:
        pixels = images.float().flatten(2)
        features = torch.cat([pixels.mean(2), pixels.std(2)], 1)
        return FeatureOutput(features, features / 50)
