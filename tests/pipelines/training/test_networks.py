"""A second network, added from outside the package."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.training.loop import make_accelerator, train
from tests.faults.jobs import Job
from tests.pipelines.training.adversarial import AdversarialRun, AdversarialStage, Generator
from tests.tiny_runs import assert_same_run, first_gradients, logged
from tokenizer.storage.errors import InputError

MODULE = "tests.pipelines.training.adversarial"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_two_networks_that_were_killed_resume_bit_for_bit(
    num_processes: int, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for arguments, status in (([whole], 0), ([broken, 4], -9), ([broken], 0)):
        job = Job(MODULE, [str(own) for own in arguments], tmp_path / "output", num_processes)
        assert job.wait() == [status] * num_processes, job.output()
    assert_same_run(whole, broken)
    state = {path.stem: load_file(path) for path in whole.glob("state/step_00000006/*.safe*")}
    names = ("generator", "generator_ema", "generator_optimizer")
    assert state.keys() == {*names, "discriminator", "discriminator_optimizer"}
    assert not torch.equal(*(state[name]["layers.0.weight"] for name in names[:2]))
    assert state["discriminator_optimizer"].keys() == {
        f"{name}.{quantity}"
        for name in ("weight", "bias")
        for quantity in ("step", "exp_avg", "exp_avg_sq")
    }
    for name, tensor in Generator.from_pretrained(whole / "model").state_dict().items():
        assert torch.equal(tensor, state["generator_ema"][name])
    second = logged(whole)[1]
    assert second["generator/learning_rate"] == 0.01
    assert second["discriminator/learning_rate"] == 0.02
    assert second.keys() >= {"generator/loss", "discriminator/score", "generator/gradient_norm"}


class GradientStage(AdversarialStage):
    """Remembers the gradient of each loss with respect to the network that it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: dict[str, torch.Tensor | float] = {}

    def loss(self, name, modules, batch, step):
        loss = super().loss(name, modules, batch, step)
        parameters = dict(self.networks[name].module.named_parameters())
        found = torch.autograd.grad(loss.minimized, parameters.values(), retain_graph=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            key = f"{name}_optimizer.{parameter}.exp_avg"
            self.gradients[key] = self.gradients.get(key, 0) + gradient / 2  # micro-batches
        return loss


def test_each_network_follows_its_loss_alone_over_all_micro_batches_and_is_not_lost(
    tmp_path: Path,
) -> None:
    config = AdversarialRun(run_dir=tmp_path)
    training = config.training.model_copy(update={"total_steps": 1})
    config = config.model_copy(update={"training": training})
    stage = GradientStage()
    train(stage, config, make_accelerator(config))
    followed = first_gradients(tmp_path)
    assert followed.keys() == stage.gradients.keys()
    for name, gradient in stage.gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(followed[name], gradient, rtol=1e-5, atol=1e-8)
    del stage.networks["discriminator"]
    with pytest.raises(InputError, match="step 1 holds discriminator, discriminator_optim"):
        train(stage, config, make_accelerator(config))
