"""Online learning: each event once, a few older ones beside it, and everything needed to go on after a restart.

On the way of an event: in the learner's process, behind its decoder. Pure: no I/O, no clock; the same calls with the
same seed give the same weights on a CPU.

    observe   walk the records, bring the states up to date, remember the events (models/history.py)
    learn     for each step: take the oldest waiting events, train on them (what is counted stands as it did before
              them), then count them: vocabulary, popularity, followers, scales
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
import torch
from river.drift import ADWIN
from torch import Tensor, nn
from torch.nn import functional as f

from models.calibration import Calibration, map_of
from models.candidates import CONTEXT_COUNT, FEATURE_COUNT
from models.dedupe import first_sightings
from models.features import F32, I64, U32, U64, EventColumns
from models.forecaster import Forecaster, Parts, initial_weights
from models.gru import (
    COUNTED_COUNT,
    NEVER,
    Moments,
    Network,
    Step,
    View,
    log_general,
    log_probability,
)
from models.history import History, Users, digests, previous_events
from models.inputs import NUMBER_COUNT, Normaliser
from models.knowledge import Candidates, Knowledge
from models.optimiser import Optimiser
from models.profile import EmissionSettings, advance
from models.purchases import PURCHASE, Purchases, came, pairs_of
from models.sampled_softmax import Draw, log_softmax_of
from models.settings import LearningSettings, NetworkSettings
from models.shift import GroupTable, ShiftSettings
from models.snapshot import Weights
from models.successors import Successors
from models.vocabulary import Vocabulary

_SILENT = EmissionSettings(policy="interval", max_events=2**31, max_age_s=1e12)
_BATCH_EVENTS = 4_096  # larger batches are taken in parts
_LOSSES_KEPT = 1_024  # from which the drift detector is rebuilt after a restart
_HORIZON_WEIGHT = 0.3
_TYPE_WEIGHT = 0.1
_CALIBRATED_EVERY = 4  # gradient steps; outcomes of all events would say little more
_CALIBRATED_NUMBERS, _CALIBRATED_MIN = 400_000, 8  # probabilities that are looked at for it, forecasts at least
_OTHER_PAIRS = 4  # interests beside the user's own at each moment of a purchase's forecast, half of them followers


@dataclass(frozen=True, kw_only=True, slots=True)
class LearnReport:
    """What one call of `learn` did.

    Attributes:
        steps, events: gradient steps taken, and new events learned in them.
        loss: mean over the steps of the first step's -log p; NaN without steps.
        skipped_non_finite: steps whose loss or gradient was not finite; their events count as learned.
        shed: events that were dropped unlearned since the last report because too many waited.
    """

    steps: int
    events: int
    loss: float
    skipped_non_finite: int
    shed: int


@dataclass(kw_only=True, slots=True)
class _Waiting:
    """Sequence numbers of events to be learned, as ranges in order."""

    ranges: deque[tuple[int, int]]

    def __len__(self) -> int:
        return sum(end - start for start, end in self.ranges)

    def add(self, start: int, end: int) -> None:
        if self.ranges and self.ranges[-1][1] == start:
            start = self.ranges.pop()[0]
        if end > start:
            self.ranges.append((start, end))

    def take(self, count: int) -> I64:
        """The oldest `count`, or as many as there are."""
        taken = []
        while self.ranges and count > 0:
            start, end = self.ranges.popleft()
            stop = min(end, start + count)
            taken.append(np.arange(start, stop))
            count -= stop - start
            if stop < end:
                self.ranges.appendleft((stop, end))
        return np.concatenate(taken) if taken else np.zeros(0, np.int64)

    def drop(self, number_E: I64) -> int:
        """Take these out, wherever they wait; how many of them waited."""
        waiting = self.all()
        left = np.setdiff1d(waiting, number_E)
        if len(left) < len(waiting):
            self.ranges.clear()
            for part in np.split(left, np.flatnonzero(np.diff(left) > 1) + 1) if len(left) else []:
                self.add(int(part[0]), int(part[-1]) + 1)
        return len(waiting) - len(left)

    def all(self) -> I64:
        return np.concatenate([np.arange(*r) for r in self.ranges]) if self.ranges else np.zeros(0, np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ahead:
    """Forecasts of later steps that are learned: rows before which they are made, how many events before the target's
    own, the farthest first, and the targets."""

    row_L: I64
    back_L: I64
    target_L: U32


class LearnerState(msgspec.Struct, array_like=True):
    """What `state_bytes` holds."""

    weights: bytes
    vocabulary: bytes
    optimiser: bytes
    random: str
    losses: list[float]
    waiting: bytes
    boost_steps: int
    shed: int


class Learner:
    """See the module's docstring.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda[:N]".

    Attributes:
        before_change: called each time before anything changes that its forecasters share: another thread may use the
            newest one until this returns.
    """

    def __init__(
        self, network: NetworkSettings, learning: LearningSettings, *, seed: int, device: str = "auto"
    ) -> None:
        self._start(initial_weights(network, seed), learning, device)
        self._random = np.random.Generator(np.random.PCG64(seed))

    def _start(self, weights: Weights, learning: LearningSettings, device: str) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._settings, self._learning = weights.settings, learning
        self.version = weights.version
        tensors = weights.tensors
        self._network = Network.of(weights, copied=True).to(self._device)
        self._copy: Network | None = None  # on the CPU, as of the last step, where the network is elsewhere
        self._optimiser = Optimiser(self._network, learning)
        self._vocabulary = Vocabulary(learning)
        self._successors = Successors(
            tensors["successors.follower"].copy(),
            tensors["successors.weight"].copy(),
            tensors["successors.total"].copy(),
            tensors["successors.stay"].copy(),
        )
        self._purchases = Purchases(tensors["purchases.weight"].copy(), tensors["purchases.pairs"].copy())
        self._calibration = Calibration.of(tensors)
        self._normaliser = Normaliser(sums_3M=tensors["normaliser.sums"])
        self._groups = GroupTable(ShiftSettings())
        self._users = Users(learning.users_max)
        self._history = History(
            max(learning.history_events, learning.backlog_events + _BATCH_EVENTS),
            numbers=NUMBER_COUNT + weights.settings.vector_length,
            followers=weights.settings.successors,
        )
        self._waiting = _Waiting(ranges=deque())
        self._unlearned: U64 = np.zeros(0, np.uint64)  # digests of events that waited when the state was saved
        self._losses: deque[float] = deque(maxlen=_LOSSES_KEPT)
        self._adwin: Any = ADWIN()  # type: ignore[no-untyped-call]
        self._boost_steps = 0
        self._shed = 0
        self._helper = ThreadPoolExecutor(1, "learner")
        self.before_change: Callable[[], object] = lambda: None
        self._know()

    def _know(self) -> None:
        """What is counted, as it stands now."""
        self._knowledge = Knowledge.of(
            self._settings,
            self._vocabulary.find,
            self._vocabulary.popularity(),
            self._vocabulary.crowd(),
            self._successors,
            self._normaliser,
        )

    # ------------------------------------------------------------------ events in

    def observe(
        self,
        user_key_B: U64,
        events: EventColumns,
        names: Mapping[int, str],
        *,
        learn: bool = True,
        id_hash_B: U32 | None = None,
    ) -> None:
        """Take the events of one partition, in order; with `learn` they wait to be learned, else they are history.

        Args:
            id_hash_B: hashes of the events' ids; an event whose id its user's record remembers is passed over.
        """
        self._vocabulary.note(names)
        if id_hash_B is None:
            id_hash_B = np.zeros(len(events), np.uint32)
        for start in range(0, len(events), _BATCH_EVENTS):
            span = slice(start, start + _BATCH_EVENTS)
            self._observe(user_key_B[span], events.take(span), id_hash_B[span], learn)

    def _observe(self, user_key_B: U64, events: EventColumns, id_hash_B: U32, learn: bool) -> None:
        keys_U, user_row = np.unique(user_key_B, return_inverse=True)
        events = replace(events, user_row=user_row.astype(np.int64))
        row_U = self._users.rows(keys_U)
        records = self._users.records[row_U]
        fresh_B = first_sightings(records["dedupe"], events.user_row, id_hash_B)
        if not fresh_B.all():
            user_key_B, events = user_key_B[fresh_B], events.take(np.flatnonzero(fresh_B))
        if not len(events):
            return
        advanced = advance(records, events, self._groups, ShiftSettings(), _SILENT, np.ones(len(events), np.bool_))
        inputs = self._knowledge.inputs(events, advanced.gap_s_B, advanced.aggregates_BA)
        before_BH, _after, new_UH = self.forecaster().encode(
            events, advanced.gap_s_B, advanced.aggregates_BA, records["hidden"], inputs
        )
        previous_B, newest_U = previous_events(events.user_row, self._users.last_event[row_U], self._history.end)
        digest_B = digests(user_key_B, events)
        number_B = self._history.append(
            events,
            advanced.before,
            previous_B,
            digest_B,
            {
                "item": inputs.item_B,
                "type": inputs.type_B,
                "number": inputs.number_BN,
                "gap_s": advanced.gap_s_B,
                "hidden": before_BH,
            },
        )
        records["hidden"] = new_UH
        self._users.records[row_U] = records
        self._users.last_event[row_U] = newest_U
        if learn:
            self._normaliser = self._normaliser.with_events(events, self._learning.popularity_half_life_events)
            self._waiting.add(int(number_B[0]), int(number_B[-1]) + 1)
        elif len(self._unlearned):
            for b in np.flatnonzero(np.isin(digest_B, self._unlearned)).tolist():
                self._waiting.add(int(number_B[b]), int(number_B[b]) + 1)
            self._unlearned = np.setdiff1d(self._unlearned, digest_B)
        excess = len(self._waiting) - self._learning.backlog_events
        if excess > 0:
            self._count(self._waiting.take(excess))
            self._shed += excess

    def forget(self, keys: U64) -> int:
        """Erase users: record, histories, and events that wait to be learned. What the weights took from them stays.

        Returns:
            How many of them were here.
        """
        count = 0
        for key in keys.tolist():
            newest = self._users.erase(key)
            count += newest >= 0
            self._waiting.drop(self._history.erase(newest))
        return count

    # ------------------------------------------------------------------ gradients

    def learn(self, max_steps: int) -> LearnReport:
        """Up to `max_steps` steps, each on `step_events` waiting events; fewer wait on."""
        losses: list[float] = []
        steps = events = skipped = 0
        while steps < max_steps and len(self._waiting) >= self._learning.step_events:
            number_B = self._waiting.take(self._learning.step_events)
            loss = self._step(number_B)
            self._count(number_B)
            steps += 1
            events += len(number_B)
            if np.isfinite(loss):
                losses.append(loss)
                self._watch(loss)
            else:
                skipped += 1
        shed, self._shed = self._shed, 0
        return LearnReport(
            steps=steps,
            events=events,
            loss=float(np.mean(losses)) if losses else float("nan"),
            skipped_non_finite=skipped,
            shed=shed,
        )

    def _watch(self, loss: float) -> None:
        """A rise of the loss raises the rates for a while."""
        self._losses.append(loss)
        before = self._adwin.estimation
        self._adwin.update(loss)
        if self._adwin.drift_detected and self._adwin.estimation > before:
            self._boost_steps = self._learning.drift_boost_steps
        elif self._boost_steps:
            self._boost_steps -= 1

    def _step(self, number_B: I64) -> float:
        """One gradient step; the mean loss of the new events, NaN where it was skipped."""
        replayed = self._replay(round(len(number_B) * self._learning.replay_share))
        loss, new_loss = self._loss(number_B, replayed)
        self._optimiser.zero()
        beside = self._helper.submit(self._learn_beside, number_B)
        finite = loss is not None and bool(torch.isfinite(loss))
        if loss is not None and finite:
            loss.backward()  # type: ignore[no-untyped-call]
        if not (beside.result() and finite):
            return float("nan")
        boost = self._learning.drift_boost if self._boost_steps else 1.0
        self.before_change()
        return new_loss if self._optimiser.step(boost) else float("nan")

    def _learn_beside(self, number_B: I64) -> bool:
        """What shares no gradient with the rest, so that another thread can learn it; False where it is not finite."""
        if not self._optimiser.steps % _CALIBRATED_EVERY:
            self._calibrate(number_B)
        if not (self._learning.auxiliary_losses and self._purchases.known):
            return True
        loss = self._purchase_loss(number_B)
        finite = bool(torch.isfinite(loss))
        if finite and loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
        return finite

    def _calibrate(self, number_B: I64) -> None:
        """Learn maps of probabilities from what was forecast of these events, before anything is learned from them.

        Each is asked for twice: at its time, and at a time not known, as forecasts are published; without dropout.
        """
        history, network, knowledge = self._history, self._optimiser.average, self._knowledge
        most = max(_CALIBRATED_MIN, _CALIBRATED_NUMBERS // max(1, len(knowledge.popularity_V)))
        row_B = number_B[:most] % history.capacity
        row_E = np.concatenate([row_B, row_B])
        gap_s_E = np.concatenate([history.gap_s[row_B], np.full(len(row_B), np.nan, np.float32)])
        target_E = history.interest[row_E]
        candidates, moments = self._moments(row_E, gap_s_E)
        log_popularity_V, crowd_VK = self._tensor(knowledge.log_popularity_V), self._tensor(knowledge.crowd_VK)
        with torch.no_grad():
            state_EH = network.at_moment(self._tensor(history.hidden[row_E]), moments)
            step = network.step(state_EH, network.view(moments))
            general_EV = network.general(step, moments, moments.lift(log_popularity_V), log_popularity_V, crowd_VK)
            parts = Parts.of(step, general_EV)
        self._calibration.learn(
            *parts.arrays(), candidates.row_EC, candidates.key_EC, target_E, self._vocabulary.find(target_E),
            map_of(gap_s_E, len(row_E)),
        )  # fmt: skip

    def _replay(self, count: int) -> I64:
        """Older events, rare interests before common ones."""
        history = self._history
        if not count or history.end == history.first:
            return np.zeros(0, np.int64)
        number_E = self._random.integers(history.first, history.end, 4 * count)
        row_E = number_E % history.capacity
        number_E, row_E = number_E[history.learned[row_E]], row_E[history.learned[row_E]]
        if not len(number_E):
            return number_E
        vocabulary_row = self._vocabulary.find(history.interest[row_E])
        known = vocabulary_row >= 0
        popularity = np.ones(len(number_E))
        popularity[known] = self._knowledge.popularity_V[vocabulary_row[known]]
        chance = 1.0 / np.sqrt(popularity + 1.0)
        kept = self._random.choice(len(number_E), min(count, len(number_E)), replace=False, p=chance / chance.sum())
        chosen: I64 = number_E[kept]
        return chosen

    def _loss(self, number_B: I64, replayed: I64) -> tuple[Tensor | None, float]:
        """The loss of a step, and the mean of the new events' -log p of the first step.

        The moments of forecasts for later steps lie behind those for the next event: candidates, embeddings and the
        output layer are taken once for all of them.
        """
        network, learning, history = self._network, self._learning, self._history
        number_E = np.concatenate([number_B, replayed])
        ahead = self._ahead(number_B)
        next_E, row_L = number_E % history.capacity, ahead.row_L
        gap_s = np.full(len(next_E) + len(row_L), np.nan, np.float32)
        gap_s[: len(next_E)] = history.gap_s[next_E]
        gap_s[: len(next_E)][self._random.random(len(next_E)) < learning.gap_dropout] = np.nan
        candidates, moments = self._moments(np.concatenate([next_E, row_L]), gap_s)
        burn_in_EH, embedding_SD = self._burn_in(number_E, moments.embedding_S)
        if learning.dropout:
            kept = self._random.random(burn_in_EH.shape, np.float32) >= learning.dropout
            burn_in_EH = burn_in_EH * self._tensor(kept.astype(np.float32) / (1.0 - learning.dropout))
        hidden_EH = torch.cat([burn_in_EH, self._tensor(history.hidden[row_L])])
        view = network.view(moments, embedding_SD)
        step = network.step(network.at_moment(hidden_EH, moments), view)
        now, behind = step.split([len(next_E), len(row_L)])
        steps, at = [now], [np.arange(len(next_E))]
        for later, at_L in self._steps_behind(behind, view, ahead, len(next_E)):
            steps.append(later)
            at.append(at_L)
        at_E = np.concatenate(at)
        target_E = np.concatenate([history.interest[next_E], ahead.target_L[at_E[len(next_E) :] - len(next_E)]])
        log_p_E, known_E = self._log_p(Step.joined(steps), moments, candidates.key_EC[at_E], target_E, at_E)
        if not known_E[: len(next_E)].any():
            return None, float("nan")
        log_p_E = log_p_E * self._tensor(known_E)
        loss = -log_p_E[: len(next_E)].sum() / int(known_E[: len(next_E)].sum())
        new = int(known_E[: len(number_B)].sum())
        new_loss = -float(log_p_E[: len(number_B)].detach().sum()) / new if new else float("nan")
        if learning.auxiliary_losses:
            kinds = self._tensor(history.type[next_E])
            type_ET = network.type_logits(steps[0].state_EH, moments.context_EG[: len(next_E)])
            loss = loss + _TYPE_WEIGHT * f.cross_entropy(type_ET, kinds)
            if len(row_L):
                loss = loss - _HORIZON_WEIGHT * log_p_E[len(next_E) :].sum() / len(row_L)
        return loss, new_loss

    def _purchase_loss(self, number_B: I64) -> Tensor:
        """Of the moments whose n events end with these: was an interest bought in them? Trains its own head alone."""
        history, ahead = self._history, self._learning.horizon_steps - 1
        row_EK, count_E = history.before(number_B, ahead)
        whole = count_E == ahead
        window_EN = np.concatenate([row_EK, (number_B % history.capacity)[:, None]], axis=1)[whole]
        row_E = window_EN[:, max(0, ahead - 1)]  # the first of the n events: the record before it
        if not len(row_E):
            return torch.zeros(())
        candidates, moments = self._moments_here(row_E, None)
        snapshot, network = history.snapshot(row_E), self._network
        interest_EN, counted_EN = history.interest[window_EN], history.learned[window_EN]
        bought_EN = history.type[window_EN] == PURCHASE
        key_EK = np.concatenate([candidates.key_EC, self._other_interests(candidates.key_EC, moments)], axis=1)
        pairs = pairs_of(
            self._knowledge, self._purchases, snapshot, candidates, moments, key_EK,
            seen_EK=came(key_EK, interest_EN, counted_EN), bought_EK=came(key_EK, interest_EN, counted_EN & bought_EN),
        )  # fmt: skip
        asked_EK = key_EK != 0
        bought_P = came(key_EK, interest_EN, bought_EN)[asked_EK] > 0
        self._purchases.count_pairs(pairs.number_PF[:, -2].numpy() == 0.0, bought_P)
        moments, pairs = moments.to(self._device), pairs.to(self._device)
        with torch.no_grad():
            state_EH = network.at_moment(self._tensor(history.hidden[row_E]), moments)
        logit_P = network.purchase_logits(
            state_EH, moments.context_EG, pairs.buyer_EU, pairs.owner_P, pairs.number_PF, pairs.prior_P
        )
        return f.binary_cross_entropy_with_logits(logit_P, self._tensor(bought_P.astype(np.float32)))

    def _other_interests(self, key_EC: U32, moments: Moments) -> U32:
        """(E, _OTHER_PAIRS): followers of the last interests, interests as popular as they come; 0 for a candidate."""
        history, keys_V = self._history, self._vocabulary.keys
        count, half = len(key_EC), _OTHER_PAIRS // 2
        place_EJ = self._random.integers(0, moments.follower_EM.shape[1], (count, half))
        row_EJ = np.take_along_axis(moments.follower_EM.numpy(), place_EJ, axis=1)
        follows_EJ = np.take_along_axis(moments.extra_EM.numpy(), place_EJ, axis=1) > 0
        follower_EJ = np.where(follows_EJ, keys_V[row_EJ], 0) if len(keys_V) else np.zeros((count, half), np.uint32)
        drawn = self._random.integers(history.first, history.end, (count, half)) % history.capacity
        key_EJ = np.concatenate([follower_EJ, history.interest[drawn]], axis=1).astype(np.uint32)
        key_EJ[(key_EJ[:, :, None] == key_EC[:, None, :]).any(axis=2)] = 0
        return key_EJ

    def _ahead(self, number_B: I64) -> _Ahead:
        """The events as second, third ... of forecasts made before earlier events of their users."""
        learning, history = self._learning, self._history
        nothing = _Ahead(row_L=np.zeros(0, np.int64), back_L=np.zeros(0, np.int64), target_L=np.zeros(0, np.uint32))
        if learning.horizon_steps < 2 or not learning.horizon_share or not learning.auxiliary_losses:
            return nothing
        chosen = number_B[self._random.random(len(number_B)) < learning.horizon_share]
        back_L = self._random.integers(1, learning.horizon_steps, len(chosen))
        row_LK, count_L = history.before(chosen, learning.horizon_steps - 1)
        there = np.flatnonzero(count_L >= back_L)
        there = there[np.argsort(-back_L[there], kind="stable")]
        if not len(there):
            return nothing
        return _Ahead(
            row_L=row_LK[there, back_L[there] - 1],
            back_L=back_L[there],
            target_L=history.interest[chosen[there] % history.capacity],
        )

    def _steps_behind(self, step: Step, view: View, ahead: _Ahead, first: int) -> Iterator[tuple[Step, I64]]:
        """Decode on from the moments behind the first ones; each is wanted at its own step, the farthest come first.

        Yields:
            What is due at a step, and the moments that it belongs to.
        """
        if not len(ahead.row_L):
            return
        view = view.after(first)
        for number in range(2, int(ahead.back_L[0]) + 2):
            # All go on, though some are done: they are few, and to cut them off takes longer.
            step = self._network.step(self._network.next_state(step, view, number), view)
            due = np.flatnonzero(ahead.back_L + 1 == number)
            if len(due):
                before = int(due[0])
                yield step.split([before, len(due), len(ahead.row_L) - before - len(due)])[1], first + due

    def _burn_in(self, number_E: I64, embedding_S: Tensor) -> tuple[Tensor, Tensor]:
        """States before these events, by the GRU over the events before them from a carried state on.

        Args:
            embedding_S: rows of the table of interests that are wanted beside.

        Returns:
            The states, and those rows: each use of a table costs a gradient as large as the table.
        """
        history, network = self._history, self._network
        row_EK, count_E = history.before(number_E, self._learning.burn_in_events)
        start_E = np.where(
            count_E > 0, row_EK[np.arange(len(row_EK)), np.maximum(count_E - 1, 0)], number_E % history.capacity
        )
        order = np.argsort(-count_E, kind="stable")
        order = order[: int((count_E > 0).sum())]
        hidden_EH = self._tensor(history.hidden[start_E])
        if not len(order):
            return hidden_EH, self._embedding(embedding_S)
        sizes_T = (count_E[:, None] > np.arange(int(count_E.max()))).sum(0)
        row_P = np.concatenate([row_EK[order[:size], count_E[order[:size]] - 1 - t] for t, size in enumerate(sizes_T)])
        interest_P = history.interest[row_P]
        embedding_P = self._tensor(self._knowledge.embedding(interest_P, self._vocabulary.find(interest_P)))
        rows_D = self._embedding(torch.cat([embedding_P, embedding_S]))
        input_PI = network.inputs_of(
            rows_D[: len(row_P)],
            self._tensor(history.item[row_P]),
            self._tensor(history.type[row_P]),
            self._tensor(history.number[row_P]),
        )
        index = self._tensor(order)
        after = network.encode_last(input_PI, torch.from_numpy(sizes_T), hidden_EH[index])
        return hidden_EH.index_copy(0, index, after), rows_D[len(row_P) :]

    def _moments(self, row_E: I64, gap_s_E: F32 | None) -> tuple[Candidates, Moments]:
        candidates, moments = self._moments_here(row_E, gap_s_E)
        return candidates, moments.to(self._device)

    def _moments_here(self, row_E: I64, gap_s_E: F32 | None) -> tuple[Candidates, Moments]:
        """As forecasts see them, on the CPU; what was learned before with the counts of then, which do not know it."""
        history = self._history
        candidates, moments = self._knowledge.moments(history.snapshot(row_E), gap_s_E)
        old = history.learned[row_E]
        new = np.flatnonzero(~old)
        follower_EM, extra_EM = moments.follower_EM.numpy(), moments.extra_EM.numpy()
        base_E = moments.base_E.numpy()
        counted_SF = moments.number_SF.numpy()[:, FEATURE_COUNT:]
        last_EL = moments.context_EG.numpy()[:, CONTEXT_COUNT:]
        place_S = moments.place_S.numpy()
        owner_S = moments.owner_S.numpy()
        history.follower[row_E[new]] = follower_EM[new]
        history.extra[row_E[new]] = extra_EM[new]
        history.base[row_E[new]] = base_E[new]
        counted_ECF = np.zeros((*candidates.key_EC.shape, COUNTED_COUNT), np.float16)
        counted_ECF.reshape(-1, COUNTED_COUNT)[place_S] = counted_SF
        history.counted[row_E[new]] = counted_ECF[new]
        history.last_counted[row_E[new]] = last_EL[new]
        if old.any():
            # An event that was shed, or re-read after a restart, has none kept: row 0 with nothing extra.
            follower_EM[old] = np.maximum(history.follower[row_E[old]], 0)
            extra_EM[old] = history.extra[row_E[old]]
            base_E[old] = history.base[row_E[old]]
            kept = old[owner_S]
            counted_SF[kept] = history.counted[row_E].reshape(-1, COUNTED_COUNT)[place_S[kept]]
            last_EL[old] = history.last_counted[row_E[old]]
            moments.live_E.numpy()[old] = 0.0
        return candidates, moments

    def _log_p(
        self, step: Step, moments: Moments, key_EC: U32, target_E: U32, at_E: I64
    ) -> tuple[Tensor, npt.NDArray[np.bool_]]:
        """log p of the targets, and which of them could be forecast at all.

        Args:
            at_E: the moment of each distribution of `step`.
        """
        network, log_popularity_V = self._network, self._tensor(self._knowledge.log_popularity_V)
        found_EC = (key_EC == target_E[:, None]) & (target_E[:, None] != 0)
        slot_E = np.where(found_EC.any(1), found_EC.argmax(1), -1)
        target_row_E = self._vocabulary.find(target_E).astype(np.int64)
        known_E = (target_row_E >= 0) | (slot_E >= 0)
        general_E = torch.full_like(step.log_gate_E, NEVER)
        if len(log_popularity_V):
            row_E, at = self._tensor(np.maximum(target_row_E, 0)), self._tensor(at_E)
            asked = (
                step.state_EH,
                moments.follower_EM[at],
                moments.lift(log_popularity_V)[at],
                moments.live_E[at],
                log_popularity_V,
                self._tensor(self._knowledge.crowd_VK),
            )
            if self._is_sampled():
                drawn = Draw.of(self._knowledge.popularity_V, self._learning.softmax_draws, self._random)
                trained_E = log_softmax_of(network, *asked, row_E, drawn)
            else:
                trained_E = -f.cross_entropy(network.logits(*asked), row_E, reduction="none")
            log_general_E = log_general(step, trained_E, moments.log_counted(at, row_E, log_popularity_V))
            general_E = torch.where(self._tensor(target_row_E >= 0), log_general_E, general_E)
        return log_probability(step, general_E, self._tensor(slot_E)), known_E

    def _is_sampled(self) -> bool:
        """Whether the vocabulary is too large for a softmax over all of it; then gradients of its table are sparse."""
        return len(self._knowledge.log_popularity_V) > self._learning.softmax_interests_max

    def _embedding(self, index: Tensor) -> Tensor:
        """Rows of the table of interests."""
        return f.embedding(index, self._network.interest, sparse=self._is_sampled())

    def _tensor(self, array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    # ------------------------------------------------------------------ counts

    def _count(self, number_B: I64) -> None:
        """Count events once they are learned (or shed): what was counted is never seen by its own gradient."""
        self.before_change()
        history = self._history
        row_B = number_B % history.capacity
        interest_B = history.interest[row_B]
        counted = self._vocabulary.count(interest_B)
        if len(counted.retired):
            self._successors.clear(counted.retired)
            self._purchases.clear(counted.retired)
            self._optimiser.reset_rows(counted.retired, self._random)
        if len(self._vocabulary) > self._network.capacity:
            self._optimiser.grow(len(self._vocabulary), self._random)
        self._successors.grow(len(self._vocabulary))
        self._purchases.grow(len(self._vocabulary))
        ring_BR = history.snapshot(row_B).ring_interest_ER
        other_B = (ring_BR != ring_BR[:, :1]).argmax(axis=1)  # the newest but the last one; 0 where there is none
        before_B = np.where(other_B > 0, ring_BR[np.arange(len(ring_BR)), other_B], 0)
        source_B2 = self._vocabulary.find(np.stack([ring_BR[:, 0], before_B], axis=1).reshape(-1)).reshape(-1, 2)
        self._successors.count(source_B2, self._vocabulary.find(interest_B), self._learning.successor_decay)
        self._purchases.count(
            self._vocabulary.find(interest_B), history.type[row_B], self._learning.popularity_half_life_events
        )
        history.learned[row_B] = True
        self._copy = None
        self._know()

    # ------------------------------------------------------------------ versions

    def _parameters(self) -> Mapping[str, Tensor]:
        """Of a plain Network that makes the forecasts; see models/adapters.py for one that is not."""
        return self._optimiser.average.state_dict()

    def forecaster(self) -> Forecaster:
        """The network as it stands, on the CPU, for use in this process."""
        network = self._optimiser.average
        if self._device.type != "cpu":
            network = self._copy = self._copy or self._copied()
        return Forecaster(
            network,
            self._knowledge,
            self._purchases.copied(),
            self._calibration.copied(),
            self._vocabulary.keys,
            self._vocabulary.names,
            self.version,
        )

    def _copied(self) -> Network:
        """A plain network on the CPU that computes the same."""
        state = {name: value.detach().cpu() for name, value in self._parameters().items()}
        network = Network(self._settings, 0)
        network.interest, network.bias = nn.Parameter(state["interest"]), nn.Parameter(state["bias"])
        network.load_state_dict(state, assign=True)
        return network

    def weights(self) -> Weights:
        """The current version."""
        rows = len(self._vocabulary)
        tensors = {f"network.{n}": t.detach().cpu().numpy().copy() for n, t in self._parameters().items()}
        last = self._settings.hashed_rows + rows
        tensors["network.interest"] = tensors["network.interest"][:last]
        tensors["network.bias"] = tensors["network.bias"][:last]
        tensors |= {
            "vocabulary.keys": self._vocabulary.keys.copy(),
            "vocabulary.popularity": self._vocabulary.popularity(),
            "vocabulary.crowd": self._vocabulary.crowd(),
            "successors.follower": self._successors.follower_VM[:rows].copy(),
            "successors.weight": self._successors.weight_VM[:rows].copy(),
            "successors.total": self._successors.total_V[:rows].copy(),
            "successors.stay": self._successors.stay_V[:rows].copy(),
            "purchases.weight": self._purchases.weight_V[:rows].copy(),
            "purchases.pairs": self._purchases.pairs_22.copy(),
            **self._calibration.tensors(),
            "normaliser.sums": self._normaliser.sums_3M,
        }
        return Weights(
            version=self.version, settings=self._settings, tensors=tensors, names=list(self._vocabulary.names)
        )

    def weights_bytes(self) -> bytes:
        """The next version, serialised; `version` is its number from now on."""
        self.version += 1
        return self.weights().to_bytes()

    def state_bytes(self) -> bytes:
        """Everything that `restore` needs to go on, but for the histories."""
        waiting = np.concatenate([self._history.digest[self._waiting.all() % self._history.capacity], self._unlearned])
        return msgspec.msgpack.encode(
            LearnerState(
                weights=self.weights().to_bytes(),
                vocabulary=self._vocabulary.to_bytes(),
                optimiser=self._optimiser.to_bytes(),
                random=msgspec.json.encode(self._random.bit_generator.state).decode(),
                losses=list(self._losses),
                waiting=waiting.astype("<u8").tobytes(),
                boost_steps=self._boost_steps,
                shed=self._shed,
            )
        )

    @classmethod
    def restore(
        cls, payload: bytes, network: NetworkSettings, learning: LearningSettings, *, device: str = "auto"
    ) -> Self:
        """The learner that wrote the state; `observe(..., learn=False)` gives it back its histories.

        Raises:
            ValueError: the bytes are broken, or were written with other network settings.
        """
        try:
            state = msgspec.msgpack.decode(payload, type=LearnerState)
        except msgspec.MsgspecError as error:
            raise ValueError(f"not a learner's state: {error}") from None
        weights = Weights.from_bytes(state.weights)
        if weights.settings != network:
            raise ValueError("the learner's state was written with other [network] settings; use those, or a new app")
        learner = cls.__new__(cls)
        learner._start(weights, learning, device)
        learner._vocabulary = Vocabulary.from_bytes(state.vocabulary, learning)
        learner._optimiser.load(state.optimiser)
        learner._random = np.random.Generator(np.random.PCG64())
        learner._random.bit_generator.state = msgspec.json.decode(state.random)
        for loss in state.losses:
            learner._losses.append(loss)
            learner._adwin.update(loss)
        learner._unlearned = np.frombuffer(state.waiting, "<u8").astype(np.uint64)
        learner._boost_steps = state.boost_steps
        learner._shed = state.shed
        learner._know()
        return learner
