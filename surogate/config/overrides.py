"""`--set key=value`: changes to a configuration from the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from surogate.config.base import nearest
from surogate.config.load import Document, parse_value
from surogate.errors import ConfigError, Violation


def split_override(override: str) -> tuple[list[str], Any]:
    """`a.b.0=[1, 2]` → (["a", "b", "0"], [1, 2]). Raises ConfigError if it is not of the form `key=value`."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise override_error(override, "must be of the form key=value, such as learning_rate=1e-4")
    try:
        return parts, parse_value(text)
    except ConfigError as error:
        raise override_error(override, f"its value is not YAML: {error}") from error


def override_error(override: str, message: str) -> ConfigError:
    """The error about an override."""
    return ConfigError.of([Violation(override.partition("=")[0].strip(), f"--set {override}: {message}")])


def apply_overrides(document: Document, overrides: Sequence[str]) -> Document:
    """A document with `a.b=c` applied in order; values are YAML, parts of a key that are numbers index lists.

    Blocks that are missing on the way are made. Raises ConfigError for a malformed override or an index out of range.
    """
    data, places = copy.deepcopy(document.data), dict(document.places)
    for override in overrides:
        parts, value = split_override(override)
        _assign(data, parts, value, override)
        _place(places, parts, override)
    return Document(document.path, data, places)


def apply_job_overrides(documents: Mapping[str, Document], overrides: Sequence[str]) -> dict[str, Document]:
    """Overrides of several files: `train.learning_rate=1e-4` goes to the document named `train`."""
    sorted_out: dict[str, list[str]] = {name: [] for name in documents}
    for override in overrides:
        name, dot, rest = override.partition(".")
        if not dot or name not in documents or "=" in name:
            prefixes = ", ".join(f"{known}." for known in documents)
            hint = nearest(name, documents)
            raise override_error(override, f"must begin with one of {prefixes} to say which file it changes{hint}")
        sorted_out[name].append(rest)
    return {name: _prefixed(apply_overrides(document, sorted_out[name]), name) for name, document in documents.items()}


def _prefixed(document: Document, name: str) -> Document:
    """The document with its overrides spelled as they were given, with the name in front."""
    places = {key: place.replace("--set ", f"--set {name}.", 1) for key, place in document.places.items()}
    return Document(document.path, document.data, places)


def _place(places: dict[str, str], parts: list[str], override: str) -> None:
    key = ".".join(parts)
    for known in [known for known in places if known.startswith(f"{key}.")]:
        del places[known]
    for end in range(1, len(parts)):
        places.setdefault(".".join(parts[:end]), f"--set {override}")
    places[key] = f"--set {override}"


def _assign(data: Any, parts: list[str], value: Any, override: str) -> None:
    for part in parts[:-1]:
        data = _step(data, part, override)
    last = parts[-1]
    if isinstance(data, list):
        data[_index(data, last, override)] = value
    else:
        data[last] = value


def _step(data: Any, part: str, override: str) -> Any:
    if isinstance(data, list):
        inner = data[_index(data, part, override)]
    else:
        if data.get(part) is None:
            data[part] = {}
        inner = data[part]
    if not isinstance(inner, dict | list):
        raise override_error(override, f"`{part}` is {inner!r}, which has no keys")
    return inner


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdecimal() or int(part) >= len(items):
        raise override_error(
            override, f"`{part}` must be an index from 0 to {len(items) - 1} of a list of {len(items)}"
        )
    return int(part)
