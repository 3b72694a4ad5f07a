"""Plans a run over a folder of images: what fits the minutes on this machine."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from pipelines.command_configs import QuickstartConfig
from pipelines.config import DataConfig, PriorRunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.data.decoding import UnreadableImageError, decode_image
from pipelines.data.folder_listing import list_folder, split_folders
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS, describe_time
from pipelines.run.folder import load_run, save_run
from pipelines.training.step_time import prior_task, seconds_per_step, tokenizer_task
from tokenizer.storage.errors import InputError

logger = logging.getLogger(__name__)

NUM_LOOKED_AT = 64
"""Files that are opened to choose the image size and the number of channels."""
SIZES = (128, 64, 32)
TOKENIZER_SHARE, PRIOR_SHARE = 0.45, 0.4
"""Of the minutes; the rest goes to decoding, codes, evaluation and the page."""
FEWEST_STEPS, MOST_STEPS = 1_500, 100_000
"""Of the tokenizer: below, a smaller image size is taken; above, minutes are left over."""
LARGER_PRESETS = {128: "images128-sqvae2", 64: "cifar10-sqvae2", 32: "cifar10-sqvae2"}
"""By image size, whose networks are tried on a GPU."""
LARGER_PRIOR = "cifar10-sqvae2"
"""Whose prior is; those for longer training are too large to learn anything in minutes."""
FEWEST_STEPS_OF_LARGER = 4_000
"""Of both stages: below, larger networks give less than small ones."""


class Plan(NamedTuple):
    """Both stages of a run."""

    tokenizer: TokenizerRunConfig
    prior: PriorRunConfig


class Candidate(NamedTuple):
    """What may be trained."""

    image_size: int
    networks_of: str
    """Name of the preset whose networks they are."""
    plan: Plan
    fewest: tuple[int, int]
    """Steps of the stages, below which the next candidate is taken."""


def load_plan(run_dir: Path, config: QuickstartConfig) -> Plan | None:
    """What was planned for the run before, if anything.

    Raises:
        InputError: `run_dir` is a run over another folder.
    """
    folder = run_dir / "plan"
    if not (folder / "prior.json").exists():
        return None
    plan = Plan(
        load_run(TokenizerRunConfig, folder / "tokenizer.json"),
        load_run(PriorRunConfig, folder / "prior.json"),
    )
    expected = _folders(config.folder)["root"]
    if plan.tokenizer.data.root != expected:
        raise InputError(
            f"run_dir must be another one: {run_dir} is a run over {plan.tokenizer.data.root}"
        )
    logger.info("going on as planned in %s, in the minutes that were given then", folder)
    update = {"run_dir": run_dir}  # which may have been moved
    return Plan(plan.tokenizer.model_copy(update=update), plan.prior.model_copy(update=update))


def save_plan(plan: Plan, folder: Path) -> None:
    """As configurations that the commands take in place of a preset, the prior's last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, run in plan._asdict().items():
        save_run(run, folder / f"{name}.json")


def _folders(folder: Path) -> dict[str, Path | None]:
    root, validation_root = split_folders(folder)
    return {
        "root": root.absolute(),
        "validation_root": validation_root and validation_root.absolute(),
    }


def make_plan(config: QuickstartConfig, run_dir: Path, accelerator: Accelerator) -> Plan:
    """The largest images and networks whose steps, timed on this machine, fit the minutes.

    Raises:
        InputError: the folder cannot be used.
    """
    folders = _folders(config.folder)
    root = folders["root"]
    assert root is not None
    listing = list_folder(root, "folder", skip_unreadable=True)
    paths = [root / name for name in listing.names]
    needed = max(len(listing.class_names), 1) + 1  # one of each class stays for training
    if len(paths) < needed and folders["validation_root"] is None:
        raise InputError(
            f"folder must hold {needed} images at least, one of each class for training and one "
            f"for validation, got {len(paths)} in {root}"
        )
    side, channels = look_at(paths)
    has_classes = len(listing.class_names) > 1
    classes = f"in {len(listing.class_names)} classes" if has_classes else "without classes"
    logger.info(
        "%s: %s files %s, mostly of at least %d pixels%s",
        config.folder,
        f"{len(paths):,}",
        classes,
        side,
        ", gray" if channels == 1 else "",
    )
    device = accelerator.device
    sized = [_over(each, run_dir, channels, has_classes, folders) for each in candidates(device)]
    fitting = [each for each in sized if each.image_size <= max(side, SIZES[-1])]
    chosen, steps, times = choose(
        fitting, config.minutes * 60, lambda plan: _seconds_per_step(plan, device)
    )
    plan, size = chosen.plan, chosen.image_size
    for run, count, each in zip(plan, steps, times, strict=True):
        logger.info(
            "%s: %s steps of %.3g s, %s",
            run.output_dir.name,
            f"{count:,}",
            each,
            describe_time(count * each),
        )
    logger.info(
        "images of %d×%d pixels, the networks of %s, %.4g minute%s in all",
        *(size, size, chosen.networks_of, config.minutes, "s" * (config.minutes != 1)),
    )
    return Plan(
        plan.tokenizer.model_copy(update=_in_steps(plan.tokenizer.training, steps[0])),
        plan.prior.model_copy(update=_in_steps(plan.prior.training, steps[1])),
    )


