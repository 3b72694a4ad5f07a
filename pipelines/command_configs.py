"""What the commands beside training take: parameters that are read before anything is done."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic import model_validator as validates

from pipelines.data_config import DataConfig, MovedDataConfig
from pipelines.sampling_config import SamplingConfig
from tokenizer.fields import Factor
from tokenizer.search_config import NO_SEARCH, SearchConfig
from tokenizer.storage.configs import StrictConfig


class ExtractorConfig(StrictConfig):
    """The network whose features are compared."""

    kind: Literal["inception", "timm", "none"] = "inception"
    """`inception` gives FID; `timm` distances under the model's own name; `none` no distances."""
    weights: Path | None = None
    """Inception: the .pth file; timm: a .safetensors file. None: the library's own download."""
    model: str = "mobilenetv2_100"
    """timm only: name of the model."""
    pad_type: Literal["", "same"] = ""
    """timm only: padding of the convolutions; "same" for weights converted from TensorFlow."""
    image_size: PositiveInt = 96
    """timm only: side in pixels to which images are resized (bicubic, antialiased)."""
    mean: tuple[float, float, float] | None = None
    """timm only: channel means of the inputs on [0, 1]; None takes those of timm's entry."""
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """timm only: channel deviations on [0, 1]; None takes those of timm's entry."""

    @validates(mode="after")
    def _check(self) -> "ExtractorConfig":
        if self.kind != "timm":
            for name in ("model", "pad_type", "image_size", "mean", "std"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise ValueError(f"{name} applies to kind 'timm' alone, got {value!r}")
        if self.kind == "none" and self.weights is not None:
            raise ValueError(f"weights must be None for kind 'none', got {self.weights}")
        return self


class EvaluationConfig(StrictConfig):
    """What is compared."""

    num_images: PositiveInt = 10_000
    """Images on each side of a distance, at most as many as the data set has."""
    reference: Literal["train", "validation"] | Path = "train"
    """What generated images are compared with: a split, a folder of images, or the statistics that
    other programs save (.npz or .pt). Reconstructed are the images of such a folder, or those for
    validation, which are also what the distance is from unless statistics are given."""
    labels: Literal["as_reference", "in_turn"] = "as_reference"
    """Classes of the generated images: in the shares of the reference images, or equal ones."""
    sampling: SamplingConfig = SamplingConfig()
    seed: NonNegativeInt = 0
    """Of the generated images and of the choice of reference images."""
    batch_size: PositiveInt = 100
    """Images at a time."""
    search: SearchConfig = NO_SEARCH
    """For the codes of reconstructions."""


class EvaluateConfig(EvaluationConfig, MovedDataConfig):
    """Measures the reconstructions and the generations of a run, or compares two folders of images.

    Prints a table and writes RUN/evaluation/*.json, each number with its protocol. Stopped, the
    same command goes on behind the images whose features are finished.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "folders", "reference", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = (
        "run_dir",
        "folders",
        "image_size",
        "what",
        "num_images",
        "reference",
        "extractor.kind",
        "extractor.weights",
        "sampling.temperature",
        "sampling.guidance_scale",
        "output_dir",
    )
    run_dir: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """Folder of the run, with tokenizer/ and prior/."""
    folders: tuple[Path, Path] | None = None
    """In place of a run, images and what they are compared with: a folder, or statistics."""
    image_size: Annotated[int, Field(gt=0, le=4096)] | None = None
    """With `folders`: side in pixels to which images of another size are resized and cropped."""
    what: Literal["all", "reconstruction", "generation"] = "all"
    """What is measured."""
    extractor: ExtractorConfig = ExtractorConfig()
    """Network for the distances; Inception gives FID."""
    output_dir: Path | None = None
    """Folder for the JSON files; None: RUN/evaluation. With `folders` none are written then."""
    keep_features: bool = False
    """Keep features in OUTPUT_DIR/features, where evaluations with this option find those of the
    same images; otherwise they are deleted when the results are written."""

    @validates(mode="after")
    def _check(self) -> "EvaluateConfig":
        if (self.run_dir is None) == (self.folders is None):
            raise ValueError("either RUN or folders must be given, and not both")
        if (self.folders is None) != (self.image_size is None):
            raise ValueError("image_size must be given with folders, and only there")
        unused = ("what", "labels", "reference", "sampling", "search", *MovedDataConfig.inputs)
        for name in unused if self.folders else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} applies to a run alone, got {getattr(self, name)!r}")
        if self.keep_features and self.folders and self.output_dir is None:
            raise ValueError("keep_features needs output_dir where folders are compared")
        if self.extractor.kind == "none" and self.what != "reconstruction":
            raise ValueError("extractor.kind 'none' leaves nothing but what = 'reconstruction'")
        return self


class GenerateConfig(StrictConfig):
    """Generates images as OUTPUT_DIR/000000.png and so on, and contact_sheet.png of the first.

    labels.json says the class of each image, metadata.jsonl another condition. Image i depends on
    the seed, i and its label alone: not on batch size or processes. The same command goes on where
    it was stopped.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "text_encoder")
    main_options: ClassVar[tuple[str, ...]] = (
        "run_dir",
        "output_dir",
        "num_images",
        "labels",
        "condition",
        "seed",
        "batch_size",
        "sampling.temperature",
        "sampling.top_k",
        "sampling.top_p",
        "sampling.guidance_scale",
    )
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, or of a saved pipeline."""
    output_dir: Path
    """Folder for the images; it must hold none, or some of the same settings."""
    num_images: PositiveInt = 64
    """How many."""
    labels: tuple[str | NonNegativeInt, ...] = ()
    """Classes by name or number, taken in turn; none given: all classes in turn."""
    condition: tuple[str, ...] = ()
    """In turn, by what the prior was trained on: texts; attributes as name=value,name=value, of
    which some may be left out; a file of vectors or tokens, then numbers of its rows, or none for
    all. None given: images without condition."""
    text_encoder: Path | None = None
    """Folder to which the encoder of texts has been moved."""
    seed: NonNegativeInt = 0
    """Of all random numbers."""
    batch_size: PositiveInt = 64
    """Images at a time."""
    sampling: SamplingConfig = SamplingConfig()


class ReconstructConfig(StrictConfig):
    """Encodes images and decodes them again, from all layers or the first ones.

    Images are found, resized and cropped as in training; links are followed. OUTPUT_DIR gets the
    reconstructions under the names of the originals, in the same folders, and a comparison.png of
    the first pairs.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "images")
    main_options: ClassVar[tuple[str, ...]] = (
        *("run_dir", "images", "output_dir", "num_layers", "image_size", "search.candidates"),
    )
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    images: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
    """An image file, or a folder of them, with or without class folders."""
    output_dir: Path
    """Folder for the reconstructions; nothing in it is overwritten."""
    num_layers: PositiveInt | None = None
    """Decode from so many layers only, counted from the coarsest."""
    image_size: PositiveInt | None = None
    """Side in pixels; None takes that of the training images."""
    search: SearchConfig = NO_SEARCH
    """For codes that draw the images better."""


