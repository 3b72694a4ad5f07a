"""Models of the Hugging Face hub: weights as safetensors and configs as JSON, nothing else."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.model_card import CARD
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened
from tokenizer.storage.weight_files import INDEX

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


def patterns(models: Sequence[str]) -> list[str]:
    """Files of models of these names, and of what was measured of them."""
    files = ("config.json", "model*.safetensors", INDEX, "sampling.json", "marginals.json")
    return [f"{model}/{file}" for model in models for file in files] + ["evaluation/*.json"]


def find_folder(source: str | Path, models: Sequence[str], revision: str | None = None) -> Path:
    """The folder `source`; or a copy of the hub's model of this name, if there is no such folder.

    Raises:
        InputError: the hub cannot be reached, or has no such model; or `source` is no name.
    """
    if not isinstance(source, str | Path):
        raise InputError(f"folder must be a path or the name of a model, got {source!r}")
    folder = Path(source)
    if folder.exists() or not isinstance(source, str) or not _HUB_NAME.fullmatch(source):
        if revision is not None:
            raise InputError(f"revision must be None for a folder, got {revision!r}")
        return folder
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns(models)))
    except Exception as error:  # of the hub's client, and of what it uses to connect
        raise InputError(f"{source} is no folder here, and {_reason(error, revision)}") from error


def upload(
    folder: Path,
    repo_id: str,
    models: Sequence[str],
    *,
    is_private: bool | None,
    token: str | None,
    message: str,
) -> str:
    """Uploads a saved pipeline, as one commit, and gives its address.

    A card that the hub has already is left as it is.

    Raises:
        InputError: the hub cannot be reached, or does not allow it.
    """
    try:
        hub = HfApi(token=token)
        name = hub.create_repo(repo_id, private=is_private, exist_ok=True).repo_id
        card = [] if hub.file_exists(name, CARD) else [CARD]
        commit = hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[*patterns(models), *card],
            commit_message=message,
        )
    except Exception as error:  # as above
        raise InputError(f"{repo_id}: not uploaded: {_reason(error, None)}") from error
    return str(commit.repo_url)


def _reason(error: Exception, revision: str | None) -> str:
    if isinstance(error, OfflineModeIsEnabled) or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "the hub cannot be reached: HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError):
        return "the hub gives this model only to those who have accepted its conditions"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such model, or none that you may see without logging in"
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's model has no revision {revision!r}"
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    text = " ".join(str(cause or error).split())
    return f"the hub cannot be used: {shortened(text or type(error).__name__)}"
