"""Training: images/s of stage one beside vector-quantize-pytorch, codes/s of stage two.

And what the loop adds to forward and backward: measured within ordinary runs.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.quality.peers import Peer
from benchmarks.speed.measure import Budget, Comparison, device_of, wait_for_gpu
from benchmarks.speed.steps import (
    num_codes,
    peak_flops,
    prior_costs,
    prior_step,
    repeated,
    tokenizer_costs,
    tokenizer_step,
)
from pipelines.config import PriorRunConfig, RunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.data.sources import trained_images
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.run.folder import load_run
from pipelines.train_prior import prior_stage
from pipelines.training.loop import make_accelerator, train
from pipelines.training.losses import Loss
from pipelines.training.prior_stage import PriorStage
from pipelines.training.tokenizer_stage import TokenizerStage
from prior.config import PriorNetworkConfig
from tokenizer.builders import deterministic, rsq_vae, sq_vae
from tokenizer.code_maps import code_maps_of
from tokenizer.config import CodeMapConfig, NetworkConfig, TokenizerConfig

PROBED_STEPS = 10
"""Steps from one probe of forward and backward to the next."""


class Size(NamedTuple):
    """What a budget can run."""

    networks: NetworkConfig
    image_size: int
    batch: int
    steps: int
    """Per call."""
    rounds: int
    tokenizer_run: str
    """Preset of the run in which the loop is measured."""
    prior: PriorNetworkConfig
    prior_batch: int
    loop_steps: int


SMALL = NetworkConfig(patch_size=4, width=64, max_width=64)
SIZES: dict[Budget, Size] = {
    "tiny": Size(
        NetworkConfig(patch_size=4, width=8, max_width=8, num_blocks=1),
        *(16, 4, 1, 1, "tiny", PRIOR_PRESETS["tiny"].prior, 4, 2 * PROBED_STEPS),
    ),
    "cpu": Size(SMALL, 32, 64, 5, 7, "cifar10-rsqvae", PriorNetworkConfig(), 16, 40),
    "gpu": Size(
        NetworkConfig(width=128, max_width=256, num_blocks=4),
        *(32, 256, 20, 5, "images128-rsqvae"),
        *(
            PriorNetworkConfig(width=768, num_spatial_layers=12, num_depth_layers=4, num_heads=12),
            256,
            120,
        ),
    ),
}


def comparisons(budget: Budget) -> Iterator[Comparison]:
    """Quantizers under the same networks; the options of both stages."""
    size, device = SIZES[budget], device_of(budget)
    for name, config, ours, theirs in (
        ("8x8, K 256", sq_vae(8, 256, 32, networks=size.networks), "SQ-VAE", "VectorQuantize"),
        ("8x8x4, K 64", rsq_vae(8, 4, 64, 32, networks=size.networks), "RSQ-VAE", "ResidualVQ"),
    ):
        config = _at(config, size.image_size)
        baseline = deterministic(config)
        yield Comparison(
            name=f"stage one, {name}",
            contenders={
                ours: _tokenizer(config, size, device),
                # ResidualVQ of one layer is VectorQuantize and a loop around it.
                theirs: _tokenizer(baseline, size, device, peer="ResidualVQ"),
                f"{ours} made deterministic": _tokenizer(baseline, size, device),
            },
            **_images(size, device, config),
        )
    options = {
        "as it is": TrainingConfig(),
        "channels_last": TrainingConfig(channels_last=True),
        "activation_checkpointing": TrainingConfig(activation_checkpointing=True),
        "compile": TrainingConfig(compile=True),
    }
    if budget == "tiny":  # it would take a minute
        del options["compile"]
    yield Comparison(
        name="stage one, options",
        contenders={
            name: _tokenizer(config, size, device, training) for name, training in options.items()
        },
        **_images(size, device, config),
    )
    maps = code_maps_of(config.groups, size.image_size, size.image_size)
    options.pop("channels_last")
    yield Comparison(
        name="stage two, options",
        contenders={
            name: _prior(size, maps, device, training) for name, training in options.items()
        },
        unit="codes",
        amount=size.prior_batch * num_codes(maps) * size.steps,
        rounds=size.rounds,
        details=_details(size, device, prior_costs(size.prior, maps))
        | {"batch": size.prior_batch, "codes_per_image": num_codes(maps)},
    )


def _at(config: TokenizerConfig, image_size: int) -> TokenizerConfig:
    """A config for images of side 32 with the same code maps at another size."""
    groups = tuple(
        group.model_copy(update={"downsampling": max(group.downsampling * image_size // 32, 4)})
        for group in config.groups
    )
    return config.model_copy(update={"groups": groups})


def _tokenizer(
    config: TokenizerConfig,
    size: Size,
    device: torch.device,
    training: TrainingConfig | None = None,
    peer: Peer | None = None,
) -> Callable[[], Callable[[], None]]:
    return lambda: repeated(
        tokenizer_step(config, size.image_size, size.batch, device, training, peer),
        size.steps,
    )


def _prior(
    size: Size,
    maps: tuple[CodeMapConfig, ...],
    device: torch.device,
    training: TrainingConfig,
) -> Callable[[], Callable[[], None]]:
    return lambda: repeated(
        prior_step(size.prior, maps, size.prior_batch, device, training), size.steps
    )


def _images(size: Size, device: torch.device, config: TokenizerConfig) -> dict[str, Any]:
    """What comparisons of stage one have in common."""
    return {
        "unit": "images",
        "amount": size.batch * size.steps,
        "rounds": size.rounds,
        "details": _details(size, device, tokenizer_costs(config, size.image_size)),
    }


def _details(size: Size, device: torch.device, metadata: dict[str, float]) -> dict[str, Any]:
    return {"device": device.type, "image_size": size.image_size, "batch": size.batch, **metadata}


# The loop


def measurements(budget: Budget) -> dict[str, Any]:
    """Of each stage: seconds per step of the loop, and of its forward and backward alone."""
    size = SIZES[budget]
    results = {}
    with TemporaryDirectory() as folder:
        training: dict[str, Any] = {
            "total_steps": size.loop_steps,
            "log_interval": max(size.loop_steps // 2, 1),
            "validation_interval": 10**6,
            "checkpoint_interval": 10**6,
            "num_validation_images": 8,
        }
        data: dict[str, Any] = {"dataset": "shapes", "root": None, "num_images": 2_000}
        data |= {"num_validation_images": 32, "cache_dir": Path(folder, "cache")}
        run = TOKENIZER_PRESETS[size.tokenizer_run]
        parts = {"run_dir": Path(folder), "data": run.data.model_copy(update=data)}
        parts["training"] = run.training.model_copy(update=training)
        results["stage one"] = _measured_loop(run.model_copy(update=parts))
        prior_run = PRIOR_PRESETS[size.tokenizer_run]
        training["batch_size"] = size.prior_batch
        parts = {"run_dir": Path(folder), "prior": size.prior}
        parts["training"] = prior_run.training.model_copy(update=training)
        results["stage two"] = _measured_loop(prior_run.model_copy(update=parts))
    return results


class ProbingStage:
    """A stage which, from time to time, repeats forward and backward alone and times them.

    On a CPU in seconds of processor time, of all threads: other jobs do not count then, and loading
    does, though it runs beside the step.
    """

    def __init__(self, stage: TokenizerStage | PriorStage, accelerator: Accelerator) -> None:
        self._stage = stage
        self._accelerator = accelerator
        is_cpu = accelerator.device.type == "cpu"
        self._clock = time.process_time if is_cpu else time.perf_counter
        self._latest: tuple[str, Mapping[str, nn.Module], Any, int] | None = None
        self._num_steps = 0
        self._started = 0.0
        self.loop: list[float] = []
        """Seconds per step of the loop, of each stretch between two probes."""
        self.alone: list[float] = []
        """Seconds per forward and backward, of each probe."""
        # All else is the stage's; a check of the protocol calls no `__getattr__` on Python 3.12.
        for name in dir(stage):
            if not name.startswith("_") and not hasattr(type(self), name):
                setattr(self, name, getattr(stage, name))

    def loss(self, name: str, modules: Mapping[str, nn.Module], batch: Any, step: int) -> Loss:
        """The stage's, on a batch that is remembered."""
        self._latest = name, modules, batch, step
        return self._stage.loss(*self._latest)

    def after_step(self, accelerator: Accelerator) -> None:
        """After some steps, a probe."""
        self._stage.after_step(accelerator)
        self._num_steps += 1
        if self._num_steps % PROBED_STEPS:
            return
        wait_for_gpu()
        if self._started:
            self.loop.append((self._clock() - self._started) / PROBED_STEPS)
        started = self._clock()
        assert self._latest is not None
        for _ in range(PROBED_STEPS):
            loss = self._stage.loss(*self._latest)
            self._accelerator.backward(loss.minimized)
            self._stage.model.zero_grad()
        wait_for_gpu()
        self.alone.append((self._clock() - started) / PROBED_STEPS)
        self._started = self._clock()


