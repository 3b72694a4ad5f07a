"""The README's example of a quantizer from outside the package, run by `test_quantizer`."""

import torch
from torch import nn

from tokenizer import Quantizer, QuantizerOutput


class RandomCodebook(Quantizer):  # nearest of fixed random vectors, straight-through gradient
    def __init__(self, group):
        super().__init__(group)
        self.table = nn.Buffer(torch.randn(group.codebook_sizes[0], group.code_dim))

    def codebook(self, layer):
        return self.table

    def forward(self, latents, mode, temperature=1.0, generator=None):
        rows = latents.movedim(1, -1).contiguous()  # (B, H, W, D)
        indices = torch.cdist(rows, self.table).argmin(-1)
        codes = self.table[indices]
        error = (rows - codes).square().mean((1, 2, 3))
        quantized = (codes + (rows - rows.detach())).movedim(-1, 1)
        entropy = torch.zeros_like(error).unsqueeze(1)  # of a posterior, had it one
        return QuantizerOutput(quantized, indices.unsqueeze(1), entropy, {"commitment": error})
