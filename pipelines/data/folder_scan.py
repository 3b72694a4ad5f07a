"""What lies in a folder of images, known by names and links; no file is opened.

* Files named as one of SUFFIXES, in any case and any script, are images.
* Left out: hidden files and folders (AppleDouble files among them), folders that systems and
  programs keep for themselves, files with other suffixes, links to folders within the folder and
  folders that were searched already (so no link is followed for ever). Files of conditions beside
  the images are left out as well, and not counted in warnings.
* Refused: links that leave the folder, unless they are to be followed; names that are not UTF-8;
  folders that cannot be read. Training stops at these, or leaves them out where it is told to
  skip what is unreadable.
"""

import os
from pathlib import Path
from typing import NamedTuple

from pipelines.config import FolderRules
from pipelines.data.formats import FORMAT_OF_SUFFIX

SUFFIXES = tuple(FORMAT_OF_SUFFIX)
HIDDEN = "is hidden"
OF_A_SYSTEM = "is what a system or a program keeps: thumbnails, deleted files and the like"
IS_GIF = "is a GIF, which is not read"
OTHER_SUFFIX = f"is not named {', '.join(SUFFIXES)}"
OF_IMAGES = "says something of the images: conditions of a prior"
WITHIN = "is a link to a folder within the folder"
SEARCHED = "leads to a folder that was searched already"
_SUFFIXES_1 = (".png", ".jpg", ".jpeg", ".webp")  # by the rules 1
_SYSTEM_FOLDERS = {
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


VECTOR_FILES = ("conditions.safetensors", "conditions.npy")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
_CONDITION_FILES = {*VECTOR_FILES, "conditions.txt", *METADATA_FILES}


class Finding(NamedTuple):
    """A file or folder, and why it is not simply used."""

    name: str
    """Path below the folder, with forward slashes."""
    reason: str
    """A predicate: "is hidden"."""


class FolderScan(NamedTuple):
    """All files of a folder, sorted by name, and the folders right below it."""

    images: list[str]
    left_out: list[Finding]
    refused: list[Finding]
    followed: list[Finding]
    """Links that leave the folder and are followed."""
    folders: list[str]
    """Those searched right below the folder: its classes, where they hold images."""


def printable(name: object) -> str:
    """A name as it is, or quoted and escaped where it would upset a terminal."""
    return str(name) if str(name).isprintable() else repr(str(name))


def scan_folder(root: Path, follow_links: bool, rules: FolderRules = 2) -> FolderScan:
    """Walks through `root`; `follow_links` is for those that leave it."""
    suffixes = _SUFFIXES_1 if rules == 1 else SUFFIXES
    scan = FolderScan([], [], [], [], [])
    home = os.path.realpath(root)
    searched = {home}
    pending = [("", home)]
    while pending:  # no recursion: folders can be nested deeper than Python's stack
        folder, real_folder = pending.pop()
        try:
            entries = sorted(os.scandir(os.path.join(root, folder)), key=lambda entry: entry.name)
        except OSError as error:
            scan.refused.append(Finding(folder, f"cannot be read: {error.strerror}"))
            continue
        for entry in entries:
            name = folder + entry.name
            is_folder = os.path.isdir(entry)
            if entry.name.startswith("."):
                scan.left_out.append(Finding(name, HIDDEN))
                continue
            if is_folder and rules > 1 and entry.name.lower() in _SYSTEM_FOLDERS:
                scan.left_out.append(Finding(name, OF_A_SYSTEM))
                continue
            if not is_folder and not name.lower().endswith(suffixes):
                reason = IS_GIF if name.lower().endswith(".gif") else OTHER_SUFFIX
                reason = OF_IMAGES if name in _CONDITION_FILES else reason
                scan.left_out.append(Finding(name, reason))
                continue
            is_link = entry.is_symlink()
            # Following every path from its root would be slow in deep folders.
            target = os.path.realpath(entry) if is_link else os.path.join(real_folder, entry.name)
            is_within = target.startswith(home.rstrip(os.sep) + os.sep) or target == home
            if is_link and not is_within:
                link = Finding(name, f"is a link that leaves the folder, to {printable(target)}")
                (scan.followed if follow_links else scan.refused).append(link)
                if not follow_links:
                    continue
            if not is_folder:
                if _is_utf8(name):
                    scan.images.append(name)
                else:
                    scan.refused.append(Finding(name, "is not a UTF-8 name"))
            elif is_link and is_within:
                scan.left_out.append(Finding(name, WITHIN))
            elif target in searched:
                scan.left_out.append(Finding(name, SEARCHED))
            else:
                searched.add(target)
                if not folder:
                    scan.folders.append(name)
                pending.append((f"{name}/", target))
    for findings in scan:
        findings.sort()
    return scan


def folders_without_images(scan: FolderScan) -> list[str]:
    """Folders right below the root that are no classes, since nothing in them is used."""
    used = {name.split("/")[0] for name in scan.images}
    return [name for name in scan.folders if name not in used]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
