"""The prior inside a tokenizer, fitted to the hard codes that are in use."""

import math

import torch

from pipelines.data.dataset import ImageDataset, chosen_items
from pipelines.images import to_float
from tokenizer import Tokenizer

LEARNING_RATE = 2e-3
BATCH = 64


def calibrate_code_prior(
    tokenizer: Tokenizer, images: ImageDataset, steps: int, seed: int, device: torch.device
) -> None:
    """Trains the heads alone, in place: in training they saw soft posteriors, which overstate bits.

    Also what gives a finished tokenizer a prior that had none in its training.
    """
    if tokenizer.code_prior is None:
        return
    was_training = tokenizer.training
    tokenizer.eval()
    parameters = list(tokenizer.code_prior.parameters())
    needed_gradient = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, LEARNING_RATE, (0.9, 0.99), weight_decay=0.0)
    items = chosen_items(len(images), len(images), seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        rows = [(step * BATCH + number) % len(items) for number in range(BATCH)]
        batch = to_float(images.images_at(items[rows])).to(device)
        indices = tokenizer.encode(batch)
        with torch.enable_grad():
            terms = tokenizer.code_prior.terms(tokenizer.top_down, indices, None)
            gradients = torch.autograd.grad(terms.fit * (2 / batch[0].numel()), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    for parameter, needed in zip(parameters, needed_gradient, strict=True):
        parameter.grad = None
        parameter.requires_grad_(needed)
    tokenizer.train(was_training)