def candidates(device: torch.device) -> list[Candidate]:
    """Both stages by image size, the largest first; on a GPU each with larger networks before."""
    found = []
    for size in SIZES:
        name = f"images{size}-small"
        small = Plan(TOKENIZER_PRESETS[name], PRIOR_PRESETS[name])
        if device.type != "cpu":
            found.append(_with_networks(small, size, LARGER_PRESETS[size]))
        found.append(Candidate(size, name, small, (FEWEST_STEPS, 0)))
    return found


def _with_networks(small: Plan, size: int, name: str) -> Candidate:
    """The networks and codes of a larger preset, and how it trains them, for images of a size."""
    run = TOKENIZER_PRESETS[name]
    scale = size // run.data.image_size  # as many codes
    groups = tuple(
        group.model_copy(update={"downsampling": group.downsampling * scale})
        for group in run.tokenizer.groups
    )
    prior = PRIOR_PRESETS[LARGER_PRIOR]
    plan = Plan(
        small.tokenizer.model_copy(
            update={
                "tokenizer": run.tokenizer.model_copy(update={"groups": groups}),
                "training": run.training,
            }
        ),
        small.prior.model_copy(update={"prior": prior.prior, "training": prior.training}),
    )
    return Candidate(size, name, plan, (FEWEST_STEPS_OF_LARGER, FEWEST_STEPS_OF_LARGER))


def choose(
    sized: Sequence[Candidate], seconds: float, time_steps: Callable[[Plan], tuple[float, float]]
) -> tuple[Candidate, list[int], tuple[float, float]]:
    """The first candidate of which enough steps fit the time, or the last.

    Args:
        sized: candidates, the best first.
        seconds: for both stages, evaluation and the rest.
        time_steps: seconds of a step of each stage.

    Returns:
        The candidate, the steps of both stages, and seconds of one.
    """
    for candidate in sized:
        try:
            times = time_steps(candidate.plan)
        except torch.OutOfMemoryError:
            if candidate is sized[-1]:
                raise
            logger.info("%s does not fit the memory", candidate.networks_of)
            continue
        counts = [
            min(max(int(share * seconds / each), 10), MOST_STEPS)
            for share, each in zip((TOKENIZER_SHARE, PRIOR_SHARE), times, strict=True)
        ]
        if all(count >= least for count, least in zip(counts, candidate.fewest, strict=True)):
            break
    return candidate, counts, times


def _in_steps(training: TrainingConfig, count: int) -> dict[str, TrainingConfig]:
    update = {
        "total_steps": count,
        "warmup_steps": min(training.warmup_steps, count // 10),
        "validation_interval": math.ceil(count / 4),
        "checkpoint_interval": math.ceil(count / 8),
        "log_interval": max(count // 100, 1),
    }
    return {"training": training.model_copy(update=update)}


def look_at(paths: list[Path]) -> tuple[int, int]:
    """The median of the shorter sides of some of these files, and 1 channel if all are gray, or 3.

    Raises:
        InputError: none of them can be read.
    """
    sides, is_gray = [], True
    for number in np.linspace(0, len(paths) - 1, min(len(paths), NUM_LOOKED_AT)).astype(int):
        try:
            pixels = decode_image(paths[number], SIZES[-1], 3).pixels
            with Image.open(paths[number]) as image:
                sides.append(min(image.size))
        except (UnreadableImageError, OSError):  # training leaves it out, and counts it
            continue
        is_gray = is_gray and bool((pixels == pixels[..., :1]).all())
    if not sides:
        raise InputError(
            f"folder: none of the files that were looked at in {paths[0].parent} can be read"
        )
    return int(np.median(sides)), 1 if is_gray else 3


def _over(
    candidate: Candidate,
    run_dir: Path,
    channels: int,
    has_classes: bool,
    folders: dict[str, Path | None],
) -> Candidate:
    """The same over a folder of images."""
    run, prior_run = candidate.plan
    changes = {**folders, "channels": channels, "skip_unreadable": True}
    plan = Plan(
        run.model_copy(
            update={
                "run_dir": run_dir,
                "data": DataConfig.model_validate(run.data.model_dump() | changes),
                "tokenizer": run.tokenizer.model_copy(update={"channels": channels}),
            }
        ),
        prior_run.model_copy(
            update={
                "run_dir": run_dir,
                "is_class_conditional": has_classes,
                "guidance_scale": 2.0 if has_classes else 1.0,
            }
        ),
    )
    return candidate._replace(plan=plan)


def _seconds_per_step(plan: Plan, device: torch.device) -> tuple[float, float]:
    """Of both stages."""
    run, prior_run = plan
    tasks = (
        tokenizer_task(run, run.training.batch_size, device),
        prior_task(prior_run, run, prior_run.training.batch_size, device),
    )
    times = [
        seconds_per_step(*task, own.training.precision)
        for task, own in zip(tasks, plan, strict=True)
    ]
    return times[0], times[1]
