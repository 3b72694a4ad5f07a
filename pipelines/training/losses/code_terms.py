"""What the prior inside a tokenizer adds to the loss of stage one."""

import torch

from pipelines.recipe import CodePriorRecipe
from pipelines.training.losses.base import Loss
from tokenizer import TokenizerOutput


def with_code_terms(
    loss: Loss, output: TokenizerOutput, recipe: CodePriorRecipe, step: int, total_steps: int
) -> Loss:
    """Adds μ · Σ CE(P, sg p) + Σ CE(sg P, p); the second alone trains the heads."""
    if output.code_terms is None:
        return loss
    rate, fit = output.code_terms
    weight = recipe.rate_weight_at(step, total_steps)
    added = (weight * rate + fit) * (2 / output.reconstructions[0].numel())
    logged = {"code_length": fit, "code_rate_weight": torch.full_like(fit, weight)}
    return Loss(loss.minimized + added, {**loss.terms, **logged})
