"""A version of the weights as bytes: everything that a worker needs to forecast, and nothing else.

On the way of an event: the learner writes one every few seconds, workers load the newest between two batches.

    "DLW4" | header length u32 | header, JSON | body, safetensors
    header: version, settings and their fingerprint, names of the interests by row, sha256 of the body
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import safetensors.numpy

from models.settings import NetworkSettings

_MAGIC = b"DLW4"

Tensors = dict[str, npt.NDArray[Any]]


class _Header(msgspec.Struct, kw_only=True):
    version: int
    settings: NetworkSettings
    fingerprint: str
    names: list[str]
    sha256: str


def fingerprint(settings: NetworkSettings) -> str:
    """Short hash of the network's settings: weights of another one cannot be loaded."""
    return hashlib.sha256(msgspec.json.encode(settings, order="sorted")).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """One version.

    Attributes:
        tensors: parameters of the network as `network.*`, and what is counted: `vocabulary.keys`,
            `vocabulary.popularity`, `successors.*`, `calibration.*`, `normaliser.sums`.
        names: of the interests, by row of the vocabulary; "" = not known.
    """

    version: int
    settings: NetworkSettings
    tensors: Tensors
    names: list[str] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """As `from_bytes` reads it; the same weights give the same bytes."""
        body = safetensors.numpy.save({name: np.asarray(t, order="C") for name, t in sorted(self.tensors.items())})
        header = msgspec.json.encode(
            _Header(
                version=self.version,
                settings=self.settings,
                fingerprint=fingerprint(self.settings),
                names=self.names,
                sha256=hashlib.sha256(body).hexdigest(),
            )
        )
        return _MAGIC + len(header).to_bytes(4, "little") + header + body

    @staticmethod
    def from_bytes(payload: bytes) -> Weights:
        """The weights that `to_bytes` wrote.

        Raises:
            ValueError: the bytes are no weights, or broken.
        """
        if payload[:4] != _MAGIC:
            raise ValueError("not weights of this program: the first four bytes are not DLW4")
        start = 8 + int.from_bytes(payload[4:8], "little")
        try:
            header = msgspec.json.decode(payload[8:start], type=_Header)
        except msgspec.MsgspecError as error:
            raise ValueError(f"weights with a broken header: {error}") from None
        body = payload[start:]
        if hashlib.sha256(body).hexdigest() != header.sha256:
            raise ValueError(f"weights version {header.version} fail their checksum")
        if fingerprint(header.settings) != header.fingerprint:
            raise ValueError(f"weights version {header.version}: their settings are not those they were made with")
        return Weights(
            version=header.version,
            settings=header.settings,
            tensors=safetensors.numpy.load(body),
            names=header.names,
        )
