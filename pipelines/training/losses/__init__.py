"""Losses of stage one: objects that weigh what a tokenizer returns."""

from pipelines.training.losses.base import Loss, TokenizerLoss
from pipelines.training.losses.bound import Bound

__all__ = ["Bound", "Loss", "TokenizerLoss"]
