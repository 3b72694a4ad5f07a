"""The deterministic baselines: nearest code, straight-through gradient, EMA codebooks.

VQ-VAE (arXiv 1711.00937, appendix A.1), VQ-VAE-2 (1906.00446), RQ-VAE (2203.01941).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from tokenizer.config import GroupConfig, NearestQuantizerConfig
from tokenizer.quantizers.base import (
    Collective,
    Mode,
    QuantizerOutput,
    at_least_float32,
    full_precision,
    random_rows,
)
from tokenizer.quantizers.codebooks import CodebookQuantizer
from tokenizer.quantizers.mixture import nearest_codes


class NearestQuantizer(CodebookQuantizer):
    """VQ-VAE with one layer, RQ-VAE with several.

    Codebooks are buffers. Training steps (training mode, "mixture") only collect statistics; the
    codebooks move in `after_step`. Latent terms: the commitment, a mean squared distance.
    """

    def __init__(self, group: GroupConfig, config: NearestQuantizerConfig) -> None:
        super().__init__(group)
        self.config = config
        for number, size in enumerate(group.codebook_sizes[: self.num_codebooks]):
            vectors = torch.randn(size, group.code_dim)
            self.register_buffer(f"codebook_{number}", vectors)
            self.register_buffer(f"mean_count_{number}", torch.ones(size))
            self.register_buffer(f"mean_sum_{number}", vectors.clone())
        self._pending: list[tuple[int, Tensor, Tensor]] = []

    def codebook(self, layer: int) -> Float[Tensor, "codes dim"]:
        """Code vectors of a layer."""
        return self.get_buffer(f"codebook_{layer % self.num_codebooks}")

    def forward(
        self,
        latents: Float[Tensor, "batch dim height width"],
        mode: Mode,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> QuantizerOutput:
        """Quantizes `latents` to nearest codes, whatever `temperature` and `generator`.

        The commitment term takes the mean over the partial sums of ‖Ẑ - sg(Σ_{l≤m} Z_l)‖².
        """
        batch, _, height, width = latents.shape
        with full_precision(latents.device):
            inputs = at_least_float32(latents).movedim(1, -1).contiguous()  # (B, H, W, D)
            flat = inputs.detach().flatten(0, 2)  # (N, D)
            quantized = torch.zeros_like(inputs)
            commitment = torch.zeros_like(inputs[:, 0, 0, 0])
            indices = []
            for layer in range(self.num_layers):
                residual = flat - quantized.flatten(0, 2)
                codebook = at_least_float32(self.codebook(layer))
                chosen = nearest_codes(residual, codebook)
                # Not to encode a preview midway, nor in a first pass over the batch.
                if self.training and mode == "mixture" and torch.is_grad_enabled():
                    self._pending.append((layer % self.num_codebooks, residual, chosen))
                quantized = quantized + codebook[chosen].view_as(inputs)
                commitment = commitment + (inputs - quantized).square().mean((1, 2, 3))
                indices.append(chosen.view(batch, height, width))
            commitment = commitment / self.num_layers
            # The straight-through gradient, with the value of the codes to the last bit.
            quantized = quantized + (inputs - inputs.detach())
        return QuantizerOutput(
            quantized.movedim(-1, 1),
            torch.stack(indices, 1),
            torch.zeros_like(commitment).unsqueeze(1).expand(batch, self.num_layers),
            {"commitment": commitment},
        )

    @torch.no_grad()
    def after_step(self, total: Collective, from_main: Collective) -> None:
        """Moves the codebooks towards the means of what chose them since the last call.

        Codes whose average count is below `restart_threshold` become encoder outputs of the batch.
        """
        assert self._pending, "after_step needs a training step before it"
        config = self.config
        for number in range(self.num_codebooks):
            codebook = self.get_buffer(f"codebook_{number}")
            mean_count = self.get_buffer(f"mean_count_{number}")
            mean_sum = self.get_buffer(f"mean_sum_{number}")
            pending = [(rows, chosen) for owner, rows, chosen in self._pending if owner == number]
            rows = torch.cat([entry[0] for entry in pending])
            chosen = torch.cat([entry[1] for entry in pending])
            # Not `bincount`, for whose result the host of a GPU would have to wait.
            ones = torch.ones_like(rows[:, 0])
            count = total(torch.zeros_like(mean_count).index_add_(0, chosen, ones))
            sums = total(torch.zeros_like(mean_sum).index_add_(0, chosen, rows))
            mean_count.lerp_(count, 1 - config.decay)
            mean_sum.lerp_(sums, 1 - config.decay)
            if config.restart_threshold > 0:
                candidates = from_main(random_rows(rows, len(codebook)))
                is_dead = mean_count < config.restart_threshold
                mean_sum.copy_(torch.where(is_dead.unsqueeze(1), candidates, mean_sum))
                mean_count.copy_(torch.where(is_dead, torch.ones_like(mean_count), mean_count))
            # Laplace smoothing keeps unused codes finite.
            share = (mean_count + 1e-5) / (mean_count.sum() + 1e-5 * len(mean_count))
            codebook.copy_(mean_sum / (share * mean_count.sum()).unsqueeze(1))
        self._pending.clear()

    def initialize(
        self, latents: Float[Tensor, "batch dim height width"], generator: torch.Generator
    ) -> None:
        """Draws the code vectors from the latents, unless the config keeps N(0, 1)."""
        if self.config.starts_from_data:
            super().initialize(latents, generator)

    def initialize_layer(
        self, layer: int, inputs: Float[Tensor, "positions dim"], generator: torch.Generator
    ) -> None:
        """Code vectors = random inputs."""
        if layer < self.num_codebooks:
            codebook = self.codebook(layer)
            codebook.copy_(self.draw_codes(layer, inputs, generator))
            self.get_buffer(f"mean_sum_{layer}").copy_(codebook)
