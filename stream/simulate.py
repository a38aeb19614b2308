"""A generated shop stream with known truth: what `driftline demo` and `driftline simulate` send.

On the way of an event: before the log. A visit is a walk over categories: people stay, go on to what goes with it, go
back to a favourite, or look around; they put things into the cart, buy, and some review days later. There is more to
learn here than what was seen last: links between categories, routines over visits, needs that come back after days, a
season for all, categories that are new. The tastes of most people never shift; the planted shifts are known.

The same settings give the same bytes. Shapes: U shoppers, E events, C categories.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from stream.catalogue import GROUPS, REVIEWS, Catalogue, stock
from stream.rows import StreamRecord
from stream.shoppers import DAY_MS, KINDS, Shoppers, Visits, draw_shoppers, draw_visits
from stream.spoiled import oversize, spoil
from stream.truth import NewInterest, PlantedShift, Season, StreamTruth, Truth
from stream.walks import TYPES, Calendar, ShopEvents, walk, with_reviews

INT = npt.NDArray[np.int64]

START_MS = 1_759_708_800_000  # Monday 2025-10-06 00:00 UTC
EVENTS_PER_VISIT = 6.5  # mean over seeds, reviews included


@dataclass(frozen=True, kw_only=True, slots=True)
class ShopSettings:
    """The stream to generate.

    Attributes:
        events: about how many; bad records come on top.
        shift_share: share of the shoppers with a planted shift, as far as enough of them come often enough.
        bad_share: bad records per event.
        oversized: how many records of 5 MB are added.
        activity_sigma: of the lognormal number of visits a shopper.
    """

    users: int = 3_000
    events: int = 240_000
    weeks: int = 8
    seed: int = 0
    shift_share: float = 0.1
    bad_share: float = 0.002
    oversized: int = 0
    activity_sigma: float = 1.0
    start_ms: int = START_MS

    def __post_init__(self) -> None:
        if self.users < 1 or self.events < 1 or not 1 <= self.weeks <= 520:
            raise ValueError("a shop stream needs at least one user, one event, and 1 to 520 weeks")
        if not (0 <= self.shift_share <= 1 and 0 <= self.bad_share <= 1):
            raise ValueError("shift_share and bad_share are shares: 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShopStream:
    """A generated stream: iterate `records()` as often as you like.

    Attributes:
        bad: place and record of each bad one; it is sent before the good event of that number.
        truth: everything that was planted.
    """

    catalogue: Catalogue
    shoppers: Shoppers
    events: ShopEvents
    bad: list[tuple[int, StreamRecord]]
    truth: Truth

    def __len__(self) -> int:
        return len(self.events.user_E) + len(self.bad)

    def records(self) -> Iterator[StreamRecord]:
        """Every record, good and bad, in order."""
        bad = iter([*self.bad, (-1, (None, None, 0))])
        place, spoiled = next(bad)
        everything = np.arange(len(self.events.user_E))
        for number, record in enumerate(_encode(self.catalogue, self.shoppers, self.events, everything)):
            while place == number:
                yield spoiled
                place, spoiled = next(bad)
            yield record


def simulate(settings: ShopSettings) -> ShopStream:
    """Generate the stream of these settings."""
    seeds = np.random.SeedSequence(settings.seed).spawn(5)
    of_stock, of_people, of_visits, of_walks, of_bad = (np.random.default_rng(seed) for seed in seeds)
    catalogue = stock(of_stock)
    shoppers = draw_shoppers(of_people, catalogue, settings.users, settings.activity_sigma)
    wanted = settings.events / EVENTS_PER_VISIT
    visits = draw_visits(of_visits, catalogue, shoppers, wanted, settings.weeks, settings.shift_share)
    calendar = Calendar.of(catalogue, settings.weeks)
    events = walk(of_walks, catalogue, shoppers, visits, calendar)
    events = with_reviews(of_walks, catalogue, events, settings.weeks * 7 * DAY_MS)
    events = events.take(np.argsort(events.time_ms_E, kind="stable"))
    events.time_ms_E[:] += settings.start_ms
    bad, reasons = _spoil_some(of_bad, catalogue, shoppers, events, settings)
    truth = _truth(settings, catalogue, shoppers, visits, calendar, events, reasons)
    return ShopStream(catalogue=catalogue, shoppers=shoppers, events=events, bad=bad, truth=truth)


def _encode(catalogue: Catalogue, shoppers: Shoppers, events: ShopEvents, places: INT) -> Iterator[StreamRecord]:
    """The records of the events at these places, in the form of the `events` topic."""
    encode, groups, names = msgspec.json.Encoder().encode, list(GROUPS), catalogue.names
    for start in range(0, len(places), 10_000):
        part = places[start : start + 10_000]
        chosen = events.take(part)
        price_E = catalogue.price_CI[chosen.category_E, chosen.item_E]
        rows = zip(
            part.tolist(),
            chosen.user_E.tolist(),
            chosen.visit_E.tolist(),
            chosen.category_E.tolist(),
            chosen.item_E.tolist(),
            chosen.type_E.tolist(),
            chosen.time_ms_E.tolist(),
            chosen.dwell_s_E.round(1).tolist(),
            chosen.stars_E.tolist(),
            price_E.tolist(),
            shoppers.group_U[chosen.user_E].tolist(),
            strict=True,
        )
        for place, user, visit, category, item, kind, time_ms, dwell_s, stars, price, group in rows:
            name = user_name(user)
            event = {
                "user": name,
                "interest": names[category],
                "item": f"{category:03d}-{item:02d}",
                "type": TYPES[kind],
                "time": time_ms,
                "price": price,
                "dwell": dwell_s,
                "segment": groups[group],
                "event_id": f"e{place:08d}",
            }
            if stars:
                phrases = REVIEWS[stars - 1]
                event["rating"] = stars
                event["text"] = f"{phrases[place % len(phrases)]}: {names[category].partition('/')[2]}."
            else:
                event["session"] = f"s{visit:07d}"
            yield name.encode(), encode(event), time_ms


def write_events(stream: ShopStream, path: Path) -> int:
    """The good events as JSON lines (gzipped where the name ends in .gz), for `replay` and `evaluate`; the count."""
    count = 0
    everything = np.arange(len(stream.events.user_E))
    with gzip.open(path, "wb", 6) if path.suffix == ".gz" else path.open("wb") as out:
        for _, value, _ in _encode(stream.catalogue, stream.shoppers, stream.events, everything):
            out.write((value or b"") + b"\n")
            count += 1
    return count


def user_name(number: int) -> str:
    """The user id of a shopper."""
    return f"u{number:06d}"


def _spoil_some(
    rng: np.random.Generator, catalogue: Catalogue, shoppers: Shoppers, events: ShopEvents, settings: ShopSettings
) -> tuple[list[tuple[int, StreamRecord]], Counter[str]]:
    """Bad records with their places, and how many there are by reason."""
    count = len(events.user_E)
    few = round(settings.bad_share * count)
    places = np.sort(rng.integers(0, count, few + settings.oversized))
    large = set(rng.permutation(len(places))[: settings.oversized].tolist())
    bad: list[tuple[int, StreamRecord]] = []
    reasons: Counter[str] = Counter()
    turn = int(rng.integers(0, 1_000))
    for number, record in enumerate(_encode(catalogue, shoppers, events, places)):
        reason, spoiled = oversize(record) if number in large else spoil(turn + number, record)
        reasons[reason] += 1
        bad.append((int(places[number]), spoiled))
    return bad, reasons


def _truth(
    settings: ShopSettings,
    catalogue: Catalogue,
    shoppers: Shoppers,
    visits: Visits,
    calendar: Calendar,
    events: ShopEvents,
    reasons: Counter[str],
) -> Truth:
    start_ms = settings.start_ms
    edge_ms = 1.5 * calendar.season_width_ms
    shifts = _planted(catalogue, shoppers, visits, events)
    return Truth(
        stream=StreamTruth(
            seed=settings.seed,
            users=len(np.unique(events.user_E)),
            events=len(events.user_E),
            first_ms=int(events.time_ms_E[0]),
            last_ms=int(events.time_ms_E[-1]),
            bad=dict(sorted(reasons.items())),
        ),
        shifts=sorted(shifts, key=lambda shift: (shift.time_ms, shift.user)),
        seasons=[
            Season(
                interest=catalogue.names[catalogue.season],
                from_ms=int(start_ms + calendar.season_ms - edge_ms),
                until_ms=int(start_ms + calendar.season_ms + edge_ms),
            )
        ],
        new_interests=[
            NewInterest(interest=catalogue.names[c], time_ms=int(start_ms + calendar.launch_ms_C[c]))
            for c in catalogue.launches.tolist()
        ],
    )


def _planted(catalogue: Catalogue, shoppers: Shoppers, visits: Visits, events: ShopEvents) -> Iterator[PlantedShift]:
    """The planted shifts, with the times of the events that show them."""
    by_user = np.argsort(events.user_E, kind="stable")
    first_place_U = np.searchsorted(events.user_E[by_user], np.arange(len(shoppers.group_U) + 1))
    first_visit_U = np.searchsorted(visits.user_S, np.arange(len(shoppers.group_U)))
    for user in np.flatnonzero(visits.kind_U).tolist():
        own = events.take(by_user[first_place_U[user] : first_place_U[user + 1]])
        kind = KINDS[visits.kind_U[user]]

        def time_of(ordinal: int, user: int = user, own: ShopEvents = own) -> int:
            return int(own.time_ms_E[own.visit_E == first_visit_U[user] + ordinal].min())

        tastes = [_liked(catalogue, shoppers, user, taste) for taste in range(2)]
        shift_ms, end = time_of(int(visits.shift_U[user])), int(visits.until_U[user])
        turns = [(kind if kind != "returning" else "abrupt", shift_ms, shift_ms, 0)]
        if kind == "gradual":
            turns = [(kind, shift_ms, time_of(end), 0)]
        if kind == "returning":
            turns.append((kind, time_of(end), time_of(end), 1))
        edges = [turn[1] for turn in turns] + [int(own.time_ms_E[-1]) + 1]
        for number, (name, from_ms, until_ms, taste) in enumerate(turns):
            yield PlantedShift(
                user=user_name(user),
                time_ms=from_ms,
                until_ms=until_ms,
                kind=name,
                events_before=int((own.time_ms_E < from_ms).sum()),
                events_after=int(((own.time_ms_E >= from_ms) & (own.time_ms_E < edges[number + 1])).sum()),
                before=tastes[taste],
                after=tastes[1 - taste],
            )


def _liked(catalogue: Catalogue, shoppers: Shoppers, user: int, taste: int) -> list[str]:
    """The favourites of one taste that are ever chosen, the strongest first."""
    weight_F = np.diff(shoppers.cumulative_UTF[user, taste], prepend=0.0)
    return [
        catalogue.names[c] for c, w in zip(shoppers.taste_UTF[user, taste].tolist(), weight_F, strict=True) if w > 0
    ]
