"""Training steps by themselves, without data and loop: what is timed, and its FLOPs."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality.peers import Peer, PeerQuantizer
from benchmarks.speed.measure import wait_for_gpu
from pipelines.config import TokenizerRecipe, TrainingConfig
from pipelines.training.blocks import recompute_blocks
from pipelines.training.losses import Bound
from pipelines.training.optimizer import Network, make_optimizer
from prior import Prior, PriorConfig
from prior.config import PriorNetworkConfig
from tokenizer import Tokenizer
from tokenizer.config import CodeMapConfig, TokenizerConfig
from tokenizer.storage.pretrained import PretrainedModule

TOTAL_STEPS = 1_000
PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOPs per second by part of a GPU's name (SXM modules, makers' data sheets)."""


def peak_flops(device: torch.device) -> float | None:
    """Of this GPU in bf16, FLOPs per second; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)  # only on a GPU
    return next((peak for part, peak in PEAK_BF16.items() if part in name), None)


def tokenizer_step(
    config: TokenizerConfig,
    image_size: int,
    batch: int,
    device: torch.device,
    training: TrainingConfig | None = None,
    peer: Peer | None = None,
) -> Callable[[], None]:
    """One step of stage one on random images: forward, backward, clipping, optimizer.

    Args:
        config: of the tokenizer.
        image_size: side in pixels.
        batch: images.
        device: where.
        training: `compile`, `activation_checkpointing` and `channels_last` are heeded.
        peer: a quantizer of vector-quantize-pytorch in the place of ours.
    """
    training = training or TrainingConfig()
    torch.manual_seed(0)
    recipe = TokenizerRecipe(latent_weight=None if peer is None else 1.0)
    quantizer = None if peer is None else functools.partial(PeerQuantizer, peer=peer)
    model = Tokenizer(config, quantizer)
    objective = Bound(recipe, model.has_posterior)
    images = torch.rand(batch, config.channels, image_size, image_size) * 2 - 1
    model.initialize_from_data(images[:64], torch.Generator().manual_seed(0))
    model.train().to(device)
    images = images.to(device)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    temperature = recipe.temperature(0, TOTAL_STEPS)
    step = _step(
        model,
        training,
        device,
        lambda: objective(images, model(images, temperature)).minimized,
        recipe.rate_factors(model.learned_roles()),
    )

    def call() -> None:
        step()
        model.after_step()

    return call


def new_prior(
    network: PriorNetworkConfig, code_maps: tuple[CodeMapConfig, ...], num_classes: int = 0
) -> Prior:
    """A prior with random weights and code vectors."""
    return Prior(PriorConfig(network=network, code_maps=code_maps, num_classes=num_classes))


def prior_step(
    network: PriorNetworkConfig,
    code_maps: tuple[CodeMapConfig, ...],
    batch: int,
    device: torch.device,
    training: TrainingConfig | None = None,
) -> Callable[[], None]:
    """One step of stage two on random codes; arguments as for `tokenizer_step`."""
    torch.manual_seed(0)
    model = new_prior(network, code_maps).to(device)
    indices = [own.to(device) for own in random_codes(code_maps, batch)]
    scale = 1 / num_codes(code_maps)
    training = training or TrainingConfig()
    return _step(model, training, device, lambda: model(indices).loss * scale)


def random_codes(code_maps: tuple[CodeMapConfig, ...], batch: int) -> list[Tensor]:
    """Codes of `batch` images, any that fit into all layers."""
    return [
        torch.randint(min(m.codebook_sizes), (batch, m.depth, m.height, m.width)) for m in code_maps
    ]


def num_codes(code_maps: tuple[CodeMapConfig, ...]) -> int:
    """Codes of one image."""
    return sum(m.depth * m.height * m.width for m in code_maps)


def _step(
    model: PretrainedModule[Any],
    training: TrainingConfig,
    device: torch.device,
    loss: Callable[[], Tensor],
    rate_factors: Mapping[str, float] = MappingProxyType({}),
) -> Callable[[], None]:
    if training.compile:
        model.compile()
    if training.activation_checkpointing:
        recompute_blocks(model)
    optimizer = make_optimizer(Network.from_config(model, training, rate_factors))

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), training.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def repeated(step: Callable[[], None], count: int) -> Callable[[], None]:
    """`count` steps, and the wait for the GPU, if there is one."""

    def call() -> None:
        for _ in range(count):
            step()
        wait_for_gpu()

    return call


def tokenizer_costs(config: TokenizerConfig, image_size: int, batch: int = 2) -> dict[str, float]:
    """Parameters, and FLOPs of a training step per image (matrix products and convolutions)."""
    # A number, not a shape.
    no_seed = patch("tokenizer.quantizers.mixture.draw_seed", return_value=0)
    with FakeTensorMode(), no_seed:  # shapes alone: neither memory nor work
        model = Tokenizer(config)
        objective = Bound(TokenizerRecipe(), model.has_posterior)
        images = torch.rand(batch, config.channels, image_size, image_size)
        with FlopCounterMode(display=False) as counter:
            torch.autograd.backward(objective(images, model(images)).minimized)
    return _costs(model, counter, batch)


def prior_costs(
    network: PriorNetworkConfig,
    code_maps: tuple[CodeMapConfig, ...],
    num_classes: int = 0,
    batch: int = 2,
) -> dict[str, float]:
    """Parameters, and FLOPs of a training step per image; see `tokenizer_costs`."""
    with FakeTensorMode():
        model = new_prior(network, code_maps, num_classes)
        labels = torch.zeros(batch, dtype=torch.int64) if num_classes else None
        with FlopCounterMode(display=False) as counter:
            model(random_codes(code_maps, batch), labels).loss.backward()
    return _costs(model, counter, batch)


def _costs(model: nn.Module, counter: FlopCounterMode, batch: int) -> dict[str, float]:
    return {
        "parameters": sum(own.numel() for own in model.parameters()),
        "flops_per_image": counter.get_total_flops() / batch,
    }
