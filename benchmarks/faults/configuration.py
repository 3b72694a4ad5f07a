"""Any config fails with a message that names the field, or builds, learns, saves and loads."""

import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from benchmarks.faults.tally import Tally
from pipelines import ImageGenerationPipeline
from pipelines.config import TokenizerRunConfig
from pipelines.divergence import DivergenceError
from pipelines.generation import SamplingConfig
from pipelines.presets import TOKENIZER_PRESETS
from pipelines.train_tokenizer import train_tokenizer
from prior import Prior, PriorConfig
from tokenizer import InputError, Tokenizer, TokenizerConfig
from tokenizer.builders import hq_vae
from tokenizer.config import NetworkConfig
from tokenizer.pretrained import StrictConfig, describe_validation_error

NUM_TRIALS = 600
LONGEST_MESSAGE = 2_500
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    0.5,
    10**12,
    10**30,
    -1e300,
    1e300,
    1e-300,
    "",
    "x",
    "1",
    [],
    [0],
    {},
]
"""Values that no number field takes, and some that none should."""
ODD += [float("nan"), float("inf"), [None], {"kind": "x"}, "a\nb\x1b[2J"]


class Edited(NamedTuple):
    """The fields of a config, and which of them were given an odd value."""

    fields: dict[str, Any]
    names: tuple[str, ...]


def powers(low: int, high: int) -> st.SearchStrategy[int]:
    """Powers of two."""
    return st.integers(low, high).map(lambda power: 2**power)


@st.composite
def tokenizer_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A valid small TokenizerConfig."""
    factors = sorted(draw(st.sets(powers(0, 3), min_size=1, max_size=3)), reverse=True)
    groups = []
    for factor in factors:
        shares = draw(st.booleans())
        sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
        sizes = [sizes[0]] * len(sizes) if shares else sizes
        dim = draw(st.integers(1, 5))
        groups.append(
            {
                "downsampling": factor,
                "codebook_sizes": sizes,
                "code_dim": dim,
                "shares_codebook": shares,
            }
        )
    patch = draw(st.sampled_from([own for own in (1, 2, 4, 8) if own <= factors[-1]]))
    reached = [own for own in (1, 2, 4, 8) if patch <= own <= factors[0]]
    stochastic = {
        "kind": st.just("stochastic"),
        "variance_factor": st.floats(0.01, 100),
        "noise_factor": st.floats(0, 10),
        "initial_temperature": st.floats(0.01, 10),
        "final_temperature": st.floats(0.01, 10),
    }
    nearest = {
        "kind": st.just("nearest"),
        "starts_from_data": st.booleans(),
        "decay": st.floats(0, 1),
        "restart_threshold": st.floats(0, 2),
        "commitment_weight": st.floats(0, 10),
    }
    return {
        "groups": groups,
        "quantizer": draw(st.fixed_dictionaries(stochastic) | st.fixed_dictionaries(nearest)),
        "networks": {
            "patch_size": patch,
            "width": draw(st.integers(1, 9)),
            "max_width": draw(st.integers(1, 9)),
            "num_blocks": draw(st.integers(1, 2)),
            "attention_downsampling": draw(st.lists(st.sampled_from(reached), max_size=2)),
        },
        "channels": draw(st.integers(1, 4)),
    }


@st.composite
def prior_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A valid small PriorConfig."""
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    maps = []
    for _ in range(draw(st.integers(1, 2))):
        sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=2))
        dim = draw(st.integers(1, 4))
        maps.append({"height": height, "width": width, "codebook_sizes": sizes, "code_dim": dim})
        height, width = height * draw(st.integers(1, 2)), width * draw(st.integers(1, 2))
    heads = draw(st.integers(1, 2))
    network = {
        "width": heads * 4 * draw(st.integers(1, 2)),
        "body_depth": draw(st.integers(1, 2)),
        "head_depth": draw(st.integers(1, 2)),
        "num_heads": heads,
        "order": draw(st.sampled_from(["cell", "coarse_to_fine"])),
        "positions": draw(st.sampled_from(["learned", "rotary"])),
        "dropout": draw(st.floats(0, 0.9)),
        "label_dropout": draw(st.floats(0, 0.9)),
    }
    num_classes = draw(st.integers(0, 3))
    return {"network": network, "code_maps": maps, "num_classes": num_classes, "tokenizer_hash": ""}


@st.composite
def run_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A valid run of a step or two on a few images; its folders are set by the trial."""
    fields: dict[str, Any] = TOKENIZER_PRESETS["tiny"].model_dump(mode="json")
    parts = draw(st.integers(1, 3))
    fields["training"] |= {
        "total_steps": draw(st.integers(1, 2)),
        "batch_size": parts * draw(st.integers(1, 3)),
        "gradient_accumulation_steps": parts,
        "learning_rate": draw(st.floats(1e-6, 1e-2)),
        "schedule": draw(st.sampled_from(["constant", "cosine"])),
        "warmup_steps": draw(st.integers(0, 3)),
        "weight_decay": draw(st.floats(0, 1)),
        "beta2": draw(st.floats(0.1, 0.999)),
        "max_gradient_norm": draw(st.floats(0.01, 10)),
        "ema_decay": draw(st.floats(0, 0.99)),
        "precision": draw(st.sampled_from(["fp32", "bf16"])),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "log_interval": draw(st.integers(1, 3)),
        "validation_interval": draw(st.integers(1, 3)),
        "num_validation_images": draw(st.integers(1, 9)),
        "checkpoint_interval": draw(st.integers(1, 3)),
    }
    fields["data"] |= {
        "image_size": draw(st.sampled_from([16, 24])),
        "num_images": draw(st.integers(1, 20)),
        "num_validation_images": draw(st.integers(1, 5)),
        "horizontal_flip": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**63 - 1)),
    }
    return fields


@st.composite
def sampling_fields(draw: st.DrawFn) -> dict[str, Any]:
    """A valid SamplingConfig for three layers of six codes."""

    def layers(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return one | st.lists(one, min_size=3, max_size=3)

    return {
        "temperature": draw(layers(st.floats(1e-3, 1e3))),
        "top_k": draw(layers(st.none() | st.integers(1, 6))),
        "top_p": draw(layers(st.none() | st.floats(1e-9, 1))),
        "guidance_scale": draw(st.floats(0, 1e3)),
    }


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of nested dictionaries and lists stand."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, own in inner:
        found.append((*path, key))
        if isinstance(own, dict | list):
            found += paths_of(own, (*path, key))
    return found


@st.composite
def edited(draw: st.DrawFn, valid: st.SearchStrategy[dict[str, Any]], most: int = 2) -> Edited:
    """Valid fields, of which up to `most` get an odd value, or beside which there is another."""
    fields = json.loads(json.dumps(draw(valid)))
    names = []
    for _ in range(draw(st.integers(0, most))):
        path = draw(st.sampled_from(paths_of(fields)))
        *parents, last = path
        place = fields
        for key in parents:
            place = place[key]
        if isinstance(last, str) and draw(st.integers(0, 9)) == 0:
            last, path = "colour", (*parents, "colour")
        place[last] = draw(st.sampled_from(ODD))
        names.append(next(key for key in reversed(path) if isinstance(key, str)))
    return Edited(fields, tuple(names))


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
    network = {"width": 8, "body_depth": 1, "head_depth": 1, "num_heads": 1}
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
