"""Which files are read, and which are written for them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.coding.layout import SUFFIX
from pipelines.data.folder_listing import find_images
from pipelines.data.folder_scan import printable
from tokenizer.storage.errors import InputError

Within = Callable[[Path], Sequence[str]]
"""Names of the files below a folder."""


def pictures_within(folder: Path) -> Sequence[str]:
    """Image files, found as in training.

    Raises:
        InputError: there are none, or one is refused.
    """
    return find_images(folder, "files", follow_links=True).images


def compressed_within(folder: Path) -> Sequence[str]:
    """Files that `compress` wrote, by their suffix.

    Raises:
        InputError: there are none.
    """
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob(f"*{SUFFIX}"))]
    if not names:
        raise InputError(f"files: there are no {SUFFIX} files in {printable(folder)}")
    return names


def planned(
    files: Sequence[Path], within: Within, output_dir: Path, suffix: str
) -> dict[Path, Path]:
    """Where to write what becomes of each file: under its name below the folder that was given.

    Raises:
        InputError: a file is missing, would be overwritten, or two would become one.
    """
    sources: dict[Path, Path] = {}
    for given in files:
        if not given.exists():
            raise InputError(f"files: {printable(given)} does not exist")
        folder, names = (given, within(given)) if given.is_dir() else (given.parent, [given.name])
        for name in names:
            output = (output_dir / name).with_suffix(suffix)
            if output.exists():
                raise InputError(f"output_dir: {printable(output)} exists already")
            if output in sources:
                first, second = printable(sources[output]), printable(folder / name)
                raise InputError(f"files: {first} and {second} would both become {output.name}")
            sources[output] = folder / name
    return {source: output for output, source in sources.items()}
