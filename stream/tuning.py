"""A learner that goes on from trained weights: at its usual rates, at a small rate, or by adapters alone.

Beside the way of an event: from the settings to models/tuning.py, for `driftline pretrain` and `driftline evaluate`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from models.settings import LearningSettings
from models.tuning import Trainee, to_state
from stream.config import Config
from stream.errors import ConfigError
from stream.saved_weights import Initial

FINE_RATE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """How to go on.

    Attributes:
        how: online = as a learner of `driftline run`; fine = everything, at a small rate and warmed up again;
            adapters = only adapters and interests that are new.
        rate: AdamW's, where it is not the usual one; embeddings' falls by the same factor, but with adapters.
        rank: of the adapters.
        new_interests: the stream has other interests than the weights: theirs are forgotten.
    """

    how: Literal["online", "fine", "adapters"] = "online"
    rate: float | None = None
    rank: int = 4
    new_interests: bool = False

    def learning(self, usual: LearningSettings) -> LearningSettings:
        """The settings of the learning."""
        rate = FINE_RATE if self.how == "fine" and self.rate is None else self.rate
        if rate is None:
            return usual
        embedding_rate = usual.embedding_rate
        if self.how != "adapters":
            embedding_rate = max(1e-9, embedding_rate * rate / usual.rate)
        return msgspec.structs.replace(usual, rate=rate, embedding_rate=min(1.0, embedding_rate))


USUAL = Tuning()


def make_trainee(
    config: Config, learning: LearningSettings, initial: Initial | None, tuning: Tuning, seed: int
) -> Trainee:
    """A learner from trained weights, or with none from the seed.

    Raises:
        ConfigError: the saved learner does not fit together.
    """
    device = config.learner.device
    if initial is None:
        return Trainee(config.network, learning, seed=seed, device=device)
    try:
        state = to_state(initial.learner, initial.files)
        trainee = Trainee.restore(state, config.network, learning, device=device)
    except (ValueError, KeyError, RuntimeError) as error:
        what = str(error).partition("\n")[0][:200]
        raise ConfigError(f"{initial.path}: its parts do not fit together: {what}; pretrain anew") from error
    trainee.seed(seed)
    if tuning.new_interests:
        trainee.drop_interests()
    if tuning.how == "adapters":
        trainee.adapt(tuning.rank, seed)
    elif tuning.how == "fine":
        trainee.warm_up()
    return trainee
