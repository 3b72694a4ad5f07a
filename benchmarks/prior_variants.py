"""What helps a prior in few steps? Procedural shapes, on one thread.

    python -m benchmarks.prior_variants

Trains a tokenizer, then for each variant a prior over its codes: the same steps, images and seed.
What is finished is not run again. Writes benchmarks/results/prior_variants_cpu.json: validation
nats, processor seconds of training, and the demo's measurements of samples, whose judge is a
classifier trained on the images.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import origin
from pipelines.command_configs import EvaluationConfig
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.data.sources import load_images
from pipelines.evaluation.classifier import train_classifier
from pipelines.evaluation.features import FeatureExtractor
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.generation import ImageGenerationPipeline
from pipelines.presets import PRIOR_PRESETS, TOKENIZER_PRESETS
from pipelines.processes import new_accelerator
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tokenizer.builders import sq_vae_2
from tokenizer.storage.files import replace_file

RESULTS = Path(__file__).parent / "results" / "prior_variants_cpu.json"
PRESET = "shapes32-sqvae2"
TOKENIZER_STEPS, PRIOR_STEPS = 1_900, 500
NUM_IMAGES = 500
CLASSIFIER_STEPS = 250
SAMPLING = {"temperature": 0.6, "guidance_scale": 2.0}

# Fields of the network, then of the run.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "as it was": ({}, {}),
    "value residual": ({"value_residual": True}, {}),
    "AdaLN": ({"adaptive_norm": True}, {}),
    "value residual, AdaLN": ({"value_residual": True, "adaptive_norm": True}, {}),
    "rotary positions beside absolute ones": ({"positions": "rotary"}, {}),
    "coarse to fine": ({"order": "coarse_to_fine"}, {}),
    "two depth layers": ({"num_depth_layers": 2}, {}),
    "hard targets": ({}, {"targets": "indices"}),
    "targets sharpened": ({}, {"target_temperature": 0.5}),
    "inputs drawn anew": ({}, {"drawn_inputs": True}),
}


def tokenizer_run(folder: Path) -> TokenizerRunConfig:
    """The one whose codes are modelled."""
    run = TOKENIZER_PRESETS[PRESET]
    update = {"total_steps": TOKENIZER_STEPS, "batch_size": 16}
    return run.model_copy(
        update={
            "run_dir": folder,
            "tokenizer": sq_vae_2((8, 4), 256, 32, networks=run.tokenizer.networks),
            "training": run.training.model_copy(update=update),
        }
    )


def prior_run(variant: str, seed: int, folder: Path) -> PriorRunConfig:
    """A prior of a variant."""
    run = PRIOR_PRESETS[PRESET]
    network, fields = VARIANTS[variant]
    training = {
        "total_steps": PRIOR_STEPS,
        "batch_size": 16,
        "seed": seed,
        "ema_decay": 0.99,
        "validation_interval": PRIOR_STEPS,
        "checkpoint_interval": PRIOR_STEPS,
    }
    return PriorRunConfig.model_validate(
        run.model_dump()
        | {"run_dir": folder, "targets": "posterior"}
        | fields
        | {
            "prior": run.prior.model_dump() | {"num_depth_layers": 1} | network,
            "training": run.training.model_dump() | training,
        }
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
        EvaluationConfig(num_images=NUM_IMAGES, sampling=SamplingConfig(**SAMPLING)),
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
            replace_file(RESULTS, lambda path, text=text: path.write_text(text))


if __name__ == "__main__":
    main()
