"""Folders of files that must not change: a manifest holds size and hash of each, and of itself."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizer.storage.errors import InputError
from tokenizer.storage.files import flush_to_disk, replace_file


def write_manifest(path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes `metadata` and what the other files of the folder hold; returns when all is stored.

    Args:
        path: the manifest, in the folder that it describes.
        metadata: JSON values, without the keys "files" and "sha256".
    """
    described = {listed.name: _describe(listed) for listed in sorted(path.parent.iterdir())}
    manifest = {**metadata, "files": described}
    path.write_text(_to_text(manifest), encoding="utf-8")
    for written in [*path.parent.iterdir(), path.parent]:
        flush_to_disk(written)


def replace_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Writes a changed manifest atomically; what it says of the files stays as it is."""
    text = _to_text(manifest)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, whole; the files are not looked at.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} is damaged: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: it is not JSON") from error
    if not isinstance(manifest, dict) or manifest.get("sha256") != _manifest_hash(manifest):
        raise InputError(f"{path} is damaged: it does not match its own hash")
    return manifest


def modification_times(path: Path, manifest: Mapping[str, Any]) -> dict[str, int]:
    """Times in nanoseconds, by name, of the files beside a manifest; they are not read.

    Raises:
        InputError: one of them has not the size that the manifest says.
    """
    times = {}
    for name, described in manifest["files"].items():
        listed = path.with_name(name)
        if not listed.is_file() or (status := listed.stat()).st_size != described["bytes"]:
            raise _mismatch(listed, path)
        times[name] = status.st_mtime_ns
    return times


def check_files(path: Path, manifest: Mapping[str, Any]) -> None:
    """Reads all files beside a manifest, at the speed of SHA-256 (about 2 GB/s on a recent core).

    Raises:
        InputError: one of them is not as the manifest says.
    """
    for name, described in manifest["files"].items():
        listed = path.with_name(name)
        if not listed.is_file() or _describe(listed) != described:
            raise _mismatch(listed, path)


def _mismatch(listed: Path, path: Path) -> InputError:
    return InputError(f"{listed} is damaged: it does not match {path.name}")


def _to_text(manifest: Mapping[str, Any]) -> str:
    return json.dumps({**manifest, "sha256": _manifest_hash(manifest)}, indent=2) + "\n"


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    hashed = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def _describe(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
