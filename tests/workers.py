"""What the tests run in processes of their own; each function is the whole of one process."""

import json
import os
import sys
import threading
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from pipelines.command_configs import EvaluationConfig, GenerateConfig
from pipelines.config import TokenizerRunConfig
from pipelines.data.codes import extract_codes
from pipelines.data.sources import load_images
from pipelines.decoder_run import DecoderRunConfig
from pipelines.evaluation.feature_shares import FeatureStore
from pipelines.evaluation.measurements import evaluate_generation
from pipelines.evaluation.reconstruction import measure_reconstruction
from pipelines.finetune_decoder import finetune_decoder
from pipelines.generate import generate
from pipelines.generation import ImageGenerationPipeline
from pipelines.processes import sum_over_processes
from pipelines.run.folder import load_run
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.loop import make_accelerator, train
from pipelines.training.tokenizer_stage import LoadedImages, TokenizerStage
from tests.extractors import Colors
from tests.faults.jobs import rank_environment
from tests.tiny_runs import RunConfigs
from tokenizer import Tokenizer


class RecordingStage(TokenizerStage):
    """Keeps the items of each step, and the weights after the start from the data."""

    def __init__(self, config: TokenizerRunConfig, accelerator: Accelerator) -> None:
        super().__init__(config, accelerator)
        self.items: list[list[int]] = []
        self.start: dict[str, torch.Tensor] = {}

    def initialize(self) -> None:
        super().initialize()
        self.start = {name: own.clone() for name, own in self.model.state_dict().items()}

    def load(self, items: np.ndarray, is_flipped: np.ndarray) -> LoadedImages:
        self.items.append(items.tolist())
        return super().load(items, is_flipped)


def train_and_record(config: TokenizerRunConfig, records: Path) -> None:
    """Trains; leaves items, first and last weights of this process in `records`."""
    accelerator = make_accelerator(config)
    rank = accelerator.process_index
    stage = RecordingStage(config, accelerator)
    train(stage, config, accelerator)
    items = torch.tensor(stage.items)
    end = {name: own.contiguous() for name, own in stage.model.state_dict().items()}
    save_file({"items": items}, records / f"items_{rank}.safetensors")
    save_file(stage.start, records / f"start_{rank}.safetensors")
    save_file(end, records / f"end_{rank}.safetensors")


def share_the_work(
    rank: int,
    world: int,
    port: str,
    baseline: TokenizerRunConfig,
    prior: RunConfigs,
    decoder: DecoderRunConfig,
    in_parts: list[TokenizerRunConfig],
    trained: Path,
    records: Path,
) -> None:
    """One of `world` processes that train, measure, extract codes and generate together."""
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, world, port)
    with (records / f"output_{rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # A process whose partner has died would wait for ever.
        threading.Timer(60, os._exit, [3]).start()
        try:
            _share_the_work(baseline, prior, trained, records)
            finetune_decoder(decoder)
            for config in in_parts:
                train_tokenizer(config)
        finally:
            sys.stderr.flush()
    torch.distributed.destroy_process_group()
    os._exit(0)


def _share_the_work(
    baseline: TokenizerRunConfig, prior: RunConfigs, trained: Path, records: Path
) -> None:
    train_and_record(baseline, records)
    train_prior(prior)
    accelerator = Accelerator()
    rank = accelerator.process_index
    assert accelerator.num_processes == 2
    tokenizer = Tokenizer.from_pretrained(trained / "tokenizer" / "model")
    config = load_run(TokenizerRunConfig, trained / "tokenizer" / "config.json")
    validation = load_images(config.data, "validation")
    items = np.arange(len(validation) - 1)  # an odd number
    errors, usage = measure_reconstruction(tokenizer, validation, items, accelerator)
    save_file(
        {"errors": torch.stack(errors), "counts": torch.stack(usage.counts)},
        records / f"reconstruction_{rank}.safetensors",
    )
    total = sum_over_processes(accelerator, torch.tensor([2**40 + rank]))
    save_file({"total": total}, records / f"sums_{rank}.safetensors")
    train_images = load_images(config.data, "train")
    extract_codes(
        tokenizer, train_images, records / "codes", accelerator, flips=True, keeps_latents=False
    )
    generate(
        GenerateConfig(
            run_dir=trained, output_dir=records / "images", num_images=5, batch_size=2, seed=1
        )
    )
    results = evaluate_generation(
        ImageGenerationPipeline.from_pretrained(trained),
        *(train_images, validation, Colors(), EvaluationConfig(num_images=25), accelerator),
        store=FeatureStore(records / "features", records / "statistics"),
    )
    (records / f"results_{rank}.json").write_text(json.dumps(results))