class CompressConfig(MovedDataConfig):
    """Writes pictures as files of a few bytes: the codes of a tokenizer, which has to be kept.

    Pictures keep their size. OUTPUT_DIR gets the files under the names of the pictures, in the same
    folders, with the suffix .hq; docs/files.md has the format.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "files", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = (
        *("run_dir", "files", "output_dir", "quality", "model"),
    )
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    files: Annotated[
        tuple[Path, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="FILES")
    ]
    """Image files, and folders of them."""
    output_dir: Path
    """Folder for the compressed files; nothing in it is overwritten."""
    quality: Factor | None = None
    """The higher, the fewer bits: weight of bits against errors in a search for codes, which takes
    time. None or 0: no search. Needs a tokenizer with a prior of its own."""
    model: Literal["own", "marginals", "counts", "prior"] | None = None
    """Where the probabilities of codes come from: the tokenizer's own prior; counts of the codes of
    training images, made once and kept beside the tokenizer; counts of the codes so far; or the
    prior of stage two, for pictures of its size alone, slow, in the fewest bits. None: the first of
    the former three that there is."""


class DecompressConfig(StrictConfig):
    """Writes the pictures of files that `hqvae compress` made with the same tokenizer.

    OUTPUT_DIR gets them as PNG under the names of the files, in the same folders. Of a file that
    was cut behind a layer it is a picture of the layers that are there.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "files")
    main_options: ClassVar[tuple[str, ...]] = ("run_dir", "files", "output_dir")
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    files: Annotated[
        tuple[Path, ...], Field(min_length=1), tyro.conf.Positional, tyro.conf.arg(metavar="FILES")
    ]
    """Compressed files, and folders of them."""
    output_dir: Path
    """Folder for the pictures; nothing in it is overwritten."""


