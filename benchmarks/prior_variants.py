"""What helps a prior in few steps? Procedural shapes, on one thread.

    python -m benchmarks.prior_variants

Trains a tokenizer, then for each variant a prior over its codes: the same steps, images and seed.
What is finished is not run again. Writes benchmarks/results/prior_variants_cpu.json: validation
nats, processor seconds of training, and the demo's measurements of samples, whose judge is a
classifier trained on the images; and the table in benchmarks/README.md.
"""

import argparse
import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import origin
from benchmarks.readme import markdown_table, replace_section
from pipelines.command_configs import EvaluationConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig, TrainingConfig
from pipelines.data.sources import load_images
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.generation import ImageGenerationPipeline
from pipelines.presets import SHAPES_NETWORKS
from pipelines.processes import new_accelerator
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from prior import PriorNetworkConfig
from tokenizer.builders import sq_vae_2
from tokenizer.storage.files import replace_file

RESULTS = Path(__file__).parent / "results" / "prior_variants_cpu.json"
TOKENIZER_STEPS, PRIOR_STEPS = 1_900, 500
NUM_IMAGES = 500
CLASSIFIER_STEPS = 250
SAMPLING = {"temperature": 0.6, "guidance_scale": 2.0}
NETWORK = {
    "width": 64,
    "num_spatial_layers": 4,
    "num_depth_layers": 1,
    "num_heads": 2,
    "dropout": 0.0,
}

# Fields of the network, then of the run. Sharpened targets and inputs drawn anew
# from the posterior were tried at commit adafc60, and deleted again.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it was": ({}, {}),
    "value residual": ({"value_residual": True}, {}),
    "AdaLN": ({"adaptive_norm": True}, {}),
    "value residual, AdaLN": ({"value_residual": True, "adaptive_norm": True}, {}),
    "rotary positions beside absolute ones": ({"positions": "rotary"}, {}),
    "coarse to fine": ({"order": "coarse_to_fine"}, {}),
    "two depth layers": ({"num_depth_layers": 2}, {}),
    "hard targets": ({}, {"targets": "indices"}),
}


def tokenizer_run(folder: Path) -> TokenizerRunConfig:
    """The one whose codes are modelled."""
    training = TrainingConfig(
        total_steps=TOKENIZER_STEPS,
        batch_size=16,
        learning_rate=3e-3,
        validation_interval=500,
        checkpoint_interval=500,
    )
    return TokenizerRunConfig(
        run_dir=folder,
        tokenizer=sq_vae_2((8, 4), 256, 32, networks=SHAPES_NETWORKS),
        training=training,
    )


def prior_run(variant: str, seed: int, folder: Path) -> PriorRunConfig:
    """A prior of a variant."""
    network, fields = VARIANTS[variant]
    return PriorRunConfig(
        run_dir=folder,
        prior=PriorNetworkConfig(**(NETWORK | network)),
        training=TrainingConfig(
            total_steps=PRIOR_STEPS,
            batch_size=16,
            learning_rate=3e-3,
            weight_decay=0.05,
            ema_decay=0.99,
            seed=seed,
            validation_interval=PRIOR_STEPS,
            checkpoint_interval=PRIOR_STEPS,
        ),
        **({"targets": "posterior"} | fields),
    )


def measure(variant: str, seed: int, folder: Path, judge: FeatureExtractor) -> dict[str, Any]:
    """Trains in a folder beside the tokenizer's, where it goes on if it was stopped."""
    run_dir = folder / f"{list(VARIANTS).index(variant)}-{seed}"
    if not (run_dir / "tokenizer").exists():
        shutil.copytree(folder / "tokenizer", run_dir / "tokenizer")
    run = prior_run(variant, seed, run_dir)
    started = time.process_time()
    train_prior(run)
    seconds = time.process_time() - started
    lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").open()]
    nats = [line["nats_per_image"] for line in lines if "nats_per_image" in line]
    images = [load_images(tokenizer_run(folder).data, split) for split in ("train", "validation")]
    results = evaluate_generation(
        ImageGenerationPipeline.from_pretrained(run_dir),
        images[0],
        images[1],
        judge,
        EvaluationConfig(num_images=NUM_IMAGES, sampling=SamplingConfig.checked(**SAMPLING)),
        new_accelerator(),
    )
    values = {name: entry["value"] for name, entry in results.items()}
    return {
        "variant": variant,
        "seed": seed,
        "nats_per_image": nats[-1],
        "processor_seconds": round(seconds, 1),
        **values,
    }


def table() -> str:
    """Means over seeds, in the order in which variants were first run."""
    runs = json.loads(RESULTS.read_text())["runs"]
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        own = [run for run in runs if run["variant"] == variant]
        columns = (
            ("nats_per_image", "{:.1f}"),
            ("processor_seconds", "{:.0f}"),
            ("FD-OwnClassifier", "{:.1f}"),
            ("class agreement-OwnClassifier", "{:.2f}"),
            ("precision-OwnClassifier", "{:.2f}"),
            ("recall-OwnClassifier", "{:.2f}"),
        )
        numbers = [text.format(sum(run[name] for run in own) / len(own)) for name, text in columns]
        rows.append([variant, str(len(own)), *numbers])
    header = ["prior", "seeds", "nats", "CPU s", "FD", "agreement", "precision", "recall"]
    return markdown_table(header, rows)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/prior-variants"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = arguments.run_dir
    run = tokenizer_run(folder)
    train_tokenizer(run)
    judge = train_classifier(load_images(run.data, "train"), CLASSIFIER_STEPS, new_accelerator())
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": []}
    for seed in arguments.seeds:
        for variant in arguments.variants:
            if any((own["variant"], own["seed"]) == (variant, seed) for own in found["runs"]):
                continue
            found["runs"].append(measure(variant, seed, folder, judge))
            print(found["runs"][-1], flush=True)
            found |= {
                **origin("python -m benchmarks.prior_variants"),
                "steps": {"tokenizer": TOKENIZER_STEPS, "prior": PRIOR_STEPS},
                "sampling": SAMPLING,
            }
            text = json.dumps(found, indent=1) + "\n"
            replace_file(RESULTS, functools.partial(Path.write_text, data=text))
    replace_section("prior-variants", table(), Path(__file__).with_name("README.md"))


if __name__ == "__main__":
    main()
