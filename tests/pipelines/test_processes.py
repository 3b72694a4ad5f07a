"""Sharing work: one process and two do the same."""

import json
import os
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from pipelines.data.codes import extract_codes
from pipelines.data.sources import load_images
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.generate import GenerateConfig, generate
from pipelines.processes import gather_shares, own_share, seed_everything, sum_over_processes
from pipelines.train_prior import train_prior
from pipelines.training.loop import make_accelerator
from tests import workers
from tests.faults.jobs import free_port
from tests.tiny_runs import first_gradients, logged, prior_run, tokenizer_run
from tests.workers import train_and_record
from tokenizer import Tokenizer


class Shared(NamedTuple):
    """What one process left, and what two did."""

    alone: Path
    together: Path

    def files(self, name: str) -> list[dict[str, torch.Tensor]]:
        """Of the one process, then of the two."""
        return [
            load_file(self.alone / f"{name}_0.safetensors"),
            *(load_file(self.together / f"{name}_{rank}.safetensors") for rank in (0, 1)),
        ]


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory,
    processes: ForkServerContext,
    tiny_run: Path,
    cache_dir: Path,
) -> Shared:
    """A baseline and a prior trained for a step, by one process and by two (gloo)."""
    folders = [tmp_path_factory.mktemp(name) for name in ("alone", "together")]
    runs = []
    for folder in folders:
        training = {"total_steps": 1, "max_gradient_norm": 1e6}
        baseline = tokenizer_run(folder / "baseline", cache_dir, "tiny-baseline", **training)
        quantizer = baseline.tokenizer.quantizer.model_copy(update={"restart_threshold": 0.0})
        tokenizer = baseline.tokenizer.model_copy(update={"quantizer": quantizer})
        (folder / "prior").mkdir()
        (folder / "prior" / "tokenizer").symlink_to(tiny_run / "tokenizer")
        prior = prior_run(folder / "prior", **training)
        network = prior.prior.model_copy(update={"dropout": 0.0, "label_dropout": 0.0})
        runs.append(
            (
                baseline.model_copy(update={"tokenizer": tokenizer}),
                prior.model_copy(update={"prior": network}),
            )
        )
    port = free_port()
    started = [
        processes.Process(
            target=workers.share_the_work,
            args=(rank, 2, port, *runs[1], tiny_run, folders[1]),
        )
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    train_and_record(runs[0][0], folders[0])  # meanwhile
    train_prior(runs[0][1])
    generate(
        GenerateConfig(run_dir=tiny_run, output_dir=folders[0] / "images", num_images=5, seed=1)
    )
    while any(process.is_alive() for process in started):
        time.sleep(0.05)
        if any(process.exitcode for process in started):  # the other one would wait for it
            for process in started:
                process.kill()
    for rank, process in enumerate(started):
        assert process.exitcode == 0, (folders[1] / f"output_{rank}.txt").read_text()
    return Shared(*folders)


def test_two_processes_train_to_the_batches_of_one(shared: Shared) -> None:
    alone, *parts = (own["items"] for own in shared.files("items"))
    assert alone.shape == (1, 4)
    together = torch.stack(parts, dim=-1).flatten(1)  # ranks take turns
    assert torch.equal(together, alone)


def test_the_start_from_the_data_is_the_same_on_all_processes(shared: Shared) -> None:
    alone, *parts = shared.files("start")
    for part in parts:
        assert part.keys() == alone.keys()
        assert all(torch.equal(part[name], alone[name]) for name in alone)


def test_weights_and_codebooks_are_equal_on_both_processes_and_as_with_one(shared: Shared) -> None:
    alone, first, second = shared.files("end")
    assert any("codebook" in name for name in alone)
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        if "codebook" in name or "mean_" in name:
            torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)
    name = "top_down.groups.0.quantizer.codebook_0"
    assert not torch.equal(shared.files("start")[0][name], first[name])


