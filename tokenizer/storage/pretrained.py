"""What every model shares: a strict config and a checkpoint folder."""

import contextlib
import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import pydantic_core
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tokenizer.storage.configs import (
    FORMAT,
    ConfigT,
    StrictConfig,
    pop_format,
    validate_fields,
)
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import load_safetensors, replace_file
from tokenizer.storage.untrusted import StoredTensor, read_header, read_json, shortened


def check_weights(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor | StoredTensor], source: str
) -> None:
    """Compares names and shapes; either side may hold no values yet.

    Raises:
        InputError: a weight is missing, unknown or of another shape; `source` names them.
    """
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            first = shortened(repr(names[0]))
            raise InputError(f"{source} {problem} {len(names)} weights, the first is {first}")
    for name, tensor in expected.items():
        shape, wanted = tuple(found[name].shape), tuple(tensor.shape)
        if shape != wanted:
            raise InputError(
                f"{source}: {name!r} must have shape {wanted}, got {shortened(str(shape))}"
            )


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Fills `module` strictly; `source` names the weights in the error.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    check_weights(module.state_dict(), weights, source)
    module.load_state_dict(weights)


BUILD_ALLOWANCE = 4_000
"""Parameters that a module may build and drop again, as timm's models do."""


@contextlib.contextmanager
def _few_parameters(most: int, path: Path) -> Iterator[None]:
    """Stops the building on "meta" of a module with more parameters: it would take for ever."""
    numbers = itertools.count(1)

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is not None and parameter.is_meta and next(numbers) > most:
            raise InputError(f"{path} asks for more weights than model.safetensors holds")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


# Not typing.Self: beartype, which checks shapes in the tests, rejects it in functions.
ModuleT = TypeVar("ModuleT", bound="PretrainedModule[Any]")
WeightT = TypeVar("WeightT", Tensor, StoredTensor)


