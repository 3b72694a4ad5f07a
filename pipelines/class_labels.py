"""Classes by name or by number."""

import difflib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from prior.config import PriorConfig
from tokenizer.storage.errors import InputError
from tokenizer.storage.json_files import shortened

MOST_NAMED = 20


def class_numbers(
    labels: Any, image_indices: Sequence[int], config: PriorConfig
) -> list[int] | None:
    """Class number of each image; without labels the classes come in turn.

    Args:
        labels: a class for all images or one for each, by number or by name.
        image_indices: which images.
        config: of the prior.

    Raises:
        InputError: there is no such class, there are too few or too many labels, or the prior has
            no classes.
    """
    if labels is None:
        if not config.num_classes:
            return None
        return [int(number) % config.num_classes for number in image_indices]
    count = len(image_indices)
    if isinstance(labels, str | Integral) or getattr(labels, "ndim", 1) == 0:
        return [class_number(labels, config)] * count
    try:
        entries = list(labels)
    except TypeError as error:
        raise InputError(f"labels must be numbers or names of classes, got {labels!r}") from error
    if len(entries) != count:
        raise InputError(f"labels must have {count} entries, got {len(entries)}")
    return [class_number(entry, config) for entry in entries]


def class_number(label: Any, config: PriorConfig) -> int:
    """Number of one class; a text that names a class and is a number is the name.

    Raises:
        InputError: there is no such class, or there are several.
    """
    names = config.class_names
    if not config.num_classes:
        raise InputError(f"labels must be None for a prior without classes, got {label!r}")
    if isinstance(label, str):
        found = [number for number, name in enumerate(names) if name == label]
        if len(found) > 1:
            raise InputError(f"labels: {label!r} names several classes; give a number of {found}")
        if found:
            return found[0]
        if not label.isdecimal():
            raise InputError(
                f"labels: no class is called {shortened(label)!r}{_advice(label, names)}"
            )
        label = int(label)
    if getattr(label, "ndim", None) == 0:  # of torch or NumPy
        label = label.item()
    if not isinstance(label, Integral) or isinstance(label, bool):
        raise InputError(f"labels must be numbers or names of classes, got {label!r}")
    if not 0 <= int(label) < config.num_classes:
        raise InputError(f"labels must lie in [0, {config.num_classes}), got {label}")
    return int(label)


def _advice(label: str, names: Sequence[str]) -> str:
    if not names:
        return ": this prior was saved without names; give a number"
    by_lower_case = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(label.lower(), by_lower_case)
    if close:
        nearest = " or ".join(repr(shortened(by_lower_case[name])) for name in close)
        return f"; did you mean {nearest}?"
    return f"; there are {listed(names)}"


def listed(names: Sequence[str]) -> str:
    """Classes on one line with their numbers; the first of many."""
    parts = [f"{number} {shortened(name)}" for number, name in enumerate(names[:MOST_NAMED])]
    if len(names) > MOST_NAMED:
        parts.append(f"and {len(names) - MOST_NAMED} more")
    return ", ".join(parts)
