"""What every model shares: a strict config and a checkpoint folder."""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tokenizer.storage.configs import StrictConfig, describe_validation_error
from tokenizer.storage.errors import InputError
from tokenizer.storage.files import load_safetensors, replace_file
from tokenizer.storage.untrusted import StoredTensor, read_header, read_json, shortened


def check_fit(
    expected: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], source: str
) -> None:
    """Compares weights by name, type and shape before any is read; `expected` may be on "meta".

    Raises:
        InputError: a weight is missing, unknown, of another type or of another shape.
    """
    _check_names(expected, stored, source)
    for name, tensor in expected.items():
        for quality, wanted, found in (
            ("have shape", tuple(tensor.shape), stored[name].shape),
            ("be of type", tensor.dtype, stored[name].dtype),
        ):
            if found != wanted:
                raise InputError(f"{source}: {name!r} must {quality} {wanted}, got {found}")


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Fills `module` strictly; `source` names the weights in the error.

    Raises:
        InputError: a weight is missing, unknown or of another shape.
    """
    expected = module.state_dict()
    _check_names(expected, weights, source)
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{source}: {name!r} must have shape {tuple(expected[name].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    module.load_state_dict(weights)


def _check_names(expected: Mapping[str, object], found: Mapping[str, object], source: str) -> None:
    for problem, names in (
        ("lacks", sorted(expected.keys() - found.keys())),
        ("has unknown", sorted(found.keys() - expected.keys())),
    ):
        if names:
            first = shortened(repr(names[0]))
            raise InputError(f"{source} {problem} {len(names)} weights, the first is {first}")


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


ConfigT = TypeVar("ConfigT", bound=StrictConfig)
# Not typing.Self: beartype, which checks shapes in the tests, rejects it in functions.
ModuleT = TypeVar("ModuleT", bound="PretrainedModule[Any]")


class PretrainedModule(nn.Module, Generic[ConfigT]):
    """A module built from one config and stored as a folder of two files.

    `config.json` builds the module, `model.safetensors` fills it; nothing else is read. The hashes
    of both stand in the header of the weights: a manifest in a file of its own could not be
    replaced in the same instant.
    """

    config_class: ClassVar[type[StrictConfig]]

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config = config

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should spare (timm's convention)."""
        return set()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into `folder`, each in one step.

        Saving again is safe at any moment as long as the config stays the same.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        fields = {"model": type(self).__name__, **self.config.model_dump(mode="json")}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        text = json.dumps(fields, indent=2) + "\n"
        hashes = {_HASHES: f"{_text_hash(text.encode())} {_weights_hash(weights)}"}
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
            folder: as `save_pretrained` left it.
            parts: further arguments of the class: what a config cannot describe.

        Raises:
            InputError: `folder` holds no checkpoint, one of another class, an invalid config, or
                weights that do not fit or are not finite.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise InputError(f"{folder} holds no {cls.__name__}: there is no config.json")
        fields = read_json(path)
        found = fields.pop("model", None) if isinstance(fields, dict) else None
        if found != cls.__name__:
            raise InputError(
                f"{path}: model must be {cls.__name__!r}, got {shortened(repr(found))}"
            )
        try:
            config = cls.config_class.model_validate_json(json.dumps(fields))
        except ValidationError as error:
            raise InputError(f"{path}: {describe_validation_error(error)}") from error
        weights_path = folder / "model.safetensors"
        stored = read_header(weights_path)
        with torch.device("meta"), _few_parameters(2 * len(stored) + BUILD_ALLOWANCE, path):
            expected = cls(config, **parts).state_dict()  # shapes without memory
        check_fit(expected, stored, str(weights_path))
        module = cls(config, **parts)
        weights = load_safetensors(weights_path)
        _check_hashes(path, weights_path, weights)
        load_weights(module, weights, str(weights_path))
        for name, tensor in module.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise InputError(f"{weights_path}: {name!r} must be finite, got NaN or infinity")
        return module.eval()

    def content_hash(self) -> str:
        """SHA-256 over class, config and weights, the same before saving and after loading."""
        digest = hashlib.sha256(type(self).__name__.encode())
        digest.update(self.config.model_dump_json().encode())
        _digest_weights(digest, self.state_dict())
        return digest.hexdigest()


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
    config_hash, _, weights_hash = header[_HASHES].partition(" ")
    if weights_hash != _weights_hash(weights):
        raise InputError(f"{weights_path} is damaged: it does not match its own hash")
    if config_hash != _text_hash(config_path.read_bytes()):
        raise InputError(f"{config_path} is damaged: it does not match the hash in {weights_path}")


def _text_hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def _weights_hash(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    _digest_weights(digest, weights)
    return digest.hexdigest()


def _digest_weights(digest: "hashlib._Hash", weights: dict[str, Tensor]) -> None:
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(flat.numpy().tobytes())
