"""Small runs of both stages whose numbers must not change: `python -m tests.golden.runs`.

Prints what `tests/test_golden.py` compares with `runs.json`.
"""

import hashlib
import json
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipelines import ImageGenerationPipeline
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.presets import PRIOR_PRESETS, TINY_NETWORKS, TOKENIZER_PRESETS
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from tokenizer import rsq_vae, sq_vae

Numbers = dict[str, Any]
GOLDEN = Path(__file__).parent / "runs.json"


def golden_runs() -> dict[str, tuple[TokenizerRunConfig, PriorRunConfig]]:
    """Both families, both orders, and what changes the path of a number through a step."""
    tiny, prior = TOKENIZER_PRESETS["tiny"], PRIOR_PRESETS["tiny"]
    accumulates = tiny.training.model_copy(
        update={"gradient_accumulation_steps": 2, "weight_decay": 0.1, "ema_decay": 0.0}
    )
    residual = tiny.model_copy(
        update={
            "tokenizer": rsq_vae(
                4, 3, 8, 4, shares_codebook=True, networks=TINY_NETWORKS, channels=1
            ),
            "data": tiny.data.model_copy(update={"channels": 1, "horizontal_flip": True}),
            "training": accumulates,
        }
    )
    single = tiny.model_copy(update={"tokenizer": sq_vae(4, 8, 4, networks=TINY_NETWORKS)})
    rotary = prior.prior.model_copy(update={"order": "coarse_to_fine", "positions": "rotary"})
    return {
        "tiny": (tiny, prior),
        "tiny-baseline": (TOKENIZER_PRESETS["tiny-baseline"], PRIOR_PRESETS["tiny-baseline"]),
        "residual": (
            residual,
            prior.model_copy(
                update={"training": accumulates, "targets": "posterior", "horizontal_flip": True}
            ),
        ),
        "single": (single, prior.model_copy(update={"is_class_conditional": False})),
        "rotary": (tiny, prior.model_copy(update={"prior": rotary, "targets": "posterior"})),
    }


def measure(folder: Path, tokenizer: TokenizerRunConfig, prior: PriorRunConfig) -> Numbers:
    """Trains both stages in `folder`; losses, and hashes of weights, codes and images."""
    data = tokenizer.data.model_copy(update={"cache_dir": folder / "cache"})
    train_tokenizer(tokenizer.model_copy(update={"run_dir": folder / "run", "data": data}))
    train_prior(prior.model_copy(update={"run_dir": folder / "run"}))
    pipeline = ImageGenerationPipeline.from_pretrained(folder / "run")
    channels = tokenizer.tokenizer.channels
    images = torch.rand(6, channels, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generated = pipeline(6, seed=0, progress=False, output="tensor")
    reconstructed = pipeline.reconstruct(images)
    assert isinstance(generated, Tensor)
    stages = ("tokenizer", "prior")
    return {
        "metrics": {name: _logged(folder / "run" / name) for name in stages},
        "weights": {name: _weights_hash(folder / "run" / name) for name in stages},
        "codes": _hash(pipeline.encode(images)),
        "reconstructions": _hash([reconstructed]),
        "generated": _hash([generated]),
        "moments": [_moments(reconstructed), _moments(generated)],
    }


def measure_all() -> Numbers:
    """All golden runs, and the kind of machine whose bits they have."""
    torch.set_num_threads(1)
    runs = {}
    for name, configs in golden_runs().items():
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = measure(Path(folder), *configs)
    return {"machine": machine(), "runs": runs}


def assert_same_metrics(found: list[Numbers], expected: list[Numbers], is_exact: bool) -> None:
    """Lines of metrics.jsonl; later versions may log more, and leave out constants."""
    for line, other in zip(expected, found, strict=True):
        for key, value in line.items():
            if key not in other:  # what a quantizer does not have is no longer logged
                assert value in (0, 1) or not any(value), key
            elif is_exact or isinstance(value, str):
                assert other[key] == value, key
            else:
                assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def machine() -> list[str]:
    """What decides the last bits of a sum: models of CPU differ in it, too.

    Virtual machines shorten the model's name, so that its numbers count, too.
    """
    processor = Path("/proc/cpuinfo")
    lines = processor.read_text().split("\n\n")[0].splitlines() if processor.exists() else []
    fields = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    names = ("vendor_id", "model name", "cpu family", "model", "stepping")
    model = " ".join(fields[name] for name in names if name in fields) or platform.processor()
    return [torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), model]


def _logged(folder: Path) -> list[Numbers]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "images_per_second"} for line in lines]


def _weights_hash(folder: Path) -> str:
    """Of values and shapes; names may change, and so may their order."""
    weights = load_file(folder / "model" / "model.safetensors").values()
    return hashlib.sha256("".join(sorted(_hash([own]) for own in weights)).encode()).hexdigest()


def _moments(images: Tensor) -> list[float]:
    """What is left of images where their last bits differ."""
    values = images.float()
    return [values.mean().item(), values.std().item()]


def _hash(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(measure_all(), indent=1))