def _measured_loop(config: RunConfig) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    stage: TokenizerStage | PriorStage
    if isinstance(config, TokenizerRunConfig):
        stage = TokenizerStage(config, accelerator)
        metadata = tokenizer_costs(config.tokenizer, config.data.image_size)
        codes = 0
    else:
        assert isinstance(config, PriorRunConfig)
        run = load_run(TokenizerRunConfig, config.tokenizer_dir / "config.json")
        images = trained_images(run, config.tokenizer_dir, accelerator)
        stage = prior_stage(config, *images, accelerator)
        prior = stage.model.config
        metadata = prior_costs(prior.network, prior.code_maps, prior.num_classes)
        codes = stage.num_codes
    probing: Any = ProbingStage(stage, accelerator)
    train(probing, config, accelerator)
    batch = config.training.batch_size
    # A probe stands between two stretches, so that a slow minute slows both.
    alone = [(a + b) / 2 for a, b in zip(probing.alone, probing.alone[1:], strict=False)]
    shares = [1 - own / whole for own, whole in zip(alone, probing.loop, strict=True)]
    seconds = float(np.median(probing.loop))
    peak = peak_flops(accelerator.device)
    rate = batch * metadata["flops_per_image"] / seconds
    return {
        "device": accelerator.device.type,
        "batch": batch,
        **metadata,
        "images_per_second": batch / seconds,
        "codes_per_second": codes * batch / seconds,
        "share_outside_forward_and_backward": float(np.median(shares)),
        "shares_of_stretches": shares,
        "flops_per_second": rate,
        "utilization": None if peak is None else rate / peak,
    }
