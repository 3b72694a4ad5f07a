"""The small runs that the trials disturb, and what makes two of them equal."""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pipelines.generation import ImageGenerationPipeline
from prior import sample, sample_generators
from tests.faults import jobs

Stage = Literal["tokenizer", "prior"]

TOTAL_STEPS = 24
CHECKPOINT_INTERVAL = 3
# Accumulation, a moving average and, for several processes, shares of unequal size.
TRAINING = (
    f"--training.total-steps {TOTAL_STEPS} --training.checkpoint-interval {CHECKPOINT_INTERVAL} "
    "--training.validation-interval 8 --training.gradient-accumulation-steps 2 "
    "--training.batch-size 8 --training.ema-decay 0.99 --training.num-validation-images 7"
).split()


class TinyRun(NamedTuple):
    """A stage of the preset `tiny` in a folder; a prior shares the tokenizer of another run."""

    run_dir: Path
    stage: Stage
    cache_dir: Path

    @property
    def output_dir(self) -> Path:
        """The stage's folder."""
        return self.run_dir / self.stage

    @property
    def module(self) -> str:
        """The command."""
        return f"pipelines.train_{self.stage}"

    @property
    def arguments(self) -> list[str]:
        """Of the command."""
        data = ["--data.num-images", "61", "--data.cache-dir", str(self.cache_dir)]
        own = data if self.stage == "tokenizer" else []
        return ["tiny", "--run-dir", str(self.run_dir), *TRAINING, *own]

    def states(self) -> list[Path]:
        """Checkpoints, old to new."""
        return sorted(self.output_dir.glob("state/step_*"))

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of metrics.jsonl, without what depends on the clock."""
        path = self.output_dir / "metrics.jsonl"
        *lines, _ = (path.read_text() if path.exists() else "").split("\n")
        entries = [json.loads(line) for line in lines]
        return [{k: own[k] for k in own if k != "images_per_second"} for own in entries]

    def last_step(self) -> int:
        """The last one in metrics.jsonl."""
        return max((line["step"] for line in self.lines()), default=0)


def new_run(folder: Path, name: str, stage: Stage, trained: TinyRun | None = None) -> TinyRun:
    """A run to be, in `folder/name`; a prior learns the codes of `trained`."""
    run = TinyRun(folder / name, stage, folder / "cache")
    if trained is not None and stage == "prior":
        run.run_dir.mkdir(parents=True, exist_ok=True)
        link = run.run_dir / "tokenizer"
        if not link.exists():
            link.symlink_to(trained.output_dir.resolve())
    return run


def finished_run(
    folder: Path, stage: Stage, num_processes: int = 1, trained: TinyRun | None = None
) -> TinyRun:
    """An uninterrupted run, the measure of the others; made once in a folder."""
    run = new_run(folder, f"whole_{stage}_{num_processes}", stage, trained)
    if not (run.output_dir / "state" / f"step_{TOTAL_STEPS:08d}").exists():
        jobs.run(run.module, run.arguments, run.run_dir / "output", num_processes)
    return run


def differences(run: TinyRun, whole: TinyRun) -> list[str]:
    """In what two finished runs differ, bit for bit; empty if in nothing."""
    found = []
    folders = [
        (run.states()[-1], whole.states()[-1]),
        *((run.output_dir / name, whole.output_dir / name) for name in ("model", "samples")),
    ]
    for own, other in folders:
        if _contents(own) != _contents(other):
            found.append(f"{own} differs from {other}")
    if run.lines() != whole.lines():
        found.append(f"metrics.jsonl of {run.output_dir} differs from that of {whole.output_dir}")
    trained = [line["step"] for line in run.lines() if line["phase"] == "train"]
    if trained != list(range(1, TOTAL_STEPS + 1)):
        found.append(f"metrics.jsonl of {run.output_dir} has the steps {trained}")
    if run.stage == "prior" and not all(
        torch.equal(*codes) for codes in zip(sample_ids(run), sample_ids(whole), strict=True)
    ):
        found.append(f"{run.run_dir} generates other codes than {whole.run_dir}")
    return found


def sample_ids(run: TinyRun) -> list[Tensor]:
    """Codes of a few generated images, per group."""
    prior = ImageGenerationPipeline.from_pretrained(run.run_dir).prior
    with torch.inference_mode():
        return sample(prior, torch.arange(4), sample_generators(0, range(4)))


def _contents(folder: Path) -> dict[str, Any]:
    contents: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "state.json" in contents:  # without the hash of what depends on the clock
        manifest = json.loads(contents["state.json"])
        contents["state.json"] = [manifest[key] for key in ("step", "sources", "files")]
    return contents
