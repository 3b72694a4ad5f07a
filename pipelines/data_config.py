"""The configuration of the images that a run is trained on."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.configs import StrictConfig, check_path

# Bounds that no sound run reaches.
Count = Annotated[int, Field(gt=0, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
FolderRules = Literal[1, 2]
IN_FOLDERS = ("folder", "files", "datasets", "shards")
"""Sources of which nothing is downloaded to `DataConfig.root`."""
# Saved absolute: a run is evaluated from anywhere. Earlier versions saved what was given.
DataFolder = Annotated[Path, AfterValidator(check_path), AfterValidator(Path.absolute)]
# Its default would not be validated, and is to be shown as it is.
CacheFolder = Annotated[
    Path, PlainSerializer(lambda folder: str(folder.absolute()), str, when_used="json")
]


class ReadingConfig(StrictConfig):
    """How images are read that are decoded anew each time."""

    num_workers: Annotated[int, Field(ge=0, le=256)] = 2
    """Processes that decode training images ahead of each process of a run; 0: a thread."""
    draft: bool = True
    """Decode a large JPEG at 1/2, 1/4 or 1/8 of its size where that is enough; False: with the
    pixels that `folder` gives."""
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least share of an image that a random resized crop keeps in training; 1: the center crop."""
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Brightness, contrast and saturation in training are multiplied by 1 - x to 1 + x."""
    hub_name: str = ""
    """`datasets`: name on the Hugging Face hub, in place of data.root."""
    image_column: str = "image"
    """`datasets`: column of the images."""
    label_column: str | None = None
    """`datasets`: column of the classes."""
    caption_column: str | None = None
    """`datasets`: column of the captions, for a prior with condition.kind text."""
    shard_cache_gb: Annotated[float, Field(ge=0)] = 50.0
    """`shards` elsewhere: how much of them is kept in data.cache_dir."""


class DataConfig(StrictConfig):
    """Where images come from and what shape they take."""

    dataset: Literal[
        "shapes",
        "folder",
        "files",
        "datasets",
        "shards",
        "CIFAR10",
        "CIFAR100",
        "MNIST",
        "FashionMNIST",
        "SVHN",
        "STL10",
        "Flowers102",
    ] = "shapes"
    """`shapes` (procedural), `folder` (your images, decoded once), or a torchvision set by name.
    Decoded each time: `files` (a folder of any size), `datasets` (Hugging Face), `shards` (tar)."""
    root: DataFolder | None = None
    """`folder`, `files`: training images, flat or one folder per class. `datasets`: a folder that
    they saved, or of parquet files. `shards`: the index. torchvision: download folder."""
    validation_root: DataFolder | None = None
    """As `root`, for validation images. None: a share of `root` is held out."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Without `validation_root`: probability of each image to be held out."""
    image_size: Annotated[int, Field(gt=0, le=4096)] = 32
    """Side in pixels: the shorter side is resized to it, then the center is cropped."""
    channels: Literal[1, 2, 3, 4] = 3
    """1 = gray, 2 = gray and alpha, 3 = RGB, 4 = RGBA."""
    white_value: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """Value of a 16-bit file that is white: 4095 for 12-bit data. None: the highest."""
    num_images: Count = 20_000
    """`shapes`: training images."""
    num_validation_images: Count = 2_000
    """`shapes`: validation images."""
    horizontal_flip: bool = False
    """Mirror half of the training images at random."""
    skip_unreadable: bool = False
    """Leave out unreadable files and count them, where they would stop the run."""
    follow_links: bool = False
    """`folder`, `files`: use what links out of the folder lead to; they would stop the run."""
    folder_rules: FolderRules = 2
    """`folder`, `files`: how files are found, sorted and held out; 1 is for runs of version 0.1."""
    reading: ReadingConfig = ReadingConfig()
    cache_dir: CacheFolder = Path("runs/cache")
    """Folder for the decoded images, for lists of files and for shards from elsewhere."""
    seed: Seed = 0
    """Seed of `shapes`, and of the split of a folder."""


class MovedDataConfig(StrictConfig):
    """For commands that open the images of a run."""

    data_root: Path | None = None
    """Where the run's `data.root` has been moved; the images must be the same."""
    data_validation_root: Path | None = None
    """Where the run's `data.validation_root` has been moved."""

    inputs: ClassVar[tuple[str, ...]] = ("data_root", "data_validation_root")


class CodesConfig(StrictConfig):
    """Which codes of its images a prior learns."""

    search: SearchConfig = NO_SEARCH
    """For codes that draw the images better than the nearest ones, found once before training."""
