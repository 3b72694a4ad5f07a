"""Warns when a layer of the tokenizer stops carrying information."""

import logging
import math

import torch

from pipelines.config import TokenizerRecipe
from pipelines.run.log import Metrics
from tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def relative_variances(tokenizer: Tokenizer) -> list[float]:
    """s² of each layer over the variance per dimension of its code vectors.

    That of its inputs, in effect, but known from the weights alone. Far above 1 the posterior is
    the same for all inputs; far below it is a point. 1 for a single code, which has none; empty
    where the quantizers have no variances.
    """
    variances = tokenizer.dequantization_variances().double()
    if not len(variances):
        return []
    layers = [layer.double() for group in tokenizer.code_vectors() for layer in group]
    spread = torch.stack([layer.var(0, correction=0).mean() for layer in layers])
    ratios = (variances / spread.clamp_min(1e-30)).tolist()
    return [ratio if len(layer) > 1 else 1.0 for ratio, layer in zip(ratios, layers, strict=True)]


class LayerHealth:
    """Compares usage, perplexity and variance of each layer with the limits of a run."""

    def __init__(self, config: TokenizerRecipe) -> None:
        self._config = config
        self._warned: set[tuple[str, int]] = set()

    def check(
        self, sizes: list[int], usage: list[float], perplexity: list[float], ratios: list[float]
    ) -> Metrics:
        """Per layer 1 where a limit is broken and 0 elsewhere, by the name of the limit.

        Logs each layer once when it breaks a limit, and again only after it has kept it.
        """
        config = self._config
        shares = [used / size for used, size in zip(perplexity, sizes, strict=True)]
        flags: dict[str, list[float]] = {}
        for name, option, values, (lowest, highest) in (
            ("low_usage", "min-codebook-usage", usage, (config.min_codebook_usage, math.inf)),
            ("low_perplexity", "min-perplexity", shares, (config.min_perplexity, math.inf)),
            ("variance_out_of_band", "variance-band", ratios, config.variance_band),
        ):
            flags[name] = [0.0 if lowest <= value <= highest else 1.0 for value in values]
            for layer, flag in enumerate(flags[name]):
                side = "below" if values[layer] < lowest else "above"
                if not flag:
                    self._warned.discard((name, layer))
                elif (name, layer) not in self._warned:
                    self._warned.add((name, layer))
                    logger.warning(
                        "layer %d: %s: %.3g, %s recipe.%s",
                        layer + 1,
                        name,
                        values[layer],
                        side,
                        option,
                    )
        return flags
