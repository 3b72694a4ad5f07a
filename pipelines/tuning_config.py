"""What `tune_sampling` takes."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from pydantic import NonNegativeInt, PositiveInt

from pipelines.command_configs import ExtractorConfig
from pipelines.data_config import MovedDataConfig


class TuneSamplingConfig(MovedDataConfig):
    """Chooses temperature, guidance and top-p of a run by the distance from its training images.

    Draws images by one setting after another and keeps what gives the least Fréchet distance in
    RUN/prior/model/sampling.json. From then on that is how images are drawn where nothing else is
    said, by all commands and pipelines; measurements say so.
    """

    main_options: ClassVar[tuple[str, ...]] = (
        *("run_dir", "num_images", "extractor.kind", "extractor.weights"),
    )
    inputs: ClassVar[tuple[str, ...]] = ("run_dir", *MovedDataConfig.inputs)
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of the run, with tokenizer/ and prior/."""
    num_images: PositiveInt = 2_000
    """Images on each side of a distance, at most as many as there are training images; some
    twenty settings are tried."""
    extractor: ExtractorConfig = ExtractorConfig()
    """Network for the distances, as of evaluate; better another one than that of evaluate."""
    seed: NonNegativeInt = 1
    """Of the generated images, and of the choice of training images; evaluate has 0."""
    batch_size: PositiveInt = 100
    """Images at a time."""