class CheckDataConfig(StrictConfig):
    """Reads every file of FOLDER as training would and says what becomes of it.

    Files are used, converted (used, after more than resizing), skipped, or refused: training
    stops at the first of these. Prints a summary, writes all files that are not simply used to
    OUTPUT, and ends with exit status 2 where training would stop. --verify, with FOLDER or alone,
    compares all that CACHE_DIR holds with its hashes, and ends so where something is damaged.
    """

    inputs: ClassVar[tuple[str, ...]] = ("folder",)
    main_options: ClassVar[tuple[str, ...]] = (
        *("folder", "image_size", "channels", "white_value", "skip_unreadable", "output", "verify"),
    )
    folder: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of images, as data.root."""
    image_size: Annotated[int, Field(gt=0, le=4096)] = 32
    """As data.image_size."""
    channels: Literal[1, 2, 3, 4] = 3
    """As data.channels."""
    white_value: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """As data.white_value."""
    skip_unreadable: bool = False
    """As data.skip_unreadable: what would be refused is skipped."""
    follow_links: bool = False
    """As data.follow_links: links out of the folder are used."""
    output: Path = Path("runs/data_report.json")
    """The report, replaced if it exists."""
    verify: bool = False
    """Read all of the cache, of which training compares sizes and modification times only."""
    cache_dir: Path = DataConfig.model_fields["cache_dir"].default
    """`verify`: as data.cache_dir, or RUN/prior/codes."""


class QuickstartConfig(StrictConfig):
    """Trains both stages on the images of FOLDER in the given minutes, samples and measures.

    FOLDER holds images, or a folder of them for each class; it may hold train/ and val/ of these.
    Image size and numbers of steps are those that fit, timed on this machine first; RUN_DIR/plan
    holds them, to be changed and trained by the other commands. Ends with RUN_DIR/summary.html.
    Stopped, it goes on from where it was when it is started again.
    """

    inputs: ClassVar[tuple[str, ...]] = ("folder",)
    main_options: ClassVar[tuple[str, ...]] = ("folder", "minutes", "run_dir")
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images."""
    minutes: Annotated[float, Field(gt=0, le=1e6)] = 30.0
    """That all of it may take."""
    run_dir: Path | None = None
    """Folder of the run; None: runs/ and the name of FOLDER."""


class DemoConfig(StrictConfig):
    """Trains an SQ-VAE-2 and a class-conditional prior on procedural shapes, samples, evaluates.

    Takes at most six minutes on two CPU cores and leaves RUN_DIR/summary.html. Stopped, it goes on
    from where it was when it is started again.
    """

    main_options: ClassVar[tuple[str, ...]] = ("run_dir",)
    run_dir: Path = Path("runs/demo")
    """Folder of the run."""
