"""What all pipelines share: models that are moved, saved and handed on together."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from pipelines.hub import upload
from pipelines.model_card import CARD, load_measurements, write_card, write_measurements
from pipelines.model_folders import check_device
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import make_folder
from tokenizer.storage.pretrained import DTYPES, PretrainedModule

PipelineT = TypeVar("PipelineT", bound="SavedPipeline")


class SavedPipeline(ABC):
    """Models in a folder each."""

    _models: ClassVar[tuple[str, ...]]
    """Names of the folders."""
    _measured: ClassVar[tuple[str, ...]]
    """Names of what is measured of them, in evaluation/ of a run."""
    _source: Path | None = None
    """Where they were loaded from."""

    @abstractmethod
    def _parts(self) -> Mapping[str, PretrainedModule[Any]]:
        """The models by the names of their folders."""

    @abstractmethod
    def _sizes(self) -> dict[str, str]:
        """What people ask first, by name."""

    def _placed(self: PipelineT, source: Path, device: str | torch.device | None) -> PipelineT:
        self._source = source
        return self if device is None else self.to(device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the models, a folder each, what was measured of the run, and a model card.

        A README.md that is there already is left as it is: you may have filled it in.

        Raises:
            InputError: `folder` is a file.
        """
        folder = Path(folder)
        make_folder(folder)
        for name, model in self._parts().items():
            model.save_pretrained(folder / name)
        measurements = load_measurements(self._source, self._measured)
        write_measurements(folder, measurements)
        if not (folder / CARD).exists():
            write_card(folder / CARD, type(self).__name__, self._sizes(), measurements)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload of a pipeline",
    ) -> str:
        """Uploads what `save_pretrained` writes, and gives the address.

        Makes the hub's repository if there is none. Its README.md is left as it is; without one it
        gets that of the folder that was loaded, or a new one to fill in.

        Args:
            repo_id: such as "user/model".
            private: whether a new repository is; None is the hub's default.
            token: None takes that of `hf auth login`.
            commit_message: of the commit.

        Raises:
            InputError: the hub cannot be reached, or does not allow it.
        """
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            if self._source is not None and (self._source / CARD).is_file():
                (folder / CARD).write_bytes((self._source / CARD).read_bytes())
            self.save_pretrained(folder)
            return upload(
                folder,
                repo_id,
                self._models,
                is_private=private,
                token=token,
                message=commit_message,
            )

    def to(self: PipelineT, *targets: str | torch.device | torch.dtype) -> PipelineT:
        """Moves the models to a device, casts their weights to a type, or both.

        Raises:
            InputError: no such device, or another type than float32, float16 or bfloat16.
        """
        for target in targets:
            if not isinstance(target, torch.dtype):
                check_device(target)
            elif target not in DTYPES:
                raise InputError(
                    f"dtype must be one of {', '.join(map(str, DTYPES))}, got {target}"
                )
        for model in self._parts().values():
            for target in targets:
                model.to(target)
        return self

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        return next(next(iter(self._parts().values())).parameters())

    def __repr__(self) -> str:
        sizes = {**self._sizes(), "device": str(self.device)}
        entries = "".join(f"\n  {name}: {value}" for name, value in sizes.items())
        return f"{type(self).__name__}({entries}\n)"
