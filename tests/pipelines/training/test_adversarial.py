"""The adversarial part of stage one: its formulas, its start, and runs that are interrupted."""

import logging
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn

from pipelines.config import TokenizerRunConfig, TrainingConfig
from pipelines.recipe import AdversarialConfig, Augmentation
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.losses import Loss
from pipelines.training.losses.adversarial import Adversary
from pipelines.training.losses.augmentation import augment
from pipelines.training.losses.discriminator import PatchDiscriminator
from pipelines.training.networks import TrainedNetwork
from tests.faults.jobs import Job
from tests.tiny_runs import assert_same_run, logged, tokenizer_run
from tokenizer.storage.errors import InputError

SMALL = AdversarialConfig(
    weight=0.5, width=4, num_downsamplings=2, start_step=1, lead_steps=1, lecam_weight=0.5
)
OPTIONS = {
    "recipe.adversarial.weight": 0.5,
    "recipe.adversarial.width": 4,
    "recipe.adversarial.num-downsamplings": 2,
    "recipe.adversarial.start-step": 1,
    "recipe.adversarial.lead-steps": 1,
    "training.total-steps": 6,
    "training.gradient-accumulation-steps": 2,
}


class Judged(nn.Module):
    """A last layer of one weight, and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Parameter(torch.full((1, 1), 0.7))


def adversary(**changes: Any) -> tuple[Adversary, nn.Parameter]:
    last = Judged().last
    config = SMALL.model_copy(update=changes)
    training = TrainingConfig(total_steps=10)
    return Adversary(
        config, training, 3, 16, lambda: last, torch.device("cpu"), lambda tensor: tensor
    ), last


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_norms() -> None:
    own, last = adversary(weight=0.5, max_weight=1e5, augmentations=())
    images = torch.rand(2, 3, 16, 16)
    reconstructions = images * last
    reconstruction = (images - reconstructions).square().sum() * 100
    judge = own.discriminator
    given = Loss(reconstruction * (2 / 768) + 5 * last.sum(), {"reconstruction": reconstruction})
    found = own.tokenizer_loss(given, images, reconstructions, judge, 2)
    fooled = -judge(images * last).mean()
    scaled = (images - images * last).square().sum() * 100 * (2 / 768)
    norms = [torch.autograd.grad(one, last)[0].norm() for one in (scaled, fooled)]
    expected = 0.5 * norms[0] / norms[1]
    torch.testing.assert_close(found.terms["adversarial_weight"], expected)
    total = given.minimized + expected * found.terms["adversarial"]
    torch.testing.assert_close(found.minimized, total)
    bounded, last = adversary(weight=0.5, max_weight=1e-3, augmentations=())
    reconstructions = images * last
    given = Loss((images - reconstructions).square().sum(), {})
    clamped = bounded.tokenizer_loss(given, images, reconstructions, bounded.discriminator, 2)
    assert clamped.terms["adversarial_weight"] == pytest.approx(0.5e-3)
    fixed, last = adversary(weighting="fixed", weight=0.25)
    reconstructions = images * last
    given = Loss((images - reconstructions).square().sum(), {})
    weighed = fixed.tokenizer_loss(given, images, reconstructions, fixed.discriminator, 2)
    assert weighed.terms["adversarial_weight"] == 0.25


def test_the_discriminator_follows_the_hinge_and_its_averages() -> None:
    own, last = adversary(augmentations=(), lecam_decay=0.9)
    images, reconstructions = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    judge = own.discriminator
    given = Loss(last.sum(), {})
    for real_mean, fake_mean in ((0.0, 0.0), (0.3, -0.2)):
        judge.real_mean.fill_(real_mean)
        judge.fake_mean.fill_(fake_mean)
        own.tokenizer_loss(given, images, reconstructions * last, judge, 1)
        found = own.discriminator_loss(judge, images, 1)
        real = judge(images).double()
        fake = judge((reconstructions * last).detach()).double()
        hinge = (1 - real).clamp_min(0).mean() + (1 + fake).clamp_min(0).mean()
        lecam = ((real - fake_mean) ** 2).mean() + ((fake - real_mean) ** 2).mean()
        torch.testing.assert_close(found.minimized.double(), hinge + 0.5 * lecam)
        own.after_step()
        expected = 0.9 * real_mean + 0.1 * real.mean()
        assert judge.real_mean.item() == pytest.approx(expected.item(), rel=1e-5)
    assert found.terms["right_real"] == (real > 0).double().mean()
    # Positive everywhere: right of images, wrong of reconstructions.
    with torch.no_grad():
        judge.layers[-1].weight.zero_()
        judge.layers[-1].bias.fill_(2)
    found = own.discriminator_loss(judge, images, 1)
    assert (found.terms["right_real"], found.terms["right_fake"]) == (1, 0)


def run(folder: Path, cache_dir: Path, **changes: Any) -> TokenizerRunConfig:
    config = tokenizer_run(folder, cache_dir, total_steps=4)
    adversarial = SMALL.model_copy(update=changes)
    recipe = config.recipe.model_copy(update={"adversarial": adversarial})
    return config.model_copy(update={"recipe": recipe})


def test_before_it_counts_the_tokenizer_is_trained_as_without_it(
    tmp_path: Path, cache_dir: Path
) -> None:
    plain = tokenizer_run(tmp_path / "plain", cache_dir, total_steps=4)
    both = run(tmp_path / "both", cache_dir, start_step=1, lead_steps=2)
    for config in (plain, both):
        train_tokenizer(config)
    expected = [line["rmse"] for line in logged(plain.output_dir) if line["phase"] == "train"]
    lines_of_both = [line for line in logged(both.output_dir) if line["phase"] == "train"]
    found = [line["tokenizer/rmse"] for line in lines_of_both]
    assert found == expected  # the error of a step is that before its update
    weights = [line["tokenizer/adversarial_weight"] for line in lines_of_both]
    assert weights[:3] == [0, 0, 0]
    assert weights[3] > 0
    rates = [line["discriminator/learning_rate"] for line in lines_of_both]
    assert rates[0] == 0
    assert rates[1] > 0
    discriminators = [
        load_file(both.output_dir / f"state/step_{step:08d}/discriminator.safetensors")
        for step in (2, 4)
    ]
    assert discriminators[1]["real_mean"] != discriminators[0]["real_mean"]
    assert not torch.equal(*(own["layers.0.weight"] for own in discriminators))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_with_two_networks_that_was_killed_resumes_bit_for_bit(
    num_processes: int, tmp_path: Path, cache_dir: Path
) -> None:
    def start(folder: Path) -> Job:
        options = {"run-dir": folder, "data.cache-dir": cache_dir, **OPTIONS}
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        return Job(
            "pipelines.train_tokenizer", ["tiny", *words], tmp_path / "output", num_processes
        )

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole).wait() == [0] * num_processes
    job = start(broken)
    while job.is_running() and not (broken / "tokenizer/state/step_00000002").exists():
        time.sleep(0.01)
    job.signal(signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL] * num_processes, job.output()
    assert start(broken).wait() == [0] * num_processes
    assert_same_run(whole / "tokenizer", broken / "tokenizer")


def test_mixed_precision_keeps_all_numbers_finite(tmp_path: Path, cache_dir: Path) -> None:
    config = run(tmp_path, cache_dir)
    training = config.training.model_copy(update={"precision": "bf16"})
    train_tokenizer(config.model_copy(update={"training": training}))
    last = logged(config.output_dir)[-1]
    assert {"discriminator_right_real", "discriminator_right_fake"} <= last.keys()


def always_right() -> tuple[Adversary, torch.Tensor, torch.Tensor]:
    """One that knows images of the first kind from those of the second."""
    own, _ = adversary()
    with torch.no_grad():
        own.discriminator.layers = nn.Sequential(nn.Conv2d(3, 1, 1))
        own.discriminator.layers[0].weight.fill_(1)
        own.discriminator.layers[0].bias.zero_()
    return own, torch.ones(2, 3, 16, 16), -torch.ones(2, 3, 16, 16)


def test_a_discriminator_that_always_wins_is_reported_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own, bright, dark = always_right()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            own.check(bright, dark)
        own.check(dark, dark)  # right on half: the count begins anew
        for _ in range(5):
            shares = own.check(bright, dark)
    assert shares == {"discriminator_right_real": 1, "discriminator_right_fake": 1}
    assert caplog.text.count("right on every patch at 3 validations in a row") == 1


def test_the_count_of_its_victories_goes_on_and_older_checkpoints_have_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def trained(own: Adversary, saved: Any) -> TrainedNetwork:
        config = TrainingConfig()
        return TrainedNetwork("discriminator", own.network(), config, Accelerator(), saved)

    before, bright, dark = always_right()
    before.check(bright, dark)
    before.check(bright, dark)
    state = trained(before, None).state()
    weights = {name: own for name, own in state["discriminator"].items() if name != "num_won"}
    for saved, warnings in (({**state, "discriminator": weights}, 0), (state, 1)):
        after, *_ = always_right()
        trained(after, saved)
        after.check(bright, dark)
        assert caplog.text.count("right on every patch at 3 validations") == warnings


def test_what_cannot_be_is_refused_before_work_starts(tmp_path: Path, cache_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"must be below training.total_steps 4, got 9"):
        TokenizerRunConfig.model_validate(
            run(tmp_path, cache_dir, start_step=4, lead_steps=5).model_dump()
        )
    compiled = run(tmp_path, cache_dir)
    training = compiled.training.model_copy(update={"compile": True})
    with pytest.raises(ValueError, match=r"weighting must be 'fixed' with training.compile"):
        TokenizerRunConfig.model_validate(
            compiled.model_copy(update={"training": training}).model_dump()
        )
    with pytest.raises(InputError, match="num_downsamplings must be at most 4 for images of 16"):
        PatchDiscriminator(AdversarialConfig(num_downsamplings=5), 3, 16)
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    for last in (lambda: None, lambda: frozen):
        with pytest.raises(InputError, match="must be 0 where no last layer of the decoder learns"):
            Adversary(
                SMALL, TrainingConfig(), 3, 16, last, torch.device("cpu"), lambda tensor: tensor
            )


@pytest.mark.parametrize("name", ["color", "translation", "cutout"])
def test_each_augmentation_depends_on_the_generator_and_passes_gradients(
    name: Augmentation,
) -> None:
    images = (torch.rand(8, 3, 16, 16) * 2 - 1).requires_grad_()

    def changed(seed: int) -> torch.Tensor:
        return augment(images, (name,), torch.Generator().manual_seed(seed))

    assert torch.equal(changed(0), changed(0))
    assert not torch.equal(changed(0), changed(1))
    kept = [torch.equal(one, other) for one, other in zip(changed(0), images, strict=True)]
    assert sum(kept) <= 1  # a shift by nothing is possible
    changed(0).square().sum().backward()
    assert images.grad is not None
    assert images.grad.flatten(1).any(1).all()


def test_translation_moves_and_cutout_clears_half_of_each_side() -> None:
    images = torch.ones(64, 1, 16, 16)
    moved = augment(images, ("translation",), torch.Generator().manual_seed(0))
    seen = moved[:, 0].sum((1, 2)).sqrt()  # a rectangle of ones remains
    assert moved.unique().tolist() == [0, 1]
    assert seen.min() >= 14
    cleared = 1 - augment(images, ("cutout",), torch.Generator().manual_seed(0))
    assert cleared.sum((1, 2, 3)).max() == 64
    assert (cleared.sum((1, 2, 3)) >= 16).all()


def test_the_accelerator_means_over_one_process_are_the_tensor_itself() -> None:
    from pipelines.training.losses.adversarial import mean_over

    tensor = torch.rand(3)
    assert mean_over(Accelerator(cpu=True))(tensor) is tensor
