"""How a cell is trained: the ordinary stage with another quantizer or ablation, and a clock."""

import functools
import statistics
import time
from collections.abc import Mapping

from accelerate import Accelerator
from torch import Tensor, nn

from benchmarks.quality.cells import ABLATIONS, Ablation, Cell
from benchmarks.quality.peers import PeerQuantizer
from benchmarks.quality.variants import VariantQuantizer
from pipelines.config import TokenizerRunConfig
from pipelines.run.log import read_metrics
from pipelines.training.losses import Bound, Loss
from pipelines.training.tokenizer_stage import LoadedImages, TokenizerStage
from tokenizer.config import StochasticQuantizerConfig
from tokenizer.quantizers import BuildQuantizer

HARD_SHARE = 0.2
"""Share of the steps with nearest codes in the ablation `hard-phase`."""


class CellStage(TokenizerStage):
    """The ordinary stage with the cell's quantizer, and a clock."""

    def __init__(self, cell: Cell, config: TokenizerRunConfig, accelerator: Accelerator) -> None:
        self.ablation = ABLATIONS[cell.ablation] if cell.ablation else Ablation()
        super().__init__(config, accelerator, quantizer=_quantizer(cell, self.ablation))
        self.num_steps = 0
        self.seconds = 0.0
        self._started = 0.0

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Tensor, step: int) -> Loss:
        """The ordinary loss, changed as the ablation has it."""
        total_steps = self.config.training.total_steps
        for quantizer in self.model.quantizers:
            if isinstance(quantizer, VariantQuantizer):
                is_late = step >= (1 - HARD_SHARE) * total_steps
                quantizer.is_hard = self.ablation.variant == "hard-phase" and is_late
        loss = super().loss(name, modules, batch, step)
        if not self.ablation.warms_up_latents:
            return loss
        latents = loss.terms["quantization_error"] - loss.terms["posterior_entropy"]
        assert isinstance(self.objective, Bound)
        missing = self.objective.latent_weight * (1 - min(1.0, 2 * step / total_steps))
        return loss._replace(minimized=loss.minimized - missing * latents * (2 / batch[0].numel()))

    def images_per_second(self) -> float:
        """Of training; by the clock on the wall if an earlier process has trained to the end."""
        if self.num_steps:
            return self.num_steps * self.config.training.batch_size / self.seconds
        speeds = read_metrics(self.config.output_dir, "train")["images_per_second"][1]
        return float(statistics.median(speeds))

    def temperature(self, step: int) -> float:
        """The recipe's, or linear from the first step."""
        if not self.ablation.has_linear_temperature:
            return super().temperature(step)
        first, last = self.config.recipe.initial_temperature, self.config.recipe.final_temperature
        return first + (last - first) * step / max(self.config.training.total_steps - 1, 1)

    def prepare(self, batch: LoadedImages) -> Tensor:
        """The images; the clock of the step starts."""
        self._started = time.process_time()
        return super().prepare(batch)

    def after_step(self, accelerator: Accelerator) -> None:
        """The baselines' codebooks; the clock stops.

        Processor time, since cells run side by side; of a GPU see `images_per_second` in the
        run's metrics.
        """
        super().after_step(accelerator)
        self.seconds += time.process_time() - self._started
        self.num_steps += 1


def _quantizer(cell: Cell, ablation: Ablation) -> BuildQuantizer | None:
    if cell.method.peer is not None:
        return functools.partial(PeerQuantizer, peer=cell.method.peer)
    if ablation.variant is None:
        return None
    config = cell.method.quantizer
    assert isinstance(config, StochasticQuantizerConfig)
    changed = config.model_copy(update=dict(ablation.quantizer))
    return functools.partial(VariantQuantizer, config=changed, variant=ablation.variant)
