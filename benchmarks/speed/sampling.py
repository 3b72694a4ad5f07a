"""Drawing codes: the static cache beside x-transformers' cache, a flattened prior and no cache."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from benchmarks.speed.library_cache import LibraryCache
from benchmarks.speed.measure import Budget, Comparison, device_of, wait_for_gpu
from prior import Prior, PriorConfig, PriorNetworkConfig, sample_generators
from prior.logits_filter import draw
from prior.ordering import CodeOrdering
from prior.sampling import Sampler
from tokenizer.config import CodeMapConfig

CODEBOOK_SIZE = 256
LAYOUTS = {
    "8x8x4": [(8, 4)],
    "8x8 + 16x16": [(8, 1), (16, 1)],
}
"""Side length and depth of the code maps."""
NETWORKS = {
    "tiny": PriorNetworkConfig(width=32, num_spatial_layers=2, num_depth_layers=1, num_heads=2),
    "cpu": PriorNetworkConfig(width=384, num_spatial_layers=6, num_depth_layers=2, num_heads=6),
    "gpu": PriorNetworkConfig(width=512, num_spatial_layers=6, num_depth_layers=2, num_heads=8),
}
CACHED_TARGETS = {"x-transformers cache": 2, "flattened, AutoregressiveWrapper": 4}
HALVED_TARGETS = {"x-transformers cache": 2}
COPIED_BYTES = 2**30
"""Of the copy that measures a GPU's memory bandwidth."""

Contenders = Mapping[str, Callable[[], Callable[[], None]]]


def comparisons(budget: Budget) -> Iterator[Comparison]:
    """What is drawn by which means; no cache in comparisons of its own, with few images."""
    is_gpu = budget == "gpu"
    device = device_of(budget)
    bandwidth = _bytes_per_second() if device.type == "cuda" else None
    for layout, maps in LAYOUTS.items():
        scale = 4 if budget == "tiny" else 1
        prior = _prior(NETWORKS[budget], maps, scale).to(device)
        batches = {"tiny": [2], "cpu": [1, 8], "gpu": [1, 64, 512]}[budget]
        for batch in batches:
            contenders = {
                "static cache": _ours(prior, batch),
                "x-transformers cache": _with(LibraryCache, prior, batch),
                "flattened, AutoregressiveWrapper": _flattened(prior, batch),
            }
            name = f"{_name(layout, prior, batch)}, cached"
            common = ("images", batch, 2 if is_gpu else 5, _details(prior, batch, bandwidth))
            yield Comparison(name, contenders, *common, CACHED_TARGETS)
            if not is_gpu:  # where reading the weights is what takes the time
                half = copy.deepcopy(prior).bfloat16()
                contenders = {
                    "static cache in bfloat16": _ours(half, batch),
                    "static cache": _ours(prior, batch),
                    "x-transformers cache": _with(LibraryCache, prior, batch),
                }
                common = ("images", batch, 5, _details(half, batch, bandwidth))
                yield Comparison(f"{name}, half the bytes", contenders, *common, HALVED_TARGETS)
        batch = 64 if is_gpu else 2
        contenders = {
            "static cache": _ours(prior, batch),
            "no cache": _with(NoCache, prior, batch),
        }
        name = f"{_name(layout, prior, batch)}, not cached"
        details = _details(prior, batch, bandwidth)
        yield Comparison(name, contenders, "images", batch, 1, details, {"no cache": 20})


class NoCache:
    """`prior.IncrementalDecoder` by a full forward for each code of an unconditional prior."""

    def __init__(self, prior: Prior, batch: int) -> None:
        self._prior = prior
        ordering = prior.ordering
        shape = (batch, ordering.num_steps, ordering.num_slots)
        self._codes = torch.zeros(shape, dtype=torch.int64, device=prior.start.device)
        places = zip(ordering.mask.nonzero().tolist(), _slot_types(ordering), strict=True)
        self._places = list(places)
        self._number = 0

    def next_logits(self) -> Tensor:
        """Logits of the next code."""
        (step, slot), (group, layer) = self._places[self._number]
        ordering = self._prior.ordering
        logits = self._prior.logits(ordering.unflatten(self._codes))[group][layer]
        return logits[:, int(ordering.row[step, slot]), int(ordering.column[step, slot])]

    def append(self, codes: Tensor) -> None:
        """Fixes the next code of every image."""
        (step, slot), _ = self._places[self._number]
        self._codes[:, step, slot] = codes
        self._number += 1


def _slot_types(ordering: CodeOrdering) -> list[tuple[int, int]]:
    return [(slot.group, slot.layer) for step in ordering.steps for slot in step]


