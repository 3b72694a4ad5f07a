"""What every model shares: a strict config and a checkpoint folder."""

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

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
from tokenizer.storage.files import make_folder, replace_file
from tokenizer.storage.hashes import check_hashes, format_1_hash, hash_entry, weights_hash
from tokenizer.storage.json_files import read_json, shortened
from tokenizer.storage.untrusted import StoredTensor
from tokenizer.storage.weight_files import find_weights, write_weights


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


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Of floating-point weights, as they are saved and loaded."""
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
    """A module built from one config and stored as a folder of two files, or some more if large.

    `config.json` builds the module, `model.safetensors` fills it; nothing else is read. The hashes
    of both stand in the header of the weights: a manifest in a file of its own could not be
    replaced in the same instant.
    """

    config_class: ClassVar[type[StrictConfig]]
    _known_as: tuple[str, tuple[str, ...]] = ("", ())
    """Hash of the weights as loaded; hashes of the same before a cast, and by version 0.1."""
    _former: tuple[str, tuple[str, ...]] = ("", ())
    """`identity_hash`; `identities` of modules whose place this one has taken. Saved with it."""

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

        Of more than 5 GB the weights lie in several files beside an index, as Hugging Face has it.

        Saving again is safe at any moment as long as the config stays the same.

        Raises:
            InputError: `folder` is a file.
        """
        folder = Path(folder)
        make_folder(folder)
        fields = self.config.model_dump(mode="json")
        fields = {"model": type(self).__name__, "format": FORMAT, **fields}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        text = json.dumps(fields, indent=2) + "\n"
        entry = hash_entry(text, weights, self.former_identities())
        write_weights(folder, weights, entry)
        replace_file(folder / "config.json", lambda path: path.write_text(text))

    @classmethod
    def from_pretrained(
        cls: type[ModuleT], folder: str | Path, dtype: torch.dtype | None = None, **parts: Any
    ) -> ModuleT:
        """Loads a checkpoint onto the CPU, in evaluation mode; it may be a stranger's.

        Its sizes are compared before memory is taken, so that it costs no more than its files.

        Args:
            folder: holds `config.json` and `model.safetensors`, or its parts and their index.
            dtype: of the floating-point weights: float32, float16 or bfloat16; None takes them
                as they were saved.
            parts: further arguments of the class: what a config cannot describe; filled alike.

        Raises:
            InputError: `folder` holds no checkpoint, one of another class, one of a later
                version, an invalid config, or weights that do not fit or are not finite; or
                `dtype` is none of these.
        """
        if dtype not in (None, *DTYPES):
            raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if not isinstance(folder, str | Path):
            raise InputError(f"folder must be a path, got {folder!r}")
        path = Path(folder) / "config.json"
        fields, version = _read_fields(path, cls.__name__)
        upgraded = cls.upgrade_config(copy.deepcopy(fields), version)
        config = validate_fields(cls.config_class, upgraded, str(path))
        files = find_weights(Path(folder))
        weights_path = files.source
        if version == 1 and len(files.paths) > 1:
            raise InputError(f"{path}: format must be above 1 beside {weights_path.name}")
        header = cls.upgrade_weights(files.header, version)
        with torch.device("meta"), _few_parameters(2 * len(header) + BUILD_ALLOWANCE, path):
            expected = cls(config, **parts).state_dict()  # shapes without memory
        check_weights(expected, header, str(weights_path))
        saved_dtype = _check_types(expected, header, weights_path)
        module = cls(config, **parts).to(saved_dtype)
        known = []
        if len(files.paths) == 1:
            (weights,) = files.tensors()
            former = check_hashes(path, weights_path, files.metadata, weights_hash(weights))
            module.load_state_dict(cls.upgrade_weights(weights, version))
            if version == 1:
                known = [format_1_hash(cls.__name__, fields, weights)]
        else:  # one in memory at a time
            for weights in files.tensors():
                module.load_state_dict(weights, strict=False)
                del weights  # otherwise it would stay until the next one is read
            former = check_hashes(path, weights_path, files.metadata, module.content_hash())
        _check_finite(module, weights_path)
        if dtype is not None:
            known += [module.content_hash(), module.identity_hash()]
            module.to(dtype)
            _check_finite(module, weights_path, f" in {dtype}")
        if known:
            module._known_as = module.content_hash(), tuple(known)
        if former:
            module._former = module.identity_hash(), former
        return module.eval()

    def content_hash(self) -> str:
        """SHA-256 over the weights, the same before saving and after loading."""
        return weights_hash(self.state_dict())

    def has_hash(self, value: object) -> bool:
        """Whether `value` is the content hash, or the one before loading cast these weights.

        Or the one that version 0.1 gave this checkpoint.
        """
        found = self.content_hash()
        return value == found or (found == self._known_as[0] and value in self._known_as[1])

    def identity_hash(self) -> str:
        """SHA-256 over the weights that other models build on; of most modules all of them."""
        return self.content_hash()

    def identities(self) -> tuple[str, ...]:
        """Hashes by which models that build on this one may know it, `identity_hash` first."""
        content = self.content_hash()
        known = self._known_as[1] if content == self._known_as[0] else ()
        return self.identity_hash(), content, *known, *self.former_identities()

    def take_place_of(self, other: "PretrainedModule[Any]") -> None:
        """What was built on `other` is from here on known to fit, also after saving and loading."""
        identity = self.identity_hash()
        assert identity == other.identity_hash()
        self._former = identity, tuple(dict.fromkeys(other.identities()[1:]))

    def former_identities(self) -> tuple[str, ...]:
        """Those of modules whose place it has taken; of others, none."""
        identity, former = self._former
        return former if former and identity == self.identity_hash() else ()


def _read_fields(path: Path, name: str) -> tuple[dict[str, Any], int]:
    """The config of a module of class `name`, and the number of its format."""
    if not path.is_file():
        raise InputError(f"{path.parent} holds no {name}: there is no {path.name}")
    fields = read_json(path)
    found = fields.pop("model", None) if isinstance(fields, dict) else None
    if found != name:
        raise InputError(f"{path}: model must be {name!r}, got {shortened(repr(found))}")
    return fields, pop_format(fields, str(path))


def _check_types(
    expected: Mapping[str, Tensor], header: Mapping[str, StoredTensor], path: Path
) -> torch.dtype:
    """The type of all floating-point weights: that of the first, if it is one of `DTYPES`.

    Raises:
        InputError: a weight is of another type.
    """
    floating = [
        header[name].dtype for name, tensor in expected.items() if tensor.is_floating_point()
    ]
    saved = next((dtype for dtype in floating[:1] if dtype in DTYPES), torch.float32)
    for name, tensor in expected.items():
        wanted = saved if tensor.is_floating_point() else tensor.dtype
        if header[name].dtype != wanted:
            raise InputError(f"{path}: {name!r} must be of type {wanted}, got {header[name].dtype}")
    return saved


def _check_finite(module: nn.Module, path: Path, where: str = "") -> None:
    for name, tensor in module.state_dict().items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: {name!r} must be finite{where}, got NaN or infinity")
