"""What is compared with other codecs: tokenizers of photographs, and what each cell measures."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from benchmarks.rate.files import FORMATS, Format, coded, opened, point_of, to_picture
from pipelines.coding.codec import Codec
from pipelines.config import DataConfig, TokenizerRecipe, TokenizerRunConfig, TrainingConfig
from pipelines.data.dataset import chosen_items
from pipelines.data.sources import load_folder, load_images
from pipelines.images import save_png
from pipelines.processes import new_accelerator
from pipelines.recipe import CodePriorRecipe
from pipelines.tokenizer_pipeline import TokenizerPipeline
from pipelines.train_tokenizer import train_tokenizer
from tokenizer.builders import hq_vae
from tokenizer.code_prior_config import CodePriorConfig
from tokenizer.config import NetworkConfig

IMAGE_SIZE = 128
NUM_SHOWN = 6
Images = UInt8[Tensor, "batch 3 height width"]


class Groups(NamedTuple):
    """Code maps of a tokenizer."""

    downsamplings: tuple[int, ...]
    depths: tuple[int, ...]
    codebook_size: int

    @property
    def name(self) -> str:
        """As that of a cell: 8x8+16x16x4-k256."""
        sides = [IMAGE_SIZE // factor for factor in self.downsamplings]
        maps = [
            f"{side}x{side}" + (f"x{depth}" if depth > 1 else "")
            for side, depth in zip(sides, self.depths, strict=True)
        ]
        return f"{'+'.join(maps)}-k{self.codebook_size}"


class Budget(NamedTuple):
    """How long, and with which networks."""

    networks: NetworkConfig
    code_dim: int
    prior_width: int
    total_steps: int
    calibration_steps: int
    """Of the heads, on hard codes."""
    batch_size: int
    learning_rate: float
    tokenizers: tuple[Groups, ...]
    qualities: tuple[float | None, ...]
    """Of our files: μ of the search, None for greedy codes."""
    num_images: int
    """Of each set."""


CPU = Budget(
    networks=NetworkConfig(patch_size=4, width=64, max_width=64),
    code_dim=32,
    prior_width=64,
    total_steps=2_000,
    calibration_steps=200,
    batch_size=12,
    learning_rate=4e-3,
    tokenizers=(Groups((8,), (4,), 256), Groups((8,), (2,), 256)),
    qualities=(None, 1.0),
    num_images=40,
)
GPU = CPU._replace(
    networks=NetworkConfig(patch_size=4, width=128, max_width=256),
    code_dim=64,
    prior_width=128,
    total_steps=20_000,
    calibration_steps=1_000,
    batch_size=32,
    learning_rate=2e-3,
    tokenizers=(*CPU.tokenizers, Groups((16, 8), (1, 4), 1024), Groups((8,), (6,), 256)),
    qualities=(None, 0.25, 0.5, 1.0, 2.0, 4.0),
    num_images=500,
)
TINY = CPU._replace(
    networks=NetworkConfig(patch_size=8, width=8, max_width=8, num_blocks=1),
    code_dim=4,
    prior_width=4,
    total_steps=2,
    calibration_steps=2,
    batch_size=2,
    tokenizers=(Groups((16,), (2,), 8),),
    num_images=1,
)
BUDGETS = {"tiny": TINY, "cpu": CPU, "gpu": GPU}


def run_config(
    groups: Groups, budget: Budget, data: DataConfig, folder: Path
) -> TokenizerRunConfig:
    """The training of a tokenizer, in a folder of its own."""
    tokenizer = hq_vae(
        groups.downsamplings,
        groups.depths,
        groups.codebook_size,
        budget.code_dim,
        networks=budget.networks,
    )
    prior = CodePriorConfig(width=budget.prior_width)
    recipe = CodePriorRecipe(calibration_steps=budget.calibration_steps)
    return TokenizerRunConfig(
        run_dir=folder / groups.name,
        data=data,
        tokenizer=tokenizer.model_copy(update={"code_prior": prior}),
        recipe=TokenizerRecipe(code_prior=recipe),
        training=TrainingConfig(
            total_steps=budget.total_steps,
            batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            validation_interval=budget.total_steps,
            checkpoint_interval=max(budget.total_steps // 4, 1),
            num_validation_images=100,
        ),
    )


def data_config(flowers: Path, cache_dir: Path) -> DataConfig:
    """Photographs."""
    return DataConfig(
        dataset="folder",
        root=flowers / "train",
        validation_root=flowers / "val",
        image_size=IMAGE_SIZE,
        horizontal_flip=True,
        cache_dir=cache_dir,
    )


def originals(data: DataConfig, emoji: Path, num_images: int) -> dict[str, Images]:
    """Of each set some pictures, spread over all; transparency on white."""
    sets = {
        "flowers": load_images(data, "validation"),
        "emoji": load_folder(data, emoji, "emoji", new_accelerator()),
    }
    return {
        name: images.images_at(chosen_items(len(images), min(num_images, len(images))))
        for name, images in sets.items()
    }


def cells(
    budget: Budget, data: DataConfig, images: Mapping[str, Images], folder: Path
) -> Iterator[tuple[dict[str, str], Callable[[], list[dict[str, Any]]]]]:
    """What each is called, and what measures its points."""
    for name, own in images.items():
        for codec, form in FORMATS.items():
            yield {"images": name, "codec": codec}, partial(points_of_format, form, own)
        for groups in budget.tokenizers:
            config = run_config(groups, budget, data, folder)
            shown = config.run_dir / f"{name}.png"
            measure = partial(points_of_tokenizer, config, budget, own, shown)
            yield {"images": name, "codec": groups.name}, measure


def points_of_format(form: Format, images: Images) -> list[dict[str, Any]]:
    """One for each quality."""
    return [
        point_of(
            images,
            coded(images, partial(form.encode, quality=quality), opened),
            quality,
            form.header_bytes(quality),
        )
        for quality in form.qualities
    ]


def points_of_tokenizer(
    config: TokenizerRunConfig, budget: Budget, images: Images, shown: Path
) -> list[dict[str, Any]]:
    """Trains it unless it is; one for each quality, and some decoded pictures of the last one."""
    train_tokenizer(config)
    pipeline = TokenizerPipeline.from_pretrained(config.output_dir / "model")
    points = []
    for quality in budget.qualities:
        result = coded(
            images,
            partial(pipeline.compress, quality=quality),
            partial(_decompressed, pipeline),
        )
        _, header_bytes = Codec(pipeline.tokenizer).header(pipeline.compress(to_picture(images[0])))
        points.append(point_of(images, result, quality or 0.0, header_bytes))
        points[-1]["shown_bytes"] = result.num_bytes[:NUM_SHOWN]
        save_png(to_picture(torch.cat([*result.images[:NUM_SHOWN]], 2)), shown)
    return points


def _decompressed(pipeline: TokenizerPipeline, content: bytes) -> Image.Image:
    (picture,) = pipeline.decompress(content)
    assert isinstance(picture, Image.Image)
    return picture
