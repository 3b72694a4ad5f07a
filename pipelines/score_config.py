"""What the command that scores images takes."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import Field

from pipelines.data_config import MovedDataConfig


class ScoreConfig(MovedDataConfig):
    """Says how unusual the images of FOLDER are to a run: a CSV file, a page, JSON, pictures.

    For each image: bits of its codes, layer by layer, under the prior and the tokenizer's own, a
    bound of its likelihood, reconstruction error, and scores that compare these with validation
    images of the run. Needs either prior. Images are resized and cropped as in training.
    """

    inputs: ClassVar[tuple[str, ...]] = ("run_dir", "folder", *MovedDataConfig.inputs)
    main_options: ClassVar[tuple[str, ...]] = ("run_dir", "folder", "num_reference", "output_dir")
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with prior/ unless the tokenizer has a prior of its own."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder of images, at any depth."""
    num_reference: Annotated[int, Field(ge=2)] = 1_000
    """Validation images of the run that count as usual; at most as many as there are."""
    output_dir: Path | None = None
    """Folder for scores.csv, scores.json, score.html and pictures; None: RUN/scores."""
