"""A learner in a folder: tensors as safetensors, all else as JSON, written so that a reader sees the old or the new.

Beside the way of an event: `driftline pretrain` writes it, and a new application starts from it
(learner.initial_weights). The JSON file names its tensor files with their checksums and is put in place last, in one
step of the file system; tensor files that no JSON names any more are deleted afterwards.

    FOLDER/checkpoint.json                    what the weights are, of which interests, made how; vocabulary; epochs
    FOLDER/checkpoint-weights-<hash>.safetensors, checkpoint-optimiser-<hash>.safetensors
    FOLDER/progress*.json, best*.json ...     while it is being made: where to go on after a kill
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from models.settings import NetworkSettings
from stream.config import Config
from stream.errors import ConfigError

if TYPE_CHECKING:
    from models.tuning import SavedFacts

FORMAT = 1
CHECKPOINT = "checkpoint"
PLAIN_FIELD = "interest"  # the interest's field of events that were mapped before they came

T = TypeVar("T", bound=msgspec.Struct)


class TensorFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file beside the JSON."""

    name: str
    sha256: str


class Saved(msgspec.Struct, kw_only=True):
    """The JSON file.

    Attributes:
        program: version of the program that wrote it.
        fingerprint: of the network's settings and the kind; another one is another network.
        kind: what the interests are: the column or field that they come from.
        facts: what the writer wants to have again.
    """

    format: int
    program: str
    fingerprint: str
    kind: str
    facts: msgspec.Raw
    files: dict[str, TensorFile]


@dataclass(frozen=True, kw_only=True, slots=True)
class Initial:
    """Trained weights to start from."""

    path: Path
    kind: str
    learner: SavedFacts
    files: Mapping[str, bytes]


def program_version() -> str:
    """Of this program, as it is installed."""
    import importlib.metadata

    try:
        return importlib.metadata.version("driftline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}; give another folder with --out") from error


def write(folder: Path, name: str, *, kind: str, fingerprint: str, facts: object, files: Mapping[str, bytes]) -> None:
    """Replace what stands under a name in a folder, in one step.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with _writing(folder):
        told = {}
        for part, payload in files.items():
            digest = hashlib.sha256(payload).hexdigest()
            told[part] = TensorFile(name=f"{name}-{part}-{digest[:16]}.safetensors", sha256=digest)
            _put(folder / told[part].name, payload)
        saved = Saved(
            format=FORMAT,
            program=program_version(),
            fingerprint=fingerprint,
            kind=kind,
            facts=msgspec.Raw(msgspec.json.encode(facts)),
            files=told,
        )
        _put(folder / f"{name}.json", msgspec.json.encode(saved))
        named = {file.name for file in told.values()}
        for old in folder.glob(f"{name}-*.safetensors"):
            if old.name not in named:
                old.unlink()


def remove(folder: Path, name: str) -> None:
    """Take away what stands under a name, the JSON file first."""
    with _writing(folder):
        (folder / f"{name}.json").unlink(missing_ok=True)
        for old in folder.glob(f"{name}-*.safetensors"):
            old.unlink()


def _put(path: Path, payload: bytes) -> None:
    """Write a file aside, make sure that it is on the disk, and put it in place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as stream:
        stream.write(payload)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(folder: Path, name: str, facts: type[T]) -> tuple[Saved, T, dict[str, bytes]]:
    """What `write` wrote under a name.

    Raises:
        ConfigError: nothing is there, or it is broken, or of another format.
    """
    path = folder / f"{name}.json"
    try:
        saved = msgspec.json.decode(path.read_bytes(), type=Saved)
        if saved.format != FORMAT:
            raise ConfigError(f"{path}: has format {saved.format}, this program reads {FORMAT}; pretrain anew")
        told = msgspec.json.decode(saved.facts, type=facts)
        files = {part: (folder / file.name).read_bytes() for part, file in saved.files.items()}
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: no {Path(error.filename).name} there; give a folder that `driftline pretrain` made"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path}: is no checkpoint of this program: {error}; pretrain anew") from None
    for part, file in saved.files.items():
        if hashlib.sha256(files[part]).hexdigest() != file.sha256:
            raise ConfigError(f"{folder / file.name}: fails its checksum; take a copy that is whole, or pretrain anew")
    return saved, told, files


def is_there(folder: Path, name: str) -> bool:
    """Whether something stands under a name."""
    return (folder / f"{name}.json").is_file()


# ---------------------------------------------------------------------- to start from


class CheckpointFacts(msgspec.Struct, kw_only=True):
    """The facts of a finished checkpoint: the learner, and how it was made."""

    learner: Any
    training: dict[str, Any]


def load_initial(path: Path, network: NetworkSettings, *, key: str) -> Initial:
    """Trained weights that fit a network.

    Args:
        key: the setting or option that names them, for the errors.

    Raises:
        ConfigError: they are not there, are broken, or were made with another network.
    """
    from models.tuning import SavedFacts

    with _told_of(path, key):
        saved, facts, files = read(_folder(path), CHECKPOINT, CheckpointFacts)
        learner = msgspec.convert(facts.learner, SavedFacts)
    for name in network.__struct_fields__:
        made, wanted = getattr(learner.settings, name), getattr(network, name)
        if made != wanted:
            raise ConfigError(
                f"{key} {path}: was made with network.{name} = {msgspec.json.encode(made).decode()}, here it is "
                f"{msgspec.json.encode(wanted).decode()}; set network.{name} so, or pretrain anew"
            )
    if {"weights", "optimiser"} - files.keys():
        raise ConfigError(f"{key} {path}: names no file of weights or of the optimiser; pretrain anew")
    return Initial(path=path, kind=saved.kind, learner=learner, files=files)


def check_there(path: Path, *, key: str) -> None:
    """Whether a whole checkpoint is there: quick, without the network. Raises ConfigError."""
    with _told_of(path, key):
        read(_folder(path), CHECKPOINT, CheckpointFacts)


def _folder(path: Path) -> Path:
    """A checkpoint may be named by its JSON file."""
    return path.parent if path.name == f"{CHECKPOINT}.json" else path


@contextmanager
def _told_of(path: Path, key: str) -> Iterator[None]:
    """Errors name the setting or option."""
    try:
        yield
    except msgspec.ValidationError as error:
        raise ConfigError(f"{key} {path}: is no checkpoint of this program: {error}; pretrain anew") from None
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_kind(initial: Initial, config: Config, *, key: str) -> None:
    """Whether the application's events have the interests that the weights know.

    Events whose interest comes in the plain field were mapped by whoever sent them: nothing can be said of those.

    Raises:
        ConfigError: they come from another field.
    """
    field = config.events.fields.get("interest", PLAIN_FIELD)
    if field != PLAIN_FIELD and kind_of(field) != initial.kind:
        raise ConfigError(
            f"{key} {initial.path}: its interests are {initial.kind!r}, those of events.fields.interest are "
            f"{kind_of(field)!r}; give weights that were pretrained on those (driftline pretrain --kind names them)"
        )


def kind_of(column: str) -> str:
    """What interests from a column are called: the last part of a path, in small letters.

    Example:
        >>> kind_of("product.Category"), kind_of("department+category")
        ('category', 'department+category')
    """
    return column.strip().rsplit(".", 1)[-1].lower()
