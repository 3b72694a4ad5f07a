"""Weights shared out over processes: the losses of one process, and checkpoints for any number."""

import shutil
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from safetensors.torch import load_file

from pipelines.config import TrainingConfig
from pipelines.run.checkpoints import load_state
from pipelines.run.folder import load_run
from pipelines.run.manifest import read_manifest, write_manifest
from pipelines.training.loop import make_accelerator, train
from pipelines.training.sharding import machine_size
from prior import Prior
from tests import sharded_runs
from tests.faults.jobs import Job, error_lines, free_port
from tests.sharded_runs import BETWEEN, DIES_AT, STEPS, losses, prior, two_networks
from tests.tiny_runs import logged, make_stage
from tokenizer.storage.errors import InputError


class Runs(NamedTuple):
    alone: Path
    shared: Path


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
    processes: ForkServerContext,
    tiny_run: Path,
    cache_dir: Path,
) -> Runs:
    """Both stages trained by one process, and by two that share the weights."""
    folders = Runs(*(tmp_path_factory.mktemp(name) for name in ("alone", "shared")))
    arguments = (free_port(), folders.shared, tiny_run, cache_dir, "fsdp")
    started = [
        processes.Process(target=sharded_runs.in_shares, args=(rank, 2, *arguments))
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    found = {  # meanwhile
        "two_networks": losses(two_networks(folders.alone / "two", cache_dir)),
        "prior": losses(prior(folders.alone / "prior", tiny_run)),
    }
    torch.save(found, folders.alone / "losses_0.pt")
    while any(process.is_alive() for process in started):
        time.sleep(0.05)
        if any(process.exitcode for process in started):  # the other one would wait for it
            for process in started:
                process.kill()
    for rank, process in enumerate(started):
        assert process.exitcode == 0, (folders.shared / f"output_{rank}.txt").read_text()
    return folders


def saved_shares(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Of the last checkpoint, by file; the order in the headers of the files is none."""
    paths = sorted(folder.glob(f"state/step_{STEPS:08d}/*.safetensors"))
    return {path.name: load_file(path) for path in paths}


@pytest.mark.parametrize("stage", ["two_networks", "prior"])
def test_the_losses_of_two_processes_that_share_the_weights_are_those_of_one(
    runs: Runs, stage: str
) -> None:
    alone, *shared = (
        torch.load(folder / f"losses_{rank}.pt")[stage]
        for folder, rank in ((runs.alone, 0), (runs.shared, 0), (runs.shared, 1))
    )
    assert len(alone) == STEPS * (2 if stage == "two_networks" else 1)
    for found in shared:
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


def test_each_process_has_written_its_share_and_the_model_is_whole(runs: Runs) -> None:
    folder = runs.shared / "prior" / "prior"
    shares = [sum(own.nbytes for own in share.values()) for share in saved_shares(folder).values()]
    assert len(shares) == 2
    state = load_state(folder / "state")
    assert state is not None
    weights = Prior.from_pretrained(folder / "model").state_dict()
    for name, tensor in state.tensors["prior_ema"].items():
        assert torch.equal(tensor, weights[name]), name
    whole = sum(own.nbytes for part in state.tensors.values() for own in part.values())
    assert sum(shares) == whole
    assert max(shares) < 0.55 * whole
    for part in ("two/tokenizer", "prior/prior"):
        lines = logged(runs.shared / part)
        assert [own["step"] for own in lines if own["phase"] == "train"] == [*range(1, STEPS + 1)]
        # Validation is of the EMA, with all of its weights.
        validated = [logged(own / part)[-1] for own in runs]
        for name, value in validated[0].items():
            if name not in ("phase", "codebook_usage", "perplexity"):
                assert validated[1][name] == pytest.approx(value, rel=1e-4), name


def test_a_run_in_shares_that_was_killed_goes_on_bit_for_bit(runs: Runs) -> None:
    whole, killed = (runs.shared / name / "prior" for name in ("prior", "killed"))
    shares, others = saved_shares(whole), saved_shares(killed)
    assert shares.keys() == others.keys()
    for name, share in shares.items():
        assert share.keys() == others[name].keys()
        assert all(torch.equal(own, others[name][key]) for key, own in share.items())
    assert (
        Prior.from_pretrained(killed / "model").content_hash()
        == Prior.from_pretrained(whole / "model").content_hash()
    )
    assert logged(killed) == logged(whole)


def test_one_process_goes_on_with_the_checkpoint_of_two(runs: Runs, tiny_run: Path) -> None:
    config = prior(runs.shared / "killed", tiny_run)
    folder = config.output_dir / "state"
    newest = folder / f"step_{STEPS:08d}"
    newest.rename(folder / "kept")
    assert load_state(folder).step == BETWEEN
    train(make_stage(config), config, make_accelerator(config))
    assert load_run(type(config), config.output_dir / "config.json").training.parallel == "ddp"
    state, whole = load_state(folder), load_state(runs.shared / "prior" / "prior" / "state")
    assert state.format == 2
    assert state.tensors.keys() == whole.tensors.keys()
    for part, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            torch.testing.assert_close(state.tensors[part][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("name", "least", "most"), [("asked", 0, 1e-5), ("full", 1e-6, 1e-2)])
def test_compiled_blocks_and_bf16_blocks_learn_what_others_do(
    runs: Runs, name: str, least: float, most: float
) -> None:
    """The run that is asked to stop compiles them, the one whose disk is full has them in bf16."""
    found, expected = (
        [line["loss"] for line in logged(runs.shared / own / "prior") if line["phase"] == "train"]
        for own in (name, "prior")
    )
    assert len(found) > BETWEEN
    differences = [abs(a / b - 1) for a, b in zip(found, expected, strict=False)]
    assert least <= max(differences) <= most


def test_a_disk_that_is_full_for_one_process_stops_all_and_leaves_the_checkpoint_before(
    runs: Runs,
) -> None:
    folder = runs.shared / "full" / "prior" / "state"
    assert [path.name for path in folder.glob("step_*")] == [f"step_{BETWEEN:08d}"]
    state, other = load_state(folder), load_state(runs.shared / "prior" / "prior" / "state")
    assert state.step == BETWEEN
    assert state.tensors.keys() == other.tensors.keys()
    tries = (runs.shared / "output_0.txt").read_text().count("writing the checkpoint once more")
    assert tries == 2


def test_sigterm_finishes_the_step_and_saves_the_shares_of_all(runs: Runs) -> None:
    state = load_state(runs.shared / "asked" / "prior" / "state")
    assert state is not None
    assert state.step == DIES_AT + 1


def test_shares_that_do_not_make_whole_tensors_are_refused_on_one_line(
    runs: Runs, tmp_path: Path
) -> None:
    saved = runs.shared / "prior" / "prior" / "state" / f"step_{STEPS:08d}"
    folder = tmp_path / saved.name
    shutil.copytree(saved, folder)
    min(folder.glob("shard-00001-*")).unlink()
    with pytest.raises(InputError, match=r"shard-00001-.* is damaged"):
        load_state(tmp_path)
    fields = read_manifest(folder / "state.json")
    (folder / "state.json").unlink()
    kept = {key: fields[key] for key in fields if key not in ("files", "sha256")}
    write_manifest(folder / "state.json", kept)
    with pytest.raises(InputError, match=r"cannot be shared out anew: of prior.* values") as caught:
        load_state(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_all_processes_find_wrong_one_of_them_tells(tmp_path: Path) -> None:
    arguments = ["tiny", "--run-dir", tmp_path / "run", "--training.batch-size", 3]
    job = Job("pipelines.train_tokenizer", arguments, tmp_path / "output", 2)
    assert job.wait() == [2, 2]
    (line,) = error_lines(job.output(0))
    assert line.startswith("error: training.batch_size must be a multiple of 2 processes")
    # torch may say that the store of addresses has gone with the first process.
    assert not [own for own in error_lines(job.output(1)) if own.startswith("error:")]


def test_an_option_that_does_not_go_with_shares_is_refused() -> None:
    with pytest.raises(ValidationError, match="channels_last must be False unless parallel is ddp"):
        TrainingConfig.model_validate({"parallel": "fsdp", "channels_last": True})


def test_hsdp_wants_several_processes_on_each_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Mock(spec=Accelerator, num_processes=4)
    config = TrainingConfig(parallel="hsdp")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine_size(accelerator, config) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with pytest.raises(InputError, match="parallel must be ddp or fsdp unless each machine runs"):
        machine_size(accelerator, config)
