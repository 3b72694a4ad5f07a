"""Numbers: bf16 ends near fp32, and what the watch over non-finite ones says."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipelines.run.checkpoints import TrainingState
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError, NonFiniteWatch
from tests.tiny_runs import logged, tokenizer_run
from tokenizer.config import NetworkConfig


def test_bf16_ends_near_fp32(tmp_path: Path) -> None:
    networks = NetworkConfig(patch_size=4, width=32, max_width=32, num_blocks=1)
    intervals = dict.fromkeys(("log_interval", "validation_interval", "checkpoint_interval"), 60)
    training = {"batch_size": 16, "warmup_steps": 10, "ema_decay": 0.9, "total_steps": 60}
    errors = []
    for precision in ("fp32", "bf16"):
        config = tokenizer_run(
            *(tmp_path / precision, tmp_path, "shapes32-sqvae2"),
            **training,
            **intervals,
            precision=precision,
        )
        tokenizer = config.tokenizer.model_copy(update={"networks": networks})
        data = config.data.model_copy(update={"num_images": 2_000, "num_validation_images": 200})
        train_tokenizer(config.model_copy(update={"tokenizer": tokenizer, "data": data}))
        errors.append(logged(config.output_dir)[-1]["RMSE"])
    assert errors[0] < 0.24, "nothing was learnt, and nothing compared"
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_the_first_step_is_named_whenever_one_looks(tmp_path: Path) -> None:
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    for step in range(1, 5):
        loss = math.inf if step == 2 else 1.0
        variance = math.nan if step > 2 else 1.0
        watch.note(step, {"loss": torch.tensor(loss), "s": torch.tensor([0.0, variance])})
    (tmp_path / "state" / "step_00000001").mkdir(parents=True)
    with pytest.raises(DivergenceError, match=r"^step 2: loss is inf; .*/step_00000001; lower "):
        watch.check()


def test_finite_numbers_go_on(tmp_path: Path) -> None:
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    watch.note(1, {"loss": torch.tensor(3e38), "s": torch.tensor([-1e-45])})
    watch.check()


@pytest.mark.parametrize("place", ["a", "a_ema", "b_optimizer"])
def test_a_state_that_is_not_finite_is_refused_by_name(place: str, tmp_path: Path) -> None:
    tensors = {"a": torch.tensor([1, 2]), "b": torch.tensor([1.0, math.nan])}
    sound = {"a": torch.tensor([1, 2])}
    state = TrainingState(
        7,
        {part: tensors if part == place else sound for part in ("a", "a_ema", "b_optimizer")},
    )
    watch = NonFiniteWatch(Accelerator(), tmp_path)
    with pytest.raises(DivergenceError, match=rf"^step 7: {place}\.b is not finite; there is"):
        watch.check_state(state)
    watch.check_state(TrainingState(7, {"a": sound}))
