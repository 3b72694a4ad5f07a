"""Fields of configs, valid and odd, for hypothesis to draw."""

import json
from typing import Any, NamedTuple

from hypothesis import strategies as st

from pipelines.presets import TOKENIZER_PRESETS

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
        "temperature_hold": st.floats(0, 0.99),
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
        "num_spatial_layers": draw(st.integers(1, 2)),
        "num_depth_layers": draw(st.integers(1, 2)),
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
        "temperature": draw(layers(st.floats(1e-6, 1e6))),
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
