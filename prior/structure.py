"""The structure of x-transformers' layers that `prior.static_transformer` reads."""

from collections.abc import Iterator
from importlib import metadata
from typing import Any

from torch import nn

from tokenizer.storage.errors import InputError

NAMES = ("q", "k", "v")
DECODER = {
    "causal": True,
    "pre_norm": True,
    "sandwich_norm": False,
    "residual_attn": False,
    "softclamp_output": False,
    "unet_skips": False,
    "reinject_input": False,
    "num_residual_streams": 1,
}
ATTENTION = {
    "causal": True,
    "qk_norm": False,
    "attn_on_attn": False,
    "head_scale": False,
    "laser": False,
    "num_mem_kv": 0,
    "max_attend_past": None,
    "sparse_topk": None,
    "value_rmsnorm": None,
    "attend.softclamp_logits": False,
    "attend.l2_distance": False,
    "attend.selective": False,
    "attend.add_zero_kv": False,
}
RESIDUAL = {"residual_scale": None, "scale_residual_constant": 1.0}
ATTENTION_WEIGHTS = {
    "0.0.g",
    *(f"1.to_{name}.weight" for name in NAMES),
    "1.q_rmsnorm.gamma",
    "1.k_rmsnorm.gamma",
    "1.to_out.weight",
}
VALUE_WEIGHTS = {f"1.to_value_residual_mix.0.{name}" for name in ("weight", "bias")}
GATED_WEIGHTS = {
    "0.0.g",
    *(f"1.ff.{name}" for name in ("0.proj.weight", "0.proj.bias", "2.weight", "2.bias")),
}
"""What of x-transformers' layers is read here, and what is relied upon."""


def check_structure(module: nn.Module) -> None:
    """Compares the module with what is read and what is left out.

    Raises:
        InputError: they differ.
    """
    difference = next(_differences(module), None)
    if difference is not None:
        raise InputError(
            f"x-transformers {metadata.version('x-transformers')} has another structure than those "
            f"that pyproject.toml allows: {difference}"
        )


def _differences(module: nn.Module) -> Iterator[str]:
    decoder: Any = module.attn_layers
    layers = list(decoder.layers)
    kinds = ("a", "f") * (len(layers) // 2)
    yield from _unexpected("Decoder", decoder, DECODER | {"layer_types": kinds})
    for number, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        name = f"layer {number}"
        weights = {weight for weight, _ in layer.named_parameters()}
        expected = ATTENTION_WEIGHTS if kind == "a" else GATED_WEIGHTS
        if decoder.norm_need_condition:
            expected = expected - {"0.0.g"} | {"0.0.to_gamma.weight"}
        if decoder.add_value_residual and kind == "a" and number:
            expected = expected | VALUE_WEIGHTS
        optional = {"1.to_out.weight"}  # x-transformers spares it for a single head
        if (weights ^ expected) - optional:
            yield f"{name} has the weights {sorted(weights)}, not {sorted(expected)}"
        yield from _unexpected(name, layer[2], RESIDUAL)
        if kind == "a":
            heads = {"kv_heads": layer[1].heads, "rotate_num_heads": layer[1].heads}
            yield from _unexpected(name, layer[1], ATTENTION | heads)
        else:
            yield from _unexpected(name, layer[1].ff[0], {"mult_bias": 1.0})
            if not isinstance(layer[1].ff[0].act, nn.SiLU):
                yield f"{name} has the activation {layer[1].ff[0].act}, not SiLU()"


def _unexpected(name: str, module: Any, expected: dict[str, Any]) -> Iterator[str]:
    for path, value in expected.items():
        found = module
        for part in path.split("."):
            found = getattr(found, part, "nothing")
        if found != value:
            yield f"{path} of {name} is {found!r}, not {value!r}"
