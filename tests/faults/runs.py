"""The small runs that the trials disturb, and what makes two of them equal."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.faults.jobs import Job
from tests.tiny_runs import weight_files

Stage = Literal["tokenizer", "prior"]

TOTAL_STEPS = 24
CHECKPOINT_INTERVAL = 3
# Accumulation, an EMA and, for several processes, shares of unequal size.
TRAINING = (
    f"--training.total-steps {TOTAL_STEPS} --training.checkpoint-interval {CHECKPOINT_INTERVAL} "
    "--training.validation-interval 8 --training.gradient-accumulation-steps 2 "
    "--training.batch-size 8 --training.ema-decay 0.99 --training.num-validation-images 7"
).split()


class TinyRun(NamedTuple):
    """A stage of the preset `tiny` in a folder; a prior shares the tokenizer of another run."""

    folder: Path
    """What the runs share: the cache, and those that are finished."""
    name: str
    stage: Stage

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.folder / self.name

    @property
    def cache_dir(self) -> Path:
        """Decoded images."""
        return self.folder / "cache"

    @property
    def output_dir(self) -> Path:
        """The stage's folder."""
        return self.run_dir / self.stage

    @property
    def command(self) -> tuple[str, list[object], Path]:
        """Module, arguments and folder for the output, as a job takes them."""
        arguments = ["tiny", "--run-dir", self.run_dir, *TRAINING]
        if self.stage == "tokenizer":
            arguments += ["--data.num-images", "61", "--data.cache-dir", self.cache_dir]
        return f"pipelines.train_{self.stage}", arguments, self.run_dir / "output"

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

    def contents(self) -> dict[str, Any]:
        """Last state, model, previews and metrics, by name."""
        previews = {own.name: own.read_bytes() for own in self.output_dir.glob("samples/*")}
        return {**weight_files(self.output_dir), **previews, "metrics.jsonl": self.lines()}


def new_run(folder: Path, name: str, stage: Stage) -> TinyRun:
    """A run to be, in `folder/name` in place of what is there."""
    run = TinyRun(folder, name, stage)
    shutil.rmtree(run.run_dir, ignore_errors=True)
    run.run_dir.mkdir(parents=True)
    if stage == "prior":
        trained = finished_run(folder, "tokenizer").output_dir
        (run.run_dir / "tokenizer").symlink_to(trained.resolve())
    return run


def finished_run(folder: Path, stage: Stage, num_processes: int = 1) -> TinyRun:
    """An uninterrupted run, the measure of the others; made once in a folder."""
    name = f"whole_{stage}_{num_processes}"
    run = TinyRun(folder, name, stage)
    if not (run.output_dir / "state" / f"step_{TOTAL_STEPS:08d}").exists():
        run = new_run(folder, name, stage)
        failure = Job(*run.command, num_processes).failure()
        assert not failure, failure
    return run


def wrong_end(run: TinyRun, *options: str, num_processes: int = 1) -> str:
    """The same command again: a complaint unless all is as in an uninterrupted run, bit for bit."""
    module, arguments, output = run.command
    failure = Job(module, [*arguments, *options], output, num_processes).failure()
    if failure:
        return f"going on: {failure}"
    whole = finished_run(run.folder, run.stage, num_processes)
    one, other = run.contents(), whole.contents()
    changed = [name for name in one | other if one.get(name) != other.get(name)]
    return f"{run.output_dir} differs in {changed} from {whole.output_dir}" if changed else ""
