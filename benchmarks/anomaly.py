"""How well scores of a run tell unusual images from usual ones: AUROC, beside simpler means.

    python -m benchmarks.anomaly --cifar10 DIR --flowers DIR --emoji DIR --weights FILE

The first folder holds train/ and test/ with a folder per class, the second train/ and val/, the
third images; FILE is MobileNetV2 as .safetensors. Trains a tokenizer with a prior of its own and a
prior on nine classes of CIFAR-10, and both on flowers, by the ordinary commands. What has finished
is not run again. Writes benchmarks/results/anomaly_BUDGET.json and the table in
benchmarks/README.md.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.commands import run_command
from benchmarks.judges import mobilenet_config
from benchmarks.machine import origin
from benchmarks.probes import neighbor_distances
from benchmarks.readme import markdown_table, replace_section
from pipelines.data.dataset import chosen_items
from pipelines.data.decoding import decode_image
from pipelines.data.folder_listing import find_images
from pipelines.drawing import PriorPipeline
from pipelines.evaluation.anomaly import SCORES, AnomalyScorer, auroc
from pipelines.evaluation.features import FeatureExtractor, load_extractor
from pipelines.evaluation.robustness import blurred, noisy
from tokenizer.storage.files import file_sha256, replace_file

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent / "README.md"
LEFT_OUT = "airplane"
"""The first of the ten classes."""
NEIGHBOR = 5
"""The distance to this one of the nearest training images counts (arXiv 2204.06507)."""
BLUR, NOISE = 1.0, 0.05
"""Standard deviations: pixels, and of intensities on [0, 1]."""
COLUMNS = {
    "reconstruction_error": "error",
    "neighbors": "k-NN, MobileNetV2",
    "code_bits": "code bits",
    "own_code_bits": "code bits, own prior",
    "likelihood": "likelihood",
    "typicality": "typicality",
    "complexity": "complexity",
    "joint": "joint",
}


class Budget(NamedTuple):
    """What a machine can run."""

    preset: str
    sizes: tuple[int, int]
    """Sides of CIFAR-10's images and of the flowers."""
    tokenizer: str
    """Options over the preset, for either stage."""
    flowers: str
    """Further ones of the tokenizer of flowers."""
    prior: str
    num_reference: int
    """Images of the run's kind that count as usual; half of those there are at most."""
    num_test: int
    """Images of each kind that are told apart."""
    num_neighbors: int
    """Training images among which neighbors are looked for."""


CPU = Budget(
    preset="images32-small",
    sizes=(32, 64),
    tokenizer="--tokenizer.networks.max-width 64 --tokenizer.code-prior.width 64 "
    "--training.batch-size 32 --training.learning-rate 3e-3 --training.total-steps 1000 "
    "--training.validation-interval 1000 --training.checkpoint-interval 500 ",
    flowers="--tokenizer.groups.0.downsampling 16 --tokenizer.groups.1.downsampling 8 "
    "--tokenizer.networks.patch-size 8 ",
    prior="--prior.width 64 --prior.num-heads 2 --training.batch-size 32 "
    "--training.learning-rate 3e-3 --training.total-steps 800 "
    "--training.validation-interval 800 --training.checkpoint-interval 400",
    num_reference=1_000,
    num_test=1_000,
    num_neighbors=2_000,
)
TINY = Budget(
    preset="tiny",
    sizes=(16, 16),
    tokenizer="--tokenizer.code-prior.width 4 --recipe.code-prior.calibration-steps 1 ",
    flowers="",
    prior="",
    num_reference=8,
    num_test=6,
    num_neighbors=10,
)
BUDGETS = {"cpu": CPU, "tiny": TINY}


class Trial(NamedTuple):
    """Unusual images among those of a run's kind."""

    run: str
    usual: str
    unusual: str
    images: Callable[[Tensor], Tensor]
    """The unusual ones, given the usual ones."""


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.anomaly",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("cifar10", "flowers", "emoji", "weights"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--budget", choices=sorted(BUDGETS), default="cpu")
    parser.add_argument("--run-dir", type=Path, help="default: runs/anomaly-BUDGET")
    arguments = parser.parse_args()
    budget = BUDGETS[arguments.budget]
    folder = arguments.run_dir or Path("runs") / f"anomaly-{arguments.budget}"
    torch.set_num_threads(1)
    roots = {
        "cifar10": without_a_class(arguments.cifar10, folder / "nine-classes"),
        "flowers": (arguments.flowers / "train", arguments.flowers / "val"),
    }
    training = {
        name: train(folder / name, *roots[name], size, budget, options)
        for (name, options), size in zip(
            {"cifar10": "", "flowers": budget.flowers}.items(), budget.sizes, strict=True
        )
    }
    extractor = load_extractor(mobilenet_config(arguments.weights))
    others = {
        LEFT_OUT: arguments.cifar10 / "test" / LEFT_OUT,
        "flowers": arguments.flowers / "val",
        "emoji": arguments.emoji,
    }
    rows = measure(folder, budget, roots, others, extractor)
    words = shlex.join(sys.argv[1:])
    for name in ("cifar10", "flowers", "emoji", "weights"):  # no path of this machine
        words = words.replace(shlex.quote(str(getattr(arguments, name))), name.upper())
    facts = {
        **origin(f"python -m benchmarks.anomaly {words}"),
        "weights_sha256": file_sha256(arguments.weights),
        "left_out": LEFT_OUT,
        "blur": BLUR,
        "noise": NOISE,
        "neighbor": NEIGHBOR,
        **{name: getattr(budget, name) for name in ("num_reference", "num_test", "num_neighbors")},
        "training": training,
        "results": rows,
    }
    path = RESULTS / f"anomaly_{arguments.budget}.json"
    path.write_text(json.dumps(facts, indent=1) + "\n")
    replace_section(f"anomaly-{arguments.budget}", table(facts), PAGE)


