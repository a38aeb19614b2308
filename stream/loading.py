"""Reading the settings: config.toml, then `--set`, with the origin of every value.

An unknown key, a wrong type and a contradiction are a ConfigError that names the key, says where it stands and what to
do; an unknown key suggests the nearest one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import msgspec
from msgspec import Struct

from stream.config import SECRET_NAME, Config, Secret, is_reference, topic_names, values
from stream.errors import ConfigError
from stream.reference import every_setting, unwrap

CONFIG_BYTES_MAX = 1_000_000
RETENTION_H_MIN = 0.1
KAFKA_DEFAULTS: Mapping[str, object] = {"bootstrap_servers": "127.0.0.1:9092"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Loaded:
    """The effective settings and where each value comes from: `default`, the file's name or `--set`."""

    config: Config
    origins: Mapping[str, str]


def load(path: Path | None = None, sets: Sequence[str] = ()) -> Loaded:
    """Read the file (None: no file), lay `--set` over it, and check the whole.

    Args:
        path: a TOML file.
        sets: assignments `a.b=value`; the value is TOML, or else a plain string.

    Raises:
        ConfigError: says which key is wrong, where it stands and what to do.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if path is not None:
        tree = _read(path)
        _check_keys(tree, Config, "", str(path))
        origins.update(dict.fromkeys(_leaves(tree), str(path)))
    for assignment in sets:
        key = _assign(tree, assignment)
        _check_keys(tree, Config, "", f"--set {key}")
        origins[key] = "--set"
    for name, value in KAFKA_DEFAULTS.items():
        kafka = tree.setdefault("kafka", {})
        if isinstance(kafka, dict):
            kafka.setdefault(name, value)
    try:
        config = msgspec.convert(_hide(tree), Config, dec_hook=_secret)
    except msgspec.ValidationError as error:
        raise _refused(error, origins) from None
    _check_sense(config)
    for key, _value in values(config):
        origins.setdefault(key, "default")
    return Loaded(config=config, origins=origins)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(CONFIG_BYTES_MAX + 1)
        if len(content) > CONFIG_BYTES_MAX:
            raise ConfigError(f"{path} is over {CONFIG_BYTES_MAX} bytes; that is no config file")
        return tomllib.loads(content.decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; `driftline config --template` writes one") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _assign(tree: dict[str, Any], assignment: str) -> str:
    """Lay `a.b=value` into the tree; returns the key."""
    key, equals, text = assignment.partition("=")
    key = key.strip()
    names = key.split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {key!r} is no assignment; write --set section.key=value")
    value = _typed(key, text)
    table = tree
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {key}: {name} is a value, not a section")
    table[names[-1]] = value
    return key


def _typed(key: str, text: str) -> object:
    """The value of an assignment: TOML where it is some, but plain text for a key that wants text."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    setting = next((s for s in every_setting() if s.key == key), None)
    wants_text = SECRET_NAME.search(key) if setting is None else setting.type in ("text", "secret text")
    return text if wants_text and not isinstance(value, str) else value


def _check_keys(tree: Mapping[str, Any], struct: type[Struct], prefix: str, where: str) -> None:
    hints = get_type_hints(struct, include_extras=True)
    known = {name: unwrap(hints[name])[0] for name in struct.__struct_fields__}
    for name, value in tree.items():
        kind = known.get(name)
        if kind is None:
            raise ConfigError(
                f"{where}: there is no setting {prefix}{name}; {_nearest(prefix + name, name, prefix, known)}"
            )
        if isinstance(kind, type) and issubclass(kind, Struct):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {prefix}{name} is a section, not a value; write [{prefix}{name}]")
            _check_keys(value, kind, f"{prefix}{name}.", where)


def _nearest(key: str, name: str, prefix: str, known: Mapping[str, object]) -> str:
    """What an unknown key may have meant: a sibling with a similar name, else the nearest key of all."""
    siblings = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if siblings:
        return f"did you mean {prefix}{siblings[0]}?"
    every = [setting.key for setting in every_setting()]
    same_name = [k for k in every if k.rpartition(".")[2] == name]
    others = same_name or difflib.get_close_matches(key, every, n=1, cutoff=0.5)
    return f"did you mean {others[0]}?" if others else "`driftline config` lists all settings"


def _hide(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with the secrets of `[kafka]` wrapped."""
    kafka = tree.get("kafka")
    if not isinstance(kafka, dict):
        return dict(tree)
    wrapped = {
        key: Secret(value) if isinstance(value, str) and (is_reference(value) or SECRET_NAME.search(key)) else value
        for key, value in kafka.items()
    }
    return {**tree, "kafka": wrapped}


def _secret(kind: type, value: object) -> object:
    if kind is Secret and isinstance(value, str) and value:
        return Secret(value)
    raise ValueError("expected a text that is not empty")


def _refused(error: msgspec.ValidationError, origins: Mapping[str, str]) -> ConfigError:
    """A type or range error, said with its key. A secret's value never stands in msgspec's message."""
    message, _, path = str(error).partition(" - at `$.")
    key = re.sub(r"\[.*?\]", "", path.rstrip("`"))
    meaning = next((s.description for s in every_setting() if s.key == key), "")
    where = origins.get(key, "")
    place = f"{where}: " if where else ""
    return ConfigError(f"{place}{key}: {message[:1].lower()}{message[1:]}" + (f" ({meaning})" if meaning else ""))


def _check_sense(config: Config) -> None:
    """What no single key can say."""
    worker = config.worker
    if worker.batch_wait_s + worker.poll_timeout_s > worker.transaction_timeout_s / 3:
        raise ConfigError(
            "worker.batch_wait_s + worker.poll_timeout_s must stay below a third of worker.transaction_timeout_s"
        )
    if worker.backoff_s > worker.backoff_max_s:
        raise ConfigError("worker.backoff_s is above worker.backoff_max_s; raise the latter")
    if -1 < config.topics.retention_h < RETENTION_H_MIN:
        raise ConfigError(
            f"topics.retention_h is {config.topics.retention_h}: records would be deleted before they are read; use "
            f"{RETENTION_H_MIN} and more, or -1 for ever"
        )
    if 0 < config.state.ttl_h * 3_600 <= config.events.future_max_s:
        raise ConfigError(
            "state.ttl_h must be longer than events.future_max_s, or one event from a clock that runs ahead makes "
            "every other user look silent"
        )
    if config.network.vector_length not in (0, config.events.vector_length):
        raise ConfigError(
            f"network.vector_length is {config.network.vector_length} and events.vector_length is "
            f"{config.events.vector_length}; give both the length of your events' vectors, or 0"
        )
    names = [*config.topics.events, *topic_names(config).values()]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"topics: {twice!r} is named twice; every topic needs its own name")


def _leaves(tree: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """Dotted keys of a raw tree; tables deeper than our sections are values."""
    for name, value in tree.items():
        if isinstance(value, dict) and value and depth < 2:
            yield from _leaves(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name
