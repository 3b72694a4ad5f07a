"""Any config fails with a message that names the field, or builds, learns, saves and loads."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipelines import ImageGenerationPipeline
from pipelines.config import TokenizerRunConfig
from pipelines.generation import SamplingConfig
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError
from prior import Prior, PriorConfig
from tests.faults.config_fields import (
    Edited,
    edited,
    prior_fields,
    run_fields,
    sampling_fields,
    tokenizer_fields,
)
from tests.faults.tally import Tally
from tokenizer import InputError, Tokenizer, TokenizerConfig
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig
from tokenizer.storage.configs import StrictConfig, describe_validation_error

NUM_TRIALS = 600
LONGEST_MESSAGE = 2_500


def field_names(config_class: type[BaseModel]) -> set[str]:
    """Names of all fields of a config, those of its parts included."""
    return set(re.findall(r'"(\w+)": \{', json.dumps(config_class.model_json_schema())))


def wrong_message(message: str, config_class: type[BaseModel], names: tuple[str, ...]) -> str:
    """What is wrong with an error message; nothing if it is one line that names a field.

    If one field alone was edited it must be that one.
    """
    said = set(re.findall(r"\w+", message.replace("-", "_")))
    if not message.isprintable() or len(message) > LONGEST_MESSAGE:
        return f"not a printable line: {message[:200]!r}"
    if len(names) == 1 and names[0] not in said:
        return f"{names[0]} is not named: {message}"
    if not said & (field_names(config_class) | {"images", "colour"}):
        return f"no field is named: {message}"
    return ""


def trial(
    config_class: type[StrictConfig], use: Callable[[Any, Path], None], case: Edited, folder: Path
) -> str:
    """What went wrong with a config; nothing if it is refused well or works."""
    try:
        config = config_class.model_validate_json(json.dumps(case.fields))
    except ValidationError as error:
        return wrong_message(describe_validation_error(error), config_class, case.names)
    try:
        with tempfile.TemporaryDirectory(dir=folder) as own_folder:
            use(config, Path(own_folder))
    except (InputError, DivergenceError) as error:
        return wrong_message(str(error), config_class, case.names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def learn(module: torch.nn.Module, loss: torch.Tensor) -> None:
    """A step forward and back."""
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [own.grad for own in module.parameters() if own.grad is not None]
    assert gradients
    assert all(bool(own.isfinite().all()) for own in [loss, *gradients]), "not finite"
    torch.optim.AdamW(module.parameters(), lr=1e-3).step()


def use_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    """Builds, learns, saves, loads and compares."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(config)
    tokenizer.total_steps = 2
    side = 2 * config.groups[0].downsampling
    images = torch.rand(8, config.channels, side, side) * 2 - 1
    tokenizer.initialize_from_data(images, torch.Generator().manual_seed(0))
    learn(tokenizer, tokenizer(images, 0).loss)
    tokenizer.update_codebooks()
    tokenizer.eval().save_pretrained(folder)
    loaded = Tokenizer.from_pretrained(folder)
    assert loaded.config == config
    assert torch.equal(loaded.reconstruct(images), tokenizer.reconstruct(images))


def use_prior(config: PriorConfig, folder: Path) -> None:
    """Builds, learns, saves, loads and compares."""
    torch.manual_seed(0)
    prior = Prior(config)
    indices = [
        torch.stack(
            [torch.randint(size, (3, own.height, own.width)) for size in own.codebook_sizes], 1
        )
        for own in config.code_maps
    ]
    labels = torch.zeros(3, dtype=torch.int64) if config.num_classes else None
    learn(prior, prior(indices, labels).loss)
    prior.eval().save_pretrained(folder)
    loaded = Prior.from_pretrained(folder)
    assert loaded.config == config
    assert torch.equal(loaded.log_prob(indices, labels), prior.log_prob(indices, labels))


def use_run(config: TokenizerRunConfig, folder: Path) -> None:
    """Trains; the same command again finds all done, and the saved model loads."""
    config = config.model_copy(
        update={
            "run_dir": folder,
            "data": config.data.model_copy(update={"cache_dir": folder / "cache"}),
        }
    )
    train_tokenizer(config)
    first = Tokenizer.from_pretrained(config.output_dir / "model")
    train_tokenizer(config)
    second = Tokenizer.from_pretrained(config.output_dir / "model")
    assert first.content_hash() == second.content_hash()


def small_pipeline() -> ImageGenerationPipeline:
    """Untrained models of three layers with six codes each, and two classes."""
    networks = NetworkConfig(width=4, max_width=4, num_blocks=1)
    torch.manual_seed(0)
    tokenizer = Tokenizer(hq_vae((8, 4), (2, 1), 6, 3, networks=networks))
    network = {"width": 8, "num_spatial_layers": 1, "num_depth_layers": 1, "num_heads": 1}
    maps = [own.model_dump(mode="json") for own in tokenizer.code_maps(8, 8)]
    fields = {"network": network, "code_maps": maps, "num_classes": 2}
    fields["tokenizer_hash"] = tokenizer.content_hash()
    prior = Prior(PriorConfig.model_validate_json(json.dumps(fields)))
    return ImageGenerationPipeline(tokenizer, prior)


def use_sampling(config: SamplingConfig, folder: Path) -> None:
    """Draws; a saved and loaded pipeline draws the same, in batches of another size."""
    pipeline = small_pipeline()
    images = torch.cat(list(pipeline.draw(range(3), None, 0, config)))
    pipeline.save_pretrained(folder)
    loaded = ImageGenerationPipeline.from_pretrained(folder)
    again = torch.cat(list(loaded.draw(range(3), None, 0, config, batch_size=2)))
    assert torch.equal(images, again)


KINDS: dict[
    str,
    tuple[
        type[StrictConfig], Callable[[Any, Path], None], st.SearchStrategy[dict[str, Any]], float
    ],
] = {
    "tokenizer": (TokenizerConfig, use_tokenizer, tokenizer_fields(), 0.4),
    "prior": (PriorConfig, use_prior, prior_fields(), 0.3),
    "sampling": (SamplingConfig, use_sampling, sampling_fields(), 0.15),
    "run": (TokenizerRunConfig, use_run, run_fields(), 0.15),
}
"""Config, what is done with it, valid fields, and its share of the trials."""


def run(folder: Path, num_trials: int, seed: int) -> Tally:
    """Tries configs of all kinds."""
    notes: list[str] = []
    tried = 0
    for kind, (config_class, use, valid, share) in KINDS.items():

        @with_seed(seed)
        @settings(
            max_examples=max(1, round(num_trials * share)),
            database=None,
            deadline=None,
            derandomize=False,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(edited(valid))
        def count(case: Edited) -> None:
            nonlocal tried
            tried += 1
            problem = trial(config_class, use, case, folder)  # noqa: B023
            if problem:
                notes.append(f"{kind}: {problem}; {json.dumps(case.fields)}")  # noqa: B023

        count()
    return Tally(tried, tried - len(notes), len(notes), notes)
