"""What the commands take that show a run on a page: summary, explanation, the page to play with."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from pipelines.data_config import MovedDataConfig
from tokenizer.storage.configs import StrictConfig


class SummaryConfig(MovedDataConfig):
    """Writes a page about a run, finished or under way: images, curves, codes, measurements.

    It needs no other file and no network; its images lie beside it, too. Training and evaluation in
    one process write it as well.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = ("run_dir", "output", "title")
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with tokenizer/ at least."""
    output: Path | None = None
    """The page; None: RUN/summary.html."""
    title: str | None = None
    """Its heading; None takes the name of the folder."""


class ExplainConfig(MovedDataConfig):
    """Writes a page and a JSON file about what the codes of a run mean.

    For each layer the codes by use, with the image parts that choose them and what they draw; what
    each layer adds; what codes tell of the class; nearest images; how codes change when images are
    shifted, blurred, made noisy. Of validation images; the prior is not needed.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "baseline", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = ("run_dir", "baseline", "num_images", "output_dir")
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with tokenizer/ at least."""
    baseline: Path | None = None
    """Another run on the same images, to be measured beside it."""
    num_images: Annotated[int, Field(ge=2)] = 1_000
    """Validation images, chosen at random; at most as many as there are."""
    output_dir: Path | None = None
    """Folder for explanation.html, explanation.json and pictures; None: RUN/explanation."""


class AppConfig(StrictConfig):
    """Shows a page in a browser: samples of a run, pictures reconstructed, redrawn, their codes.

    Needs Gradio: pip install -e ".[app]" in the clone. Nothing leaves this machine, and other
    machines do not reach it unless `host` says so. A run without a prior shows what needs none.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "text_encoder")
    main_options: ClassVar[tuple[str, ...]] = ("run_dir", "text_encoder", "host", "port")
    run_dir: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run or a saved pipeline, or a name of the Hugging Face hub such as user/model."""
    text_encoder: Path | None = None
    """Folder to which the encoder of texts has been moved."""
    host: str = "127.0.0.1"
    """Address to listen at; another one lets others in, without a password."""
    port: Annotated[int, Field(gt=0, lt=2**16)] | None = None
    """None: the first free one from 7860 on."""
