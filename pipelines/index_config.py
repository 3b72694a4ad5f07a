"""What `index-shards` takes."""

from pathlib import Path
from typing import Annotated, ClassVar

import tyro

from tokenizer.storage.configs import StrictConfig


class IndexShardsConfig(StrictConfig):
    """Reads the headers of tar shards once and writes where each image lies.

    The index is what training takes as data.root with data.dataset shards. Shards are plain .tar
    files as webdataset has them, here or at an address that fsspec knows: s3://, gs://, https://.
    """

    main_options: ClassVar[tuple[str, ...]] = ("shards", "output_dir", "label_field")
    shards: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
    """A folder of .tar files, or a pattern with * or {000..146}."""
    output_dir: Path
    """Folder for the index; a new one."""
    image_field: str = ""
    """Ending of the images, such as jpg; needed where a sample has several."""
    label_field: str = ""
    """Ending of the files with the class, such as cls; none: no classes."""
    caption_field: str = ""
    """Ending of the files with the caption, such as txt; none: no captions."""
    skip_unreadable: bool = False
    """Leave out and count what is missing or damaged, where it would stop the command."""