@pytest.mark.parametrize("stage", ["baseline/tokenizer", "prior/prior"])
def test_two_processes_follow_the_gradient_of_one(shared: Shared, stage: str) -> None:
    alone = first_gradients(shared.alone / stage)
    together = first_gradients(shared.together / stage)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_leave_one_log(shared: Shared) -> None:
    for stage in ("baseline/tokenizer", "prior/prior"):
        alone, together = logged(shared.alone / stage), logged(shared.together / stage)
        assert [(own["step"], own["phase"]) for own in together] == [
            (own["step"], own["phase"]) for own in alone
        ]
        # The validation set is shared, its numbers are of the whole.
        for name, value in alone[-1].items():
            if name not in ("phase", "codebook_usage", "perplexity"):
                assert together[-1][name] == pytest.approx(value, rel=1e-2), name


def test_reconstruction_counts_every_item_once(
    shared: Shared, tiny_run: Path, cache_dir: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")
    validation = load_images(tokenizer_run(tiny_run, cache_dir).data, "validation")
    items = np.arange(len(validation) - 1)
    errors, usage = measure_reconstruction(tokenizer, validation, items, Accelerator())
    assert [int(counts.sum()) for counts in usage.counts] == [31 * 4, 31 * 4, 31 * 16]
    for rank in (0, 1):
        theirs = load_file(shared.together / f"reconstruction_{rank}.safetensors")
        assert torch.equal(theirs["counts"], torch.stack(usage.counts))
        torch.testing.assert_close(theirs["errors"], torch.stack(errors))


def test_two_processes_extract_the_codes_of_one(
    shared: Shared, tiny_run: Path, cache_dir: Path, tmp_path: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")
    images = load_images(tokenizer_run(tiny_run, cache_dir).data, "train")
    extract_codes(tokenizer, images, tmp_path, Accelerator(), flips=True, keeps_latents=False)
    (alone,), (together,) = tmp_path.iterdir(), (shared.together / "codes").iterdir()
    assert alone.name == together.name
    for name in ("indices_0.npy", "indices_1.npy", "facts.json"):
        assert (alone / name).read_bytes() == (together / name).read_bytes()


def test_two_processes_generate_the_files_of_one(shared: Shared) -> None:
    names = sorted(path.name for path in (shared.alone / "images").iterdir())
    assert names == [
        *(f"{number:06d}.png" for number in range(5)),
        "contact_sheet.png",
        "settings.json",
    ]
    assert names == sorted(path.name for path in (shared.together / "images").iterdir())
    for name in names:
        alone, together = (folder / "images" / name for folder in shared)
        assert alone.read_bytes() == together.read_bytes()


def test_shares_are_put_back_in_order_and_sums_are_exact(shared: Shared) -> None:
    for rank in (0, 1):
        theirs = load_file(shared.together / f"shares_{rank}.safetensors")
        assert theirs["squares"].tolist() == [0, 1, 4, 9, 16]
        assert theirs["total"].tolist() == [2**41 + 1]


# One process


def test_one_process_has_everything(cache_dir: Path) -> None:
    accelerator = make_accelerator(tokenizer_run(Path(), cache_dir))
    assert own_share(accelerator, 5).tolist() == [0, 1, 2, 3, 4]
    rows = torch.arange(5)
    assert torch.equal(gather_shares(accelerator, rows, 5), rows)
    assert torch.equal(sum_over_processes(accelerator, rows), rows)


def test_the_seed_is_a_function_of_all_its_numbers() -> None:
    def draw(*numbers: int) -> list[float]:
        seed_everything(*numbers)
        return torch.rand(2).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    draws = [draw(1, 2, 3), draw(3, 2, 1), draw(1, 2), draw(1, 2, 4), draw(0)]
    assert len({json.dumps(own) for own in draws}) == len(draws)


def test_processes_of_torchrun_find_each_other_without_a_gpu_or_a_variable(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from pipelines.processes import new_accelerator\n"
        "print(f'{new_accelerator().num_processes} found')\n"
    )
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
    environment["CUDA_VISIBLE_DEVICES"] = ""
    del environment["ACCELERATE_USE_CPU"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout.count("2 found") == 2
