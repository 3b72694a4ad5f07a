"""Sharing work: one process and two do the same."""

import json
import os
import subprocess
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from pipelines.command_configs import EvaluationConfig, GenerateConfig
from pipelines.config import TokenizerRecipe
from pipelines.data.codes import extract_codes
from pipelines.data.sources import load_images
from pipelines.decoder_run import decoder_run
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.finetune_decoder import finetune_decoder
from pipelines.generate import generate
from pipelines.generation import ImageGenerationPipeline
from pipelines.processes import gather_shares, own_share, seed_everything
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tests import workers
from tests.extractors import Colors
from tests.faults.jobs import free_port
from tests.tiny_runs import first_gradients, logged, prior_run, tokenizer_run
from tests.workers import train_and_record
from tokenizer import Tokenizer

CLOSED_FORM = TokenizerRecipe(likelihood="closed_form")
"""Not a mean over images: the processes have to share the error."""
NUM_PARTS = (2, 4)


class Shared(NamedTuple):
    """What one process left, and what two did."""

    alone: Path
    together: Path

    def files(self, name: str) -> list[dict[str, torch.Tensor]]:
        """Of the one process, if it left any, then of the two."""
        paths = [*self.alone.glob(f"{name}_0.*"), *sorted(self.together.glob(f"{name}_*.*"))]
        return [load_file(path) for path in paths]


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
        baseline = baseline.model_copy(update={"tokenizer": tokenizer, "recipe": CLOSED_FORM})
        decoder = decoder_run(folder / "prior")
        schedule = decoder.training.model_copy(update=training)
        decoder = decoder.model_copy(update={"training": schedule, "recipe": CLOSED_FORM})
        runs.append((baseline, prior.model_copy(update={"prior": network}), decoder))
    whole, *in_parts = (
        runs[num_parts > 1][0].model_copy(
            update={
                "run_dir": folders[num_parts > 1] / f"parts_{num_parts}",
                "training": runs[0][0].training.model_copy(
                    update={"batch_size": 8, "gradient_accumulation_steps": num_parts}
                ),
            }
        )
        for num_parts in (1, *NUM_PARTS)
    )
    port = free_port()
    started = [
        processes.Process(
            target=workers.share_the_work,
            args=(rank, 2, port, *runs[1], in_parts, tiny_run, folders[1]),
        )
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    train_and_record(runs[0][0], folders[0])  # meanwhile
    train_prior(runs[0][1])
    train_tokenizer(whole)
    finetune_decoder(runs[0][2])
    images = {"output_dir": folders[0] / "images", "num_images": 5, "seed": 1}
    generate(GenerateConfig(run_dir=tiny_run, **images))
    while any(process.is_alive() for process in started):
        time.sleep(0.05)
        if any(process.exitcode for process in started):  # the other one would wait for it
            for process in started:
                process.kill()
    for rank, process in enumerate(started):
        assert process.exitcode == 0, (folders[1] / f"output_{rank}.txt").read_text()
    return Shared(*folders)


@pytest.mark.parametrize("num_parts", NUM_PARTS)
def test_micro_batches_of_two_processes_follow_the_gradient_of_the_whole_batch(
    shared: Shared, num_parts: int
) -> None:
    expected = first_gradients(shared.alone / "parts_1" / "tokenizer")
    found = first_gradients(shared.together / f"parts_{num_parts}" / "tokenizer")
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_two_processes_train_to_the_batches_of_one(shared: Shared) -> None:
    alone, *parts = (own["items"] for own in shared.files("items"))
    assert alone.shape == (1, 4)
    assert torch.equal(torch.stack(parts, dim=-1).flatten(1), alone)  # ranks take turns


def test_weights_and_codebooks_are_equal_on_both_processes_and_as_with_one(shared: Shared) -> None:
    start, *starts = shared.files("start")
    alone, first, second = shared.files("end")
    name = "top_down.groups.0.quantizer.codebook_0"
    assert not torch.equal(start[name], first[name])
    for name, expected in alone.items():
        assert all(torch.equal(own[name], start[name]) for own in starts), name
        assert torch.equal(first[name], second[name]), name
        if "codebook" in name or "mean_" in name:
            torch.testing.assert_close(first[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", ["baseline/tokenizer", "prior/prior", "prior/decoder"])
def test_two_processes_follow_the_gradient_of_one_and_leave_one_log(
    shared: Shared, stage: str
) -> None:
    folders = [folder / stage for folder in shared]
    alone, together = map(first_gradients, folders)
    assert together.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(together[name], gradient, rtol=1e-4, atol=1e-6)
    alone, together = map(logged, folders)
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
    for theirs in shared.files("reconstruction"):
        assert torch.equal(theirs["counts"], torch.stack(usage.counts))
        torch.testing.assert_close(theirs["errors"], torch.stack(errors))


def test_two_processes_extract_the_codes_and_generate_the_files_of_one(
    shared: Shared, tiny_run: Path, cache_dir: Path
) -> None:
    tokenizer = Tokenizer.from_pretrained(tiny_run / "tokenizer" / "model")
    images = load_images(tokenizer_run(tiny_run, cache_dir).data, "train")
    codes = shared.alone / "codes"
    extract_codes(tokenizer, images, codes, Accelerator(), flips=True, keeps_latents=False)
    for folder, count in (("codes", 2), ("images", 8)):
        alone, together = (
            {
                path.name: path.read_bytes()
                for path in (own / folder).rglob("*.*")
                if path.name != "facts.json"  # which holds times
            }
            for own in shared
        )
        assert alone == together
        assert len(alone) == count


def test_two_processes_measure_the_figures_of_one(
    shared: Shared, pipeline: ImageGenerationPipeline, tiny_run: Path, cache_dir: Path
) -> None:
    data = tokenizer_run(tiny_run, cache_dir).data
    splits = load_images(data, "train"), load_images(data, "validation")
    config = EvaluationConfig(num_images=25)
    expected = evaluate_generation(pipeline, *splits, Colors(), config, Accelerator())
    first, second = (
        json.loads((shared.together / f"results_{rank}.json").read_text()) for rank in (0, 1)
    )
    assert first == second
    assert first.keys() == expected.keys()
    for name, entry in expected.items():
        assert first[name]["value"] == pytest.approx(entry["value"], rel=1e-6), name
        assert first[name]["protocol"] == entry["protocol"]


def test_sums_are_exact(shared: Shared) -> None:
    assert [own["total"].tolist() for own in shared.files("sums")] == [[2**41 + 1]] * 2


# Any number of processes


@given(st.integers(1, 5), st.integers(1, 12))
def test_every_item_belongs_to_one_process_and_comes_back_in_order(world: int, count: int) -> None:
    sent: list[torch.Tensor] = []

    def gather(rows: torch.Tensor) -> torch.Tensor:
        sent.append(rows)  # what the processes before this one have sent, and then zeros
        return torch.cat(sent + [torch.zeros_like(rows)] * (world - len(sent)))

    for rank in range(world):
        accelerator = Mock(
            spec=Accelerator, num_processes=world, process_index=rank, device="cpu", gather=gather
        )
        share = torch.from_numpy(own_share(accelerator, count))
        gathered = gather_shares(accelerator, share, count)
    assert torch.equal(gathered, torch.arange(count))


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
    environment = os.environ | {"PYTHONPATH": ".", "CUDA_VISIBLE_DEVICES": ""}
    del environment["ACCELERATE_USE_CPU"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    root = Path(__file__).parents[2]
    output = subprocess.run(command, cwd=root, env=environment, check=True, capture_output=True)
    assert output.stdout.count(b"2 found") == 2