def _prior(network: PriorNetworkConfig, maps: list[tuple[int, int]], scale: int) -> Prior:
    """An untrained one: the time does not depend on the weights."""
    code_maps = tuple(
        CodeMapConfig(
            height=side // scale,
            width=side // scale,
            codebook_sizes=(CODEBOOK_SIZE,) * depth,
            code_dim=64,
        )
        for side, depth in maps
    )
    torch.manual_seed(0)
    return Prior(PriorConfig(network=network, code_maps=code_maps)).eval()


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _name(layout: str, prior: Prior, batch: int) -> str:
    return f"{layout} codes, {_num_parameters(prior) / 1e6:.0f} M parameters, batch {batch}"


def _ours(prior: Prior, batch: int) -> Callable[[], Callable[[], None]]:
    def set_up() -> Callable[[], None]:
        sampler = Sampler(prior)

        def call() -> None:
            sampler(None, sample_generators(0, range(batch)))
            wait_for_gpu()

        if prior.start.device.type == "cuda":  # only on a GPU
            for _ in range(2):  # to start up, and to capture
                call()
        return call

    return set_up


def _with(
    cache_class: type[LibraryCache] | type[NoCache], prior: Prior, batch: int
) -> Callable[[], Callable[[], None]]:
    """The loop that `sample` was before the static cache."""

    @torch.inference_mode()
    def call() -> None:
        device, ordering = prior.start.device, prior.ordering
        cache = cache_class(prior, batch)
        generators = sample_generators(0, range(batch))
        number = len(_slot_types(ordering))
        uniforms = torch.stack(
            [torch.rand(number, generator=g, dtype=torch.float64) for g in generators]
        ).to(device)
        for column in uniforms.unbind(1):
            cache.append(draw(cache.next_logits().double(), column))
        wait_for_gpu()

    return lambda: call


def _flattened(prior: Prior, batch: int) -> Callable[[], Callable[[], None]]:
    """All codes of an image in one sequence, the layers of both transformers stacked."""

    def set_up() -> Callable[[], None]:
        network, device = prior.config.network, prior.start.device
        number = len(_slot_types(prior.ordering))
        model = AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=CODEBOOK_SIZE + 1,
                max_seq_len=number + 1,
                attn_layers=Decoder(
                    dim=network.width,
                    depth=network.num_spatial_layers + network.num_depth_layers,
                    heads=network.num_heads,
                    attn_dim_head=network.width // network.num_heads,
                    attn_flash=True,
                    attn_qk_rmsnorm=True,
                    ff_glu=True,
                    ff_swish=True,
                    use_rmsnorm=True,
                ),
            )
        ).to(device)
        difference = _num_parameters(model) / _num_parameters(prior) - 1
        assert network.width < 100 or abs(difference) < 0.05, difference
        start = torch.full((batch, 1), CODEBOOK_SIZE, device=device)

        def call() -> None:
            torch.manual_seed(0)
            model.generate(start, number, temperature=1.0, filter_logits_fn=lambda logits: logits)
            wait_for_gpu()

        return call

    return set_up


def _details(prior: Prior, batch: int, bandwidth: float | None) -> dict[str, Any]:
    """Parameters, and the bytes that must move: weights and cache, read once per step."""
    ordering, network = prior.ordering, prior.config.network
    element = prior.start.element_size()
    weights, cached = 0, 0
    for step, slots in enumerate(ordering.steps):
        weights += _num_parameters(prior.spatial_transformer)
        cached += network.num_spatial_layers * (step + 1)
        for slot, slot_type in enumerate(slots):
            output = prior.outputs[_layer_number(ordering, slot_type.group, slot_type.layer)]
            weights += _num_parameters(prior.depth_transformer) + _num_parameters(output)
            cached += network.num_depth_layers * (slot + 1)
    moved = element * (weights + 2 * network.width * batch * cached)
    details: dict[str, Any] = {
        "parameters": _num_parameters(prior),
        "order": network.order,
        "codes": len(_slot_types(ordering)),
        "batch": batch,
        "bytes_moved": moved,
    }
    if bandwidth is not None:  # only on a GPU
        details["bytes_per_second"] = bandwidth
        details["images_per_second_at_bandwidth"] = batch * bandwidth / moved
    return details


def _layer_number(ordering: CodeOrdering, group: int, layer: int) -> int:
    return sum(code_map.depth for code_map in ordering.code_maps[:group]) + layer


def _bytes_per_second() -> float:  # only on a GPU
    """Memory bandwidth, by a large copy."""
    source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    torch.cuda.synchronize()
    return 10 * 2 * COPIED_BYTES / (time.perf_counter() - started)