class PretrainedModule(nn.Module, Generic[ConfigT]):
    """A module built from one config and stored as a folder of two files.

    `config.json` builds the module, `model.safetensors` fills it; nothing else is read. The hashes
    of both stand in the header of the weights: a manifest in a file of its own could not be
    replaced in the same instant.
    """

    config_class: ClassVar[type[StrictConfig]]
    _format_1_hash: tuple[str, str] | None = None
    """Hash of the weights that were loaded from format 1, and what version 0.1 called them."""

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def upgrade_config(cls, fields: dict[str, Any], version: int) -> dict[str, Any]:
        """Fields of today's config from those that format `version` saved.

        They are not validated yet: leave alone what is not as that version wrote it.
        """
        return fields

    @classmethod
    def upgrade_weights(cls, weights: dict[str, WeightT], version: int) -> dict[str, WeightT]:
        """Weights under today's names from those that format `version` saved.

        Called with what the header of a file says, too, before memory is taken: look at names,
        types and shapes alone.
        """
        return weights

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare (timm's convention)."""
        return set()

    def parameter_order_of_version_1(self) -> list[str]:
        """Today's names of the parameters in the order in which format 1 numbered them."""
        return [name for name, _ in self.named_parameters()]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, each atomically.

        Saving again is safe at any moment as long as the config stays the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = self.config.model_dump(mode="json")
        fields = {"model": type(self).__name__, "format": FORMAT, **fields}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        text = json.dumps(fields, indent=2) + "\n"
        hashes = {_HASHES: f"{_text_hash(text.encode())} {weights_hash(weights)}"}
        replace_file(
            folder / "model.safetensors",
            lambda path: safetensors.torch.save_file(weights, path, hashes),
        )
        replace_file(folder / "config.json", lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(cls: type[ModuleT], folder: str | Path, **parts: Any) -> ModuleT:
        """Loads a checkpoint onto the CPU, in evaluation mode; it may be a stranger's.

        Its sizes are compared before memory is taken, so that it costs no more than its files.

        Args:
            folder: holds `config.json` and `model.safetensors`.
            parts: further arguments of the class: what a config cannot describe; filled alike.

        Raises:
            InputError: `folder` holds no checkpoint, one of another class, one of a later
                version, an invalid config, or weights that do not fit or are not finite.
        """
        path, weights_path = Path(folder) / "config.json", Path(folder) / "model.safetensors"
        fields, version = _read_fields(path, cls.__name__)
        upgraded = cls.upgrade_config(copy.deepcopy(fields), version)
        config = validate_fields(cls.config_class, upgraded, str(path))
        header = cls.upgrade_weights(read_header(weights_path), version)
        with torch.device("meta"), _few_parameters(2 * len(header) + BUILD_ALLOWANCE, path):
            expected = cls(config, **parts).state_dict()  # shapes without memory
        check_weights(expected, header, str(weights_path))
        for name, tensor in expected.items():
            wanted, dtype = tensor.dtype, header[name].dtype
            if dtype != wanted:
                raise InputError(f"{weights_path}: {name!r} must be of type {wanted}, got {dtype}")
        module = cls(config, **parts)
        weights = load_safetensors(weights_path)
        _check_hashes(path, weights_path, weights)
        module.load_state_dict(cls.upgrade_weights(weights, version))
        for name, tensor in module.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{weights_path}: {name!r} must be finite, got NaN or infinity")
        if version == 1:
            old_hash = _format_1_hash(cls.__name__, fields, weights)
            module._format_1_hash = module.content_hash(), old_hash
        return module.eval()

    def content_hash(self) -> str:
        """SHA-256 over the weights, the same before saving and after loading."""
        return weights_hash(self.state_dict())

    def has_hash(self, value: object) -> bool:
        """Whether `value` is the content hash, or the one that version 0.1 gave this checkpoint."""
        found = self.content_hash()
        return value == found or (found, value) == self._format_1_hash


def _read_fields(path: Path, name: str) -> tuple[dict[str, Any], int]:
    """The config of a module of class `name`, and the number of its format."""
    if not path.is_file():
        raise InputError(f"{path.parent} holds no {name}: there is no {path.name}")
    fields = read_json(path)
    found = fields.pop("model", None) if isinstance(fields, dict) else None
    if found != name:
        raise InputError(f"{path}: model must be {name!r}, got {shortened(repr(found))}")
    return fields, pop_format(fields, str(path))


# A checkpoint's hashes are one entry in the header of its weights: safetensors shuffles several.

_HASHES = "sha256"


def _check_hashes(config_path: Path, weights_path: Path, weights: dict[str, Tensor]) -> None:
    """Compares what was read with what was saved; weights from elsewhere may have no hashes."""
    with safetensors.safe_open(weights_path, "pt") as file:
        header = file.metadata() or {}
    if not header.keys() - {"format"}:
        return
    if _HASHES not in header:
        found = shortened(", ".join(sorted(header)))
        raise InputError(f"{weights_path} must have {_HASHES!r} or no metadata, got {found}")
    config_hash, _, saved_hash = header[_HASHES].partition(" ")
    if saved_hash != weights_hash(weights):
        raise InputError(f"{weights_path} is damaged: it does not match its own hash")
    if config_hash != _text_hash(config_path.read_bytes()):
        raise InputError(f"{config_path} is damaged: it does not match the hash in {weights_path}")


def _text_hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    _digest_weights(digest, weights)
    return digest.hexdigest()


def _format_1_hash(name: str, fields: dict[str, Any], weights: Mapping[str, Tensor]) -> str:
    """The hash of version 0.1, which covered class and config, too."""
    digest = hashlib.sha256(name.encode())
    with contextlib.suppress(pydantic_core.PydanticSerializationError):  # half a character, say
        digest.update(pydantic_core.to_json(fields))
    _digest_weights(digest, weights)
    return digest.hexdigest()


def _digest_weights(digest: "hashlib._Hash", weights: Mapping[str, Tensor]) -> None:
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