def without_a_class(root: Path, folder: Path) -> tuple[Path, Path]:
    """Folders of training and test images of all classes but one, by links."""
    for split in ("train", "test"):
        for source in sorted((root / split).iterdir()):
            link = folder / split / source.name
            if source.name != LEFT_OUT and not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source.resolve())
    return folder / "train", folder / "test"


def train(
    run_dir: Path, root: Path, validation_root: Path, size: int, budget: Budget, options: str
) -> dict[str, Any]:
    """Both stages, unless they are there: command without paths, commit and seconds of each."""
    run = f"{budget.preset} --run-dir {shlex.quote(str(run_dir))}"
    data = (
        f"--data.dataset folder --data.root {shlex.quote(str(root))} --data.follow-links "
        f"--data.validation-root {shlex.quote(str(validation_root))} --data.image-size {size}"
    )
    commands = {
        "train_tokenizer": f"{run} {data} {budget.tokenizer}{options}",
        "train_prior": f"{run} {budget.prior}",
    }
    records = {}
    for module, words in commands.items():
        run_command(run_dir, module, words, 1)
        record = json.loads((run_dir / f"{module}.done.json").read_text())
        del record["command"]  # it names folders; the options are those of the budget
        records[module] = record | {"options": words.replace(run, "").split(data)[-1].strip()}
    return records


def measure(
    folder: Path,
    budget: Budget,
    roots: Mapping[str, tuple[Path, Path]],
    others: Mapping[str, Path],
    extractor: FeatureExtractor,
) -> list[dict[str, Any]]:
    """A row for each trial; those that `folder` holds already are not made again."""
    path = folder / "trials.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    known = {(row["run"], row["unusual"]) for row in rows}
    for run, size in zip(roots, budget.sizes, strict=True):
        left = [
            trial
            for trial in trials(others, size, budget.num_test)
            if trial.run == run and (run, trial.unusual) not in known
        ]
        if not left:
            continue
        pipeline = PriorPipeline.from_pretrained(folder / run)
        held_out = images_of(roots[run][1], size, budget.num_reference + budget.num_test)
        num_reference = min(budget.num_reference, len(held_out) // 2)
        scorer = AnomalyScorer(pipeline.tokenizer, pipeline.prior, held_out[:num_reference])
        usual = held_out[num_reference:][: budget.num_test]
        trained = features(extractor, images_of(roots[run][0], size, budget.num_neighbors))
        of_usual = all_scores(scorer, extractor, trained, usual)
        for trial in left:
            unusual = all_scores(scorer, extractor, trained, trial.images(usual))
            counts = {"num_usual": len(usual), "num_unusual": len(unusual["joint"])}
            found = {name: auroc(of_usual[name], unusual[name]) for name in COLUMNS}
            rows.append({**trial._asdict(), **counts, "auroc": found})
            del rows[-1]["images"]
            print(rows[-1], flush=True)
            text = json.dumps(rows, indent=1) + "\n"
            replace_file(path, partial(Path.write_text, data=text))
    return rows


def trials(others: Mapping[str, Path], size: int, count: int) -> list[Trial]:
    """All of them."""

    def of(name: str) -> Callable[[Tensor], Tensor]:
        return lambda usual: images_of(others[name], size, count)

    nine = "the other nine classes"
    return [
        Trial("cifar10", nine, f"class {LEFT_OUT}", of(LEFT_OUT)),
        Trial("cifar10", nine, "flowers, downscaled", of("flowers")),
        Trial("cifar10", nine, "emoji, downscaled", of("emoji")),
        Trial("flowers", "flowers", f"blurred, σ {BLUR:g} px", partial(blurred, deviation=BLUR)),
        Trial("flowers", "flowers", f"noisy, σ {NOISE:g}", partial(noisy, deviation=NOISE)),
    ]


def images_of(root: Path, size: int, count: int) -> Tensor:
    """At most so many of the images below a folder, a seeded choice; alpha is put on white."""
    names = find_images(root, "data", follow_links=True).images
    pixels = [
        torch.from_numpy(decode_image(root / names[item], size, 3, None).pixels.copy())
        for item in chosen_items(len(names), count)
    ]
    return torch.stack(pixels).movedim(-1, 1)


def features(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Of any number of images."""
    return torch.cat([extractor(part).features for part in torch.split(images, 100)])


def all_scores(
    scorer: AnomalyScorer, extractor: FeatureExtractor, trained: Tensor, images: Tensor
) -> dict[str, Tensor]:
    """Those of the run, of its own prior, and the distance to neighbors."""
    measured = scorer.measure(images)
    found = scorer.scores(measured)
    assert found.keys() == SCORES.keys()
    return {
        **found,
        "own_code_bits": measured.bits["own"].sum(1),
        "neighbors": neighbor_distances(trained, features(extractor, images), NEIGHBOR),
    }


def table(facts: Mapping[str, Any]) -> str:
    """The page's table from the results."""
    rows = []
    for row in facts["results"]:
        best = max(row["auroc"].values())
        numbers = (row["auroc"][name] for name in COLUMNS)
        shown = (f"**{n:.3f}**" if n == best else f"{n:.3f}" for n in numbers)
        rows.append([row["run"], row["unusual"], *shown])
    return markdown_table(["run on", "unusual", *COLUMNS.values()], rows)


if __name__ == "__main__":
    main()
