"""Both stages on CIFAR-10 as an image folder, at a stated budget.

    python -m benchmarks.cifar10 --data DIR --budget cpu --weights FILE

DIR holds train/ and test/ with a folder per class. Each model goes through the ordinary commands:
train_tokenizer, train_prior, generate, evaluate. A command that has finished is not run again, one
that was interrupted goes on. Writes benchmarks/results/cifar10_BUDGET.json, a contact sheet per
model, and the table in README.md.
"""

import argparse
import concurrent.futures
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.machine import commit, machine
from benchmarks.readme import markdown_table, replace_section

RESULTS = Path(__file__).parent / "results"
NUM_IMAGES = 1_000
MODELS = ("cifar10-sqvae2", "cifar10-rsqvae")

# What each budget changes of the presets; everything else is the preset's.
SMALL_TOKENIZER = (
    "--tokenizer.networks.width 64 --tokenizer.networks.max-width 64 "
    "--tokenizer.networks.num-blocks 2 --training.batch-size 64 --training.learning-rate 3e-3 "
    "--training.num-validation-images 1000 --training.validation-interval 1000"
)
SMALL_PRIOR = (
    "--prior.width 96 --prior.num-spatial-layers 4 --prior.num-depth-layers 1 --prior.num-heads 3 "
    "--prior.dropout 0 --training.batch-size 32 --training.learning-rate 3e-3 "
    "--training.precision fp32 --training.total-steps 2000 "
    "--training.validation-interval 500 --training.num-validation-images 1000"
)
BUDGETS: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        "cifar10-sqvae2": {
            "tokenizer": f"{SMALL_TOKENIZER} --training.total-steps 3000 "
            "--tokenizer.quantizer.final-temperature 0.03 "
            "--tokenizer.groups.0.codebook-sizes 256 --tokenizer.groups.0.code-dim 32 "
            "--tokenizer.groups.1.codebook-sizes 64 --tokenizer.groups.1.code-dim 32",
            "prior": SMALL_PRIOR,
        },
        "cifar10-rsqvae": {
            "tokenizer": f"{SMALL_TOKENIZER} --training.total-steps 3000 "
            "--tokenizer.quantizer.final-temperature 0.5 "
            "--tokenizer.groups.0.codebook-sizes 128 128 128 128 "
            "--tokenizer.groups.0.code-dim 32",
            "prior": SMALL_PRIOR,
        },
    },
    "gpu": {
        name: {
            "tokenizer": "--training.total-steps 12000 --training.batch-size 256 "
            "--training.precision bf16 --training.learning-rate 2e-3",
            "prior": "--training.total-steps 12000 --training.batch-size 256",
        }
        for name in MODELS
    },
}


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and test/")
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--weights", type=Path, required=True, help="MobileNetV2, .safetensors")
    parser.add_argument("--run-dir", type=Path, default=None, help="default: runs/cifar10-BUDGET")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    folder = arguments.run_dir or Path("runs") / f"cifar10-{arguments.budget}"
    # On a CPU the models share the cores; on a GPU they come one after the other.
    num_workers = len(arguments.models) if arguments.budget == "cpu" else 1
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        others = (arguments.data, arguments.budget, arguments.weights)
        list(pool.map(lambda name: run_model(name, folder / name, *others), arguments.models))
    collect(folder, arguments.budget)
    replace_section("cifar10", table())


def run_model(name: str, run_dir: Path, data: Path, budget: str, weights: Path) -> None:
    """Runs the four commands of one model, each with a record of its time."""
    changes = BUDGETS[budget][name]
    folders = (
        f"--data.dataset folder --data.root {shlex.quote(str(data / 'train'))} "
        f"--data.validation-root {shlex.quote(str(data / 'test'))}"
    )
    run = shlex.quote(str(run_dir))
    extractor = (
        f"--extractor.kind timm --extractor.weights {shlex.quote(str(weights))} "
        "--extractor.pad-type same --extractor.mean 0.5 0.5 0.5 --extractor.std 0.5 0.5 0.5"
    )
    commands = {
        "train_tokenizer": f"{name} --run-dir {run} {folders} {changes['tokenizer']}",
        "train_prior": f"{name} --run-dir {run} {changes['prior']}",
        "generate": f"{run} --output-dir {run}/generated --num-images {NUM_IMAGES}",
        "evaluate": f"{run} --num-images {NUM_IMAGES} {extractor}",
    }
    for module, options in commands.items():
        record = run_dir / f"{module}.done.json"
        if record.exists():
            continue
        command = f"python -m pipelines.{module} {options}"
        environment = os.environ.copy()
        if budget == "cpu":
            environment["OMP_NUM_THREADS"] = str(max((os.cpu_count() or 1) // len(MODELS), 1))
        run_dir.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        with (run_dir / f"{module}.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, *shlex.split(command)[1:]], stdout=log, stderr=log, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command} failed, see {log.name}")
        metadata = {
            "command": command,
            "commit": commit(),
            "seconds": round(time.perf_counter() - started),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime),
        }
        record.write_text(json.dumps(metadata) + "\n")


def collect(folder: Path, budget: str) -> None:
    """Gathers what the finished models have left into one JSON file and contact sheets."""
    results: dict[str, Any] = {"budget": budget, "machine": machine(), "models": {}}
    for name in MODELS:
        run_dir = folder / name
        if not (run_dir / "evaluate.done.json").exists():
            continue
        results["models"][name] = {
            "commands": {
                module: json.loads((run_dir / f"{module}.done.json").read_text())
                for module in ("train_tokenizer", "train_prior", "generate", "evaluate")
            },
            "validation": {
                stage: json.loads((run_dir / stage / "metrics.jsonl").read_text().splitlines()[-1])
                for stage in ("tokenizer", "prior")
            },
            **{
                kind: json.loads((run_dir / "evaluation" / f"{kind}.json").read_text())["metrics"]
                for kind in ("reconstruction", "generation")
            },
        }
        sheet = Image.open(run_dir / "generated" / "contact_sheet.png").reduce(2)
        sheet.save(RESULTS / f"{name}_{budget}.png", optimize=True)
    path = RESULTS / f"cifar10_{budget}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """The README's table from the committed results, a GPU's first."""
    header = ["budget", "model", "RMSE×100", "PSNR", "SSIM", "rFD", "perplexity", "FD (floor)"]
    header += ["IS", "precision, recall", "bits per image"]
    rows = []
    for budget in ("gpu", "cpu"):
        path = RESULTS / f"cifar10_{budget}.json"
        if not path.exists():
            continue
        for name, model in json.loads(path.read_text())["models"].items():
            commands = model["commands"]
            minutes = sum(entry["cpu_seconds"] for entry in commands.values()) / 60
            values = {
                metric: entry["value"]
                for kind in ("reconstruction", "generation")
                for metric, entry in model[kind].items()
            }
            values = {key.removesuffix("-MobileNetV2"): value for key, value in values.items()}
            distance, floor = values["FD"], values["FD-MobileNetV2 floor"]
            row = [f"{budget}, {minutes:.0f} CPU min", f"`{name}`", f"{100 * values['RMSE']:.2f}"]
            row += [f"{values['PSNR']:.2f}", f"{values['SSIM']:.3f}", f"{values['rFD']:.0f}"]
            row.append(", ".join(f"{entry:.0f}" for entry in values["perplexity"]))
            row += [f"{distance:.0f} ({floor:.0f})", f"{values['IS']:.1f}"]
            row.append(f"{values['precision']:.2f}, {values['recall']:.2f}")
            row.append(f"{model['validation']['prior']['bits_per_image']:.0f}")
            rows.append(row)
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
