"""Where the fields of an event lie in its JSON: by name, or by a path into nested objects.

On the way of an event: the decoder (events.py) is made of it once. A path is names joined by dots, so
`interest = "product.category.id"` reads {"product": {"category": {"id": "shoes"}}}; a dot that belongs to a name is
written `\\.`. An object on the way that is missing or null counts as a missing field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import msgspec

from stream.errors import ConfigError

PATH_NAMES_MAX = 16
FieldTypes = Mapping[str, tuple[Any, Any]]  # by field: its type and its default, or msgspec.NODEFAULT
_Tree = dict[str, Any]  # by name: the field that lies there, or the next level


def path_names(path: str, field: str) -> tuple[str, ...]:
    """The names of a path.

    Example:
        >>> path_names("product.category.id", "interest"), path_names("user\\\\.id", "user")
        (('product', 'category', 'id'), ('user.id',))

    Raises:
        ConfigError: a name of it is empty.
    """
    names = tuple(name.replace("\\.", ".") for name in re.split(r"(?<!\\)\.", path))
    if not all(names) or len(names) > PATH_NAMES_MAX:
        raise ConfigError(f"events.fields.{field}: {path!r} is no path; write names joined by dots, e.g. product.id")
    return names


def nested(path: str, field: str, value: Any) -> dict[str, Any]:
    """The JSON object that has `value` at a path: what `decoder` reads back."""
    *above, last = path_names(path, field)
    made: dict[str, Any] = {last: value}
    for name in reversed(above):
        made = {name: made}
    return made


def overlay(into: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Lay one JSON object into another, level by level."""
    for name, value in more.items():
        there = into.get(name)
        if isinstance(there, dict) and isinstance(value, dict):
            overlay(there, value)
        else:
            into[name] = value


def decoder(types: FieldTypes, fields: Mapping[str, str]) -> Callable[[bytes], Any]:
    """A function from a record's bytes to an object with one attribute for each field, in the types asked for.

    Args:
        types: the required fields first.
        fields: the path of each field that does not lie under its own name.

    Raises:
        ConfigError: two fields lie at one path, or one path goes through another field.
    """
    paths = {field: path_names(path, field) for field, path in fields.items()}
    tree: _Tree = {}
    for field, names in paths.items():
        _place(tree, names, field)
    for field, (_, default) in types.items():
        if field in paths or (field in tree and default is not msgspec.NODEFAULT):
            continue  # its own name was given to another field: then events do not have it
        paths[field] = (field,)
        _place(tree, paths[field], field)
    flat = msgspec.defstruct("RawEvent", [_declared(n, *t) for n, t in types.items()], gc=False)
    if len(paths) == len(types) and all(len(names) == 1 for names in paths.values()):
        renamed = msgspec.defstruct(
            "RawEvent",
            [_declared(n, *t) for n, t in types.items()],
            rename={field: names[0] for field, names in paths.items()},
            gc=False,
        )
        return msgspec.json.Decoder(renamed).decode
    decode = msgspec.json.Decoder(_level(tree, types)[0]).decode
    getters = [
        _getter(tree, paths[field], default is msgspec.NODEFAULT) if field in paths else _nothing
        for field, (_, default) in types.items()
    ]

    def read(value: bytes) -> Any:
        event = decode(value)
        return flat(*[get(event) for get in getters])

    return read


def _nothing(_event: Any) -> None:
    """The value of a field that events do not have."""


def _declared(name: str, kind: Any, default: Any) -> tuple[str, Any] | tuple[str, Any, Any]:
    return (name, kind) if default is msgspec.NODEFAULT else (name, kind, default)


def _place(tree: _Tree, names: tuple[str, ...], field: str) -> None:
    level = tree
    for name in names[:-1]:
        level = level.setdefault(name, {})
        if isinstance(level, str):
            raise ConfigError(
                f"events.fields.{field}: {'.'.join(names)} goes through {name}, where {level} lies; name another path"
            )
    there = level.get(names[-1])
    if there is not None:
        other = there if isinstance(there, str) else "another field below it"
        raise ConfigError(f"events.fields.{field}: {'.'.join(names)} is taken by {other}; every field needs its own")
    level[names[-1]] = field


def _level(tree: _Tree, types: FieldTypes) -> tuple[Any, bool]:
    """The type of one level of nested objects, and whether anything in it is required."""
    required: list[Any] = []
    optional: list[Any] = []
    for i, (name, below) in enumerate(tree.items()):
        if isinstance(below, str):
            kind, default = types[below]
        else:
            kind, needed = _level(below, types)
            default = msgspec.NODEFAULT if needed else None
            kind = kind if needed else kind | None
        place = msgspec.field(name=name) if default is msgspec.NODEFAULT else msgspec.field(name=name, default=default)
        (required if default is msgspec.NODEFAULT else optional).append((f"f{i}", kind, place))
    return msgspec.defstruct("RawLevel", required + optional, gc=False), bool(required)


def _getter(tree: _Tree, names: tuple[str, ...], required: bool) -> Callable[[Any], Any]:
    """Reads one field from a decoded top level; None where an object on its way is missing."""
    attributes: list[str] = []
    level = tree
    for name in names:
        attributes.append(f"f{list(level).index(name)}")
        level = level[name]
    if required or len(attributes) == 1:
        return attrgetter(".".join(attributes))

    def get(event: Any) -> Any:
        for attribute in attributes:
            if event is None:
                return None
            event = getattr(event, attribute)
        return event

    return get
