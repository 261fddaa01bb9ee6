"""Reads YAML files: what they say and on which line, by the rules of YAML 1.2.

YAML 1.1, which PyYAML reads by itself, takes `2e-4` for a string, `yes` for true and `1:30` for 90. Here numbers are
numbers, only `true` and `false` are booleans, and a key that is there twice is an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from surogate.errors import ConfigError, Violation

MAX_NODES = 100_000
"""Most values in a file, aliases expanded."""
COLLECTION_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
SCALAR_TAGS = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Document:
    """A configuration file as it was read.

    Attributes:
        path: The file's path as it was given.
        data: What it says.
        places: For each dotted key (`env.0.args.n`), where it was set: `train.yaml:12`, or `--set train.x=1`.
    """

    path: str
    data: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """Where a key was set, or the nearest thing above it that is in the file; else the file."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key.rpartition(".")[0]
        return self.path


class _Loader(yaml.SafeLoader):
    """Scalars by the core schema of YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 -- typed by the base class

    def integer(self, node: yaml.ScalarNode) -> int:
        """An integer, decimal also with leading zeros."""
        text = str(node.value).replace("_", "")
        base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
        return int(text, base)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


class _Builder:
    """Makes data of nodes, and notes the line of each key."""

    def __init__(self, name: str, loader: _Loader) -> None:
        self.name = name
        self.loader = loader
        self.places: dict[str, str] = {}
        self.nodes = 0
        self.open: set[int] = set()

    def fail(self, node: yaml.Node, message: str) -> ConfigError:
        return file_error(f"{self.name}:{node.start_mark.line + 1}", message)

    def build(self, node: yaml.Node, path: str) -> Any:
        """The value of a node."""
        self.nodes += 1
        if self.nodes > MAX_NODES or id(node) in self.open:
            raise self.fail(node, "is too large, or contains itself")
        self.open.add(id(node))
        try:
            return self._value(node, path)
        finally:
            self.open.discard(id(node))

    def _value(self, node: yaml.Node, path: str) -> Any:
        known = SCALAR_TAGS if isinstance(node, yaml.ScalarNode) else COLLECTION_TAGS
        if node.tag not in known:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise self.fail(node, f"{_named(path)}the tag {tag} means nothing here: remove it")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, f"{path}.{index}") for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _scalar(self, node: yaml.Node, path: str) -> Any:
        try:
            return self.loader.construct_object(node)
        except (ValueError, KeyError) as error:  # a tag that does not fit, or thousands of digits
            kind = node.tag.rpartition(":")[2]
            text = node.value if len(node.value) < 40 else f"{node.value[:40]}…"
            raise self.fail(node, f"{_named(path)}cannot be read as {kind}: {text!r}") from error

    def _item(self, node: yaml.Node, path: str) -> Any:
        self.places[path] = f"{self.name}:{node.start_mark.line + 1}"
        return self.build(node, path)

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == MERGE_TAG:
                continue
            if key.tag != "tag:yaml.org,2002:str":
                got = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise self.fail(key, f"keys must be strings, got {got}")
            if key.value in lines:
                raise self.fail(key, f"{key.value}: is there twice, first on line {lines[key.value]}")
            lines[key.value] = key.start_mark.line + 1
        self.loader.flatten_mapping(node)
        data: dict[str, Any] = {}
        for key, value in node.value:
            place = f"{path}.{key.value}" if path else str(key.value)
            self.places[place] = f"{self.name}:{key.start_mark.line + 1}"
            data[str(key.value)] = self.build(value, place)
        return data


def _named(path: str) -> str:
    return f"{path}: " if path else ""


def file_error(place: str, message: str) -> ConfigError:
    """The error about a file, or a place in it."""
    return ConfigError(f"{place}: {message}", violations=[Violation("", f"{place}: {message}")])


def load_yaml(path: str | Path) -> Document:
    """Reads a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not YAML, or not a mapping; the message has `file:line`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise file_error(str(path), "no such file") from error
    except IsADirectoryError as error:
        raise file_error(str(path), "is a folder, not a file") from error
    except UnicodeDecodeError as error:
        raise file_error(str(path), "is not UTF-8 text") from error
    except OSError as error:
        raise file_error(str(path), f"cannot be read: {error.strerror}") from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> Document:
    """Reads YAML text; `name` stands for the file in messages. Raises ConfigError as `load_yaml` does."""
    builder, data = _parse(text, name)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise file_error(f"{name}:1", "must be a mapping (lines of `key: value`)")
    return Document(name, data, builder.places)


def parse_value(text: str) -> Any:
    """A value as YAML spells it. Raises ConfigError."""
    return _parse(text, "value")[1]


def _parse(text: str, name: str) -> tuple[_Builder, Any]:
    try:
        loader = _Loader(text)
        builder = _Builder(name, loader)
        node = loader.get_single_node()
        return builder, None if node is None else builder.build(node, "")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise file_error(place, f"is not YAML: {error.problem or error.context}{hint}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character U+{error.character:04X} must not be in a text file"
        raise file_error(f"{name}:{line}", f"is not YAML: {what}") from error
    except yaml.YAMLError as error:
        raise file_error(name, f"is not YAML: {error}") from error
    except RecursionError as error:
        raise file_error(name, "is nested too deeply") from error
