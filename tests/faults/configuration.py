"""Any config fails with a message that names the field, or trains, saves and loads, or draws."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ValidationError

from pipelines import ImageGenerationPipeline
from pipelines.config import PriorRunConfig, TokenizerRunConfig
from pipelines.sampling_config import SamplingConfig
from pipelines.train_prior import train_prior
from pipelines.train_tokenizer import train_tokenizer
from pipelines.training.divergence import DivergenceError
from prior import Prior, PriorConfig
from tests.tiny_runs import prior_run, tokenizer_run, weight_files
from tokenizer import InputError, Tokenizer, hq_vae
from tokenizer.config import NetworkConfig
from tokenizer.storage.configs import StrictConfig, describe_validation_error

NUM_TRIALS = 600
LONGEST_MESSAGE = 2_500
ODD: list[Any] = [None, True, -1, 0, 0.5, 10**12, 10**30, -1e300, 1e300, 1e-300, float("nan")]
ODD += [float("inf"), "", "x", "1", "a\nb\x1b[2J", [], [0], [None], {}, {"kind": "x"}]
"""Values that no number field takes, and some that none should."""


def trial(folder: Path, number: int, generator: np.random.Generator) -> str:
    """Uses a config of which up to three fields were changed, to odd values or near ones."""
    config, use = _valid(folder, number)
    fields = json.loads(config.model_dump_json())
    names = [_change(fields, generator) for _ in range(generator.integers(4))]
    complaint = attempt(type(config), use, fields, names)
    return complaint and f"{type(config).__name__}: {complaint}; {json.dumps(fields)}"


def attempt(
    config_class: type[StrictConfig],
    use: Callable[[Any], None],
    fields: dict[str, Any],
    names: list[str],
) -> str:
    """What went wrong with a config; nothing if it is refused well or works."""
    try:
        use(config_class.model_validate_json(json.dumps(fields)))
    except ValidationError as error:
        return wrong_message(describe_validation_error(error), config_class, names)
    except (InputError, DivergenceError) as error:
        return wrong_message(str(error), config_class, names)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def wrong_message(message: str, config_class: type[BaseModel], names: list[str]) -> str:
    """What is wrong with an error message; nothing if it is one line that names a field.

    If one field alone was changed it must be that one.
    """
    said = set(re.findall(r"\w+", message.replace("-", "_")))
    fields = re.findall(r'"(\w+)": \{', json.dumps(config_class.model_json_schema()))
    if not message.isprintable() or len(message) > LONGEST_MESSAGE:
        return f"not a printable line: {message[:200]!r}"
    if len(names) == 1 and names[0] not in said:
        return f"{names[0]} is not named: {message}"
    return "" if said & {*fields, "images", "colour"} else f"no field is named: {message}"


def places(value: Any, name: str = "") -> list[tuple[Any, Any, str]]:
    """Every place in nested fields: container, key and name of the field."""
    found = []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        own_name = key if isinstance(key, str) else name
        found.append((value, key, own_name))
        if isinstance(inner, dict | list):
            found += places(inner, own_name)
    return found


def _change(fields: dict[str, Any], generator: np.random.Generator) -> str:
    """Gives one field an odd value, or one near its own, or adds a field; its name."""
    found = [own for own in places(fields) if own[2] != "compile"]  # which takes minutes
    place, key, name = found[generator.integers(len(found))]
    if isinstance(key, str) and generator.integers(20) == 0:
        key = name = "colour"
    value = place.get(key) if isinstance(place, dict) else place[key]
    near: list[Any] = []
    if isinstance(value, bool):
        near = [not value]
    elif isinstance(value, int):
        near = [value - 1, value + 1, 2 * value]
    elif isinstance(value, float):
        near = [value * generator.uniform(0, 2)]
    elif isinstance(value, list):
        near = [value[1:], value + value[-1:]]
    options = near if near and generator.integers(2) else ODD
    place[key] = options[generator.integers(len(options))]
    return name


def _valid(folder: Path, number: int) -> tuple[StrictConfig, Callable[[Any], None]]:
    """A config that works, and what is done with it."""
    if number % 4 == 3:
        by_layer = SamplingConfig(temperature=(1.0, 0.9, 0.8), top_k=(None, 4, 2), top_p=0.9)
        config = (SamplingConfig(top_k=3, guidance_scale=1.5), by_layer)[number % 8 // 4]
        return config, lambda own: _draw(own, folder / "pipeline")
    training = {"total_steps": 1 + number % 2, "precision": ("fp32", "bf16")[number // 4 % 2]}
    trained = tokenizer_run(folder / "trained", folder / "cache")
    if number % 4 == 2:
        if not trained.output_dir.exists():
            train_tokenizer(trained)
        return prior_run(folder / "run", **training), lambda own: _train(own, train_prior, folder)
    preset = ("tiny", "tiny-baseline")[number % 2]
    config = tokenizer_run(folder / "run", folder / "cache", preset, **training)
    return config, lambda own: _train(own, train_tokenizer, folder)


def _train(
    config: TokenizerRunConfig | PriorRunConfig, train: Callable[[Any], None], folder: Path
) -> None:
    """Trains; the same command again finds all done, and the model loads."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    parts: dict[str, Any] = {"run_dir": folder / "run"}
    if isinstance(config, TokenizerRunConfig):
        parts["data"] = config.data.model_copy(update={"cache_dir": folder / "cache"})
    else:
        (folder / "run").mkdir()
        (folder / "run" / "tokenizer").symlink_to((folder / "trained" / "tokenizer").resolve())
    config = config.model_copy(update=parts)
    train(config)
    first = weight_files(config.output_dir)
    train(config)
    assert weight_files(config.output_dir) == first
    kind = Tokenizer if isinstance(config, TokenizerRunConfig) else Prior
    assert kind.from_pretrained(config.output_dir / "model")


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


def _draw(config: SamplingConfig, folder: Path) -> None:
    """Draws; a saved and loaded pipeline draws the same, in batches of another size."""
    pipeline = small_pipeline()
    images = torch.cat(list(pipeline.draw(range(3), None, 0, config)))
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    loaded = ImageGenerationPipeline.from_pretrained(folder)
    again = torch.cat(list(loaded.draw(range(3), None, 0, config, batch_size=2)))
    assert torch.equal(images, again)
