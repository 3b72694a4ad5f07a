"""What every model shares: a strict config and a checkpoint folder."""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from tokenizer.untrusted import InputError as InputError
from tokenizer.untrusted import StoredTensor, read_header, read_json, shortened


class StrictConfig(BaseModel):
    """An immutable set of parameters that rejects unknown keys and wrong types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*")
    @classmethod
    def _check_path(cls, value: object) -> object:
        if isinstance(value, Path) and "\0" in str(value):
            raise ValueError("must not hold a NUL character")
        return value


UNION_MEMBER = re.compile(r"[\[(]|^constrained-|^(int|float|str|bool|none|path)$")
WRONG_KIND = {"tuple_type", "int_type", "float_type", "none_required", "literal_error"}
MOST_COMPLAINTS = 5


def describe_validation_error(error: ValidationError) -> str:
    """The complaints of pydantic on one line, each led by its field; the first few of many."""
    complaints: dict[str, str] = {}
    entries = error.errors(include_url=False)
    for entry in sorted(entries, key=lambda own: own["type"] in WRONG_KIND):
        length = len(entry["loc"])
        if entry["type"] == "too_short" and any(
            own["loc"][:length] == entry["loc"] != own["loc"] for own in entries
        ):
            continue  # a wrong member, of which pydantic complains, too, is not counted
        # pydantic adds the members of a union to the path of a field.
        path = [str(part) for part in entry["loc"] if not UNION_MEMBER.search(str(part))]
        message = shortened(entry["msg"].removeprefix("Value error, "))  # pydantic's, of our own
        field = shortened(".".join(path))
        is_told = entry["type"] in {"missing", "value_error"}
        given = "" if is_told else f", got {shortened(repr(entry['input']))}"
        # Of a union, the member that was meant: the one whose type is right.
        complaints.setdefault(field, f"{field}: {message}{given}".removeprefix(": "))
    told = list(complaints.values())[:MOST_COMPLAINTS]
    if len(complaints) > len(told):
        told.append(f"and {len(complaints) - len(told)} more")
    return "; ".join(told)


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a temporary file, then moves it to `path` in one step.

    Whatever was at `path` stays whole if writing fails: no space left, say.
    """
    temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
    try:
        temporary.touch()  # with the permissions that new files get here
        permissions = temporary.stat().st_mode
        with naming(path):
            write(temporary)
        temporary.chmod(permissions)  # safetensors makes its files private
        flush_to_disk(temporary)
        temporary.replace(path)
        flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names a file in errors of writing it, where the system does not: if the disk is full, say."""
    try:
        yield
    except SafetensorError as error:  # of the system, in words
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Raises:
        InputError: the file is absent or damaged.
    """
    read_header(path)
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a safetensors file: {error}") from error


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

    def rate_factors(self) -> dict[str, float]:
        """By name, learning rates in units of the run's; 1 where a parameter is not named."""
        return {}

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
    def from_pretrained(cls: type[ModuleT], folder: str | Path) -> ModuleT:
        """Loads a checkpoint onto the CPU, in evaluation mode; it may be a stranger's.

        Its sizes are compared before memory is taken, so that it costs no more than its files.

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
            expected = cls(config).state_dict()  # shapes without memory
        check_fit(expected, stored, str(weights_path))
        module = cls(config)
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
