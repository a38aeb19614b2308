"""The rule made from users' own histories: it keeps the rate it was asked for, and learns only where that helps."""

from __future__ import annotations

import math
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from river.drift import KSWIN

from models.profile import EmissionSettings, advance, replay
from models.shift import ShiftSettings
from models.shift_baselines import DummyDetector, LookedUpKSWIN, Outcome, RuleDetector, frozen_detector, set_knob
from models.shift_calibration import (
    Histories,
    Splices,
    alarm_rate,
    calibrate,
    columns,
    fit,
    match,
    match_ages,
    mean_delay,
    memory_of,
    next_rule,
    run,
    session_starts,
    splice,
)
from models.shift_groups import GroupTable, Shadow, Tallies
from models.shift_planted import planted, softened
from models.shift_rule import AGES, Rule, fixed_rule
from models.shift_suites import Study, delay_row, histories_of, meaning_row, planted_row, rate_row
from models.walk import FEATURE_COUNT, FEATURES, user_dtype_of

SETTINGS = ShiftSettings(false_alarm_events=100.0)


def shop(users: int, events: int, *, seed: int, visit: int = 5, loyal: float = 0.9, pause_s: int = 40_000) -> Histories:
    """Users with three favourite interests of 40 each, a share of events anywhere; visits of `visit` events."""
    rng = np.random.default_rng(seed)
    mine = np.array([rng.choice(40, 3, replace=False) for _ in range(users)])
    user = np.repeat(np.arange(users), events)
    favourite = mine[user, rng.integers(0, 3, len(user))]
    interest = np.where(rng.random(len(user)) < loyal, favourite, rng.integers(0, 40, len(user))) + 1
    place = np.tile(np.arange(events), users)
    time_ms = 1_600_000_000_000 + (place // visit * pause_s + place % visit * 60) * 1_000
    return histories_of(user, interest.astype(np.uint32), time_ms)


def test_the_requested_rate_is_kept_on_other_users() -> None:
    """Thresholds from some users give others about the requested rate, where enough alarms are expected."""
    tuned, others = shop(120, 90, seed=1), shop(120, 90, seed=2)
    rule = calibrate(tuned, SETTINGS, np.random.default_rng(0))
    monitored, alarms = alarm_rate(others, rule, SETTINGS)
    assert monitored / SETTINGS.false_alarm_events > 30
    assert 0.6 < monitored / alarms / SETTINGS.false_alarm_events < 1.7


def test_learning_is_never_clearly_worse_than_the_fixed_rule() -> None:
    """On users that it has not seen, the chosen rule is about as soon as the best fixed one, or sooner."""
    tuned, others = shop(60, 80, seed=3), shop(60, 80, seed=4)
    splices = splice(others, SETTINGS, np.random.default_rng(1), per_user=2, window=40, after=35)
    found = {}
    for statistic in ("auto", "fixed"):
        settings = msgspec.structs.replace(SETTINGS, statistic=statistic)
        detector = RuleDetector(statistic, calibrate(tuned, settings, np.random.default_rng(0)), settings)
        found[statistic] = mean_delay(splices, detector.at(set_knob(detector, others, 100.0)), settings)
    assert found["auto"] < found["fixed"] + 2.0


def test_learning_switches_itself_off_where_it_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients that are noise lose against the fixed rule on the users that were not fitted on."""
    from models import shift_calibration

    noise = np.random.default_rng(2)
    monkeypatch.setattr(shift_calibration, "fit", lambda *_: tuple(noise.normal(0.0, 1.0, FEATURE_COUNT + 1).tolist()))
    rule = calibrate(shop(60, 80, seed=5), SETTINGS, np.random.default_rng(0))
    assert not rule.name.startswith("learned")


def test_a_stream_without_pauses_gets_a_rule() -> None:
    """One endless visit gives no sessions to learn from; a rule is made all the same."""
    endless = shop(16, 200, seed=6, pause_s=60)
    for statistic in ("auto", "learned"):
        rule = calibrate(endless, msgspec.structs.replace(SETTINGS, statistic=statistic), np.random.default_rng(0))
        assert all(math.isfinite(t) and t > 0 for t in rule.thresholds)


def test_too_few_users_are_refused() -> None:
    """Nothing is fitted on a handful of users."""
    with pytest.raises(ValueError, match="are needed"):
        calibrate(shop(5, 60, seed=7), SETTINGS, np.random.default_rng(0))


def test_an_exchangeable_stream_obeys_the_floor() -> None:
    """Where a user's events come independently, a threshold of log ARL0 raises at most one alarm in ARL0 events."""
    calm = shop(150, 150, seed=8, loyal=1.0)
    rule = fixed_rule(by_session=False, threshold=math.log(200.0), drift=0.25, kappa=8.0)
    monitored, alarms = alarm_rate(calm, rule, ShiftSettings(age_min_events=40))
    assert monitored > 10_000 and alarms <= monitored / 200.0


def rules() -> list[Rule]:
    learned = (0.7, 0.0, -0.4, 0.2, -1.7, -0.2, -0.2, -0.15, 0.3, 1.2)
    plain = fixed_rule(by_session=True, threshold=0.2, drift=0.1, unit_events=8)
    return [
        fixed_rule(by_session=False, threshold=0.5, drift=0.1, short_share=0.3),
        plain,
        msgspec.structs.replace(plain, coefficients=learned, usual_guarded=True, hold_spreads=1.0),
        msgspec.structs.replace(
            fixed_rule(by_session=False, threshold=3.0, drift=0.1, short_share=0.3), name="rise", rise_scale=0.5
        ),
    ]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.name}-{rule.unit_events}")
def test_names_of_interests_do_not_matter(rule: Rule) -> None:
    """Other keys for the same interests: the same evidence, alarms and onsets, bit for bit."""
    histories = shop(12, 120, seed=9)
    keys = np.random.default_rng(3).permutation(2**16)[: int(histories.interest.max()) + 1].astype(np.uint32) + 1
    renamed = Histories(
        user=histories.user, interest=keys[histories.interest], time_ms=histories.time_ms, share=histories.share
    )
    one, other = run(histories, rule, SETTINGS), run(renamed, rule, SETTINGS)
    assert one.evidence_B.tobytes() == other.evidence_B.tobytes()
    assert one.alert_B.tobytes() == other.alert_B.tobytes() and one.alert_B.any()
    assert one.onset_events_B.tobytes() == other.onset_events_B.tobytes()


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.name}-{rule.unit_events}")
def test_evidence_is_always_a_number(rule: Rule) -> None:
    """Rare and common interests, one interest only, equal times, steps back: evidence is finite."""
    rng = np.random.default_rng(10)
    user = np.sort(rng.integers(0, 6, 2_000))
    interest = np.where(user == 0, 1, 1 + rng.zipf(1.3, 2_000) % 5_000).astype(np.uint32)
    time_ms = 1_600_000_000_000 + np.cumsum(rng.choice([-3_000_000, 0, 0, 1_000, 9_000_000], 2_000))
    histories = Histories(
        user=user, interest=interest, time_ms=time_ms, share=rng.choice([1e-9, 1e-4, 0.5, 1.0], 2_000)
    )
    done = run(histories, rule, SETTINGS, features=True)
    assert np.isfinite(done.evidence_B).all() and np.isfinite(done.features_BF).all()


def test_units_end_at_pauses_and_after_so_many_events() -> None:
    """With blocks of 8, a user's evidence of a visit without pauses stands after every 8 events."""
    endless = shop(1, 64, seed=11, pause_s=60)
    rule = fixed_rule(by_session=True, threshold=1e9, drift=0.0, unit_events=8)
    features = run(endless, rule, SETTINGS, features=True).features_BF
    distinct = np.exp(features[:, 2]).round().astype(int)
    assert (distinct[::8] == 1).all() and distinct.max() <= 8
    assert len(session_starts(endless, SETTINGS)) == 1


def test_an_alarm_keeps_a_share_of_what_was_known() -> None:
    """After an alarm the old profile weighs less but is not gone: who comes home again is no stranger."""
    interest = np.array([1, 2, 3] * 40 + [7, 8, 9] * 10 + [1, 2, 3] * 10, np.uint32)
    histories = histories_of(
        np.zeros(len(interest), np.int64), interest, 1_600_000_000_000 + np.arange(len(interest)) * 60_000
    )
    histories = with_share(histories, share=0.01)
    kept = fixed_rule(by_session=False, threshold=6.0, drift=0.25)
    ratio = {}
    for share in (0.0, 0.4):
        done = run(histories, msgspec.structs.replace(kept, kept_share=share), SETTINGS)
        assert done.alert_B[120:150].any()
        ratio[share] = float(done.ratio_B[150])
    assert ratio[0.4] < ratio[0.0] - 1.0


def test_an_unusual_visit_waits_for_a_usual_one() -> None:
    """What lies far above the user's own level is not learned while such visits go on, and is after a usual one."""
    visits = [[1, 2, 3, 1, 2]] * 20 + [[11, 12, 13, 11, 12]] * 2 + [[1, 2, 3, 1, 2]] * 2
    interest = np.array(visits, np.uint32).ravel()
    place = np.arange(len(interest))
    time_ms = 1_600_000_000_000 + (place // 5 * 40_000 + place % 5 * 60) * 1_000
    histories = with_share(histories_of(np.zeros(len(interest), np.int64), interest, time_ms), share=0.001)
    # no evidence ever builds: only the user's own level can hold
    silent = msgspec.structs.replace(
        fixed_rule(by_session=True, threshold=1e9, drift=0.25), coefficients=(0.0,) * FEATURE_COUNT + (-1.0,)
    )
    ratio = {
        spreads: run(histories, msgspec.structs.replace(silent, hold_spreads=spreads), SETTINGS).ratio_B
        for spreads in (2.0, 1e9)
    }
    second = slice(105, 108)
    assert (ratio[2.0][100:103] > 2.0).all() and (ratio[2.0][second] > 2.0).all()
    assert (ratio[1e9][second] < 0.0).all(), "without the guard the first visit is already known"
    after = with_share(
        histories_of(
            np.zeros(len(interest) + 3, np.int64),
            np.append(interest, [11, 12, 13]).astype(np.uint32),
            np.append(time_ms, time_ms[-1] + 40_000_000 + np.arange(3) * 60_000),
        ),
        share=0.001,
    )
    held = run(after, msgspec.structs.replace(silent, hold_spreads=2.0), SETTINGS)
    assert (held.ratio_B[-3:] < 0.0).all(), "a usual visit releases what was held"


def test_a_rule_of_fewer_features_goes_on_as_it_was() -> None:
    """Coefficients that were written before a feature came: the constant stays the constant."""
    plain = fixed_rule(by_session=True, threshold=0.2, drift=0.1)
    old = msgspec.structs.replace(plain, coefficients=(1.0, 0.0, 0.5, -0.7))
    assert old.coefficients_F().tolist() == [1.0, 0.0, 0.5, *[0.0] * (FEATURE_COUNT - 3), -0.7]


def test_ages_keep_the_whole_rate_where_it_is_seen() -> None:
    """Thresholds by age raise about one alarm in the requested events; of a rate not seen they stay where they were."""
    users = shop(60, 90, seed=17, loyal=0.7)
    plain = fixed_rule(by_session=True, threshold=5.0, drift=0.25)
    folds = [(users, plain)]
    for rate, least, most in ((50.0, 0.8, 2.0), (100_000.0, 0.0, math.inf)):
        matched = match(folds, plain, SETTINGS, rate)
        aged = match_ages(folds, matched, SETTINGS)
        monitored, alarms = alarm_rate(users, aged, SETTINGS)
        assert least <= monitored / max(1.0, alarms) / rate <= most
        if monitored < rate:
            assert all(0.8 < t / matched.thresholds[0] < 1.25 for t in aged.thresholds)


def test_softened_splices_go_on_with_what_the_user_did_in_truth() -> None:
    """S2: own events after the shift are the user's next ones in their order, none of them twice; times never fall."""
    histories = shop(30, 90, seed=16)
    marked = Histories(
        user=histories.user,
        interest=np.arange(1, len(histories) + 1, dtype=np.uint32),  # each event can be told apart
        time_ms=histories.time_ms,
        share=histories.share,
    )
    made = splice(marked, SETTINGS, np.random.default_rng(3), per_user=3, window=30, after=30)
    soft = softened(made, marked, SETTINGS, seed=0)
    first = soft.runs.first
    assert 0 < soft.runs.users < made.runs.users, "some have too few events left"
    own_after = 0
    for r in range(soft.runs.users):
        told = soft.runs.interest[first[r] : first[r + 1]].astype(np.int64) - 1
        mine = told[marked.user[told] == soft.owner[r]]
        begin = marked.first[soft.owner[r]]
        assert mine.tolist() == list(range(begin, begin + len(mine))) and len(mine) >= soft.at[r]
        assert len(told) == soft.at[r] + soft.window and len(mine) < len(told)
        assert (np.diff(soft.runs.time_ms[first[r] : first[r + 1]]) >= 0).all()
        own_after += len(mine) - int(soft.at[r])
    assert own_after > 0.2 * soft.runs.users * soft.window


def with_share(histories: Histories, share: float) -> Histories:
    return Histories(
        user=histories.user,
        interest=histories.interest,
        time_ms=histories.time_ms,
        share=np.full(len(histories), share),
    )


def study() -> Study:
    histories = shop(40, 90, seed=12)
    return Study(
        tuned=histories,
        reported=histories,
        reported_users=np.arange(40),
        settings=SETTINGS,
        false_alarm_events=100.0,
        window=40,
        seed=0,
    )


def test_the_dummy_keeps_its_rate_and_finds_little() -> None:
    """A clock has the requested rate and no delay worth the name; a detector beats it on made shifts."""
    given = study()
    made = splice(given.reported, SETTINGS, np.random.default_rng(1), per_user=2, window=40, after=30)
    dummy = DummyDetector(SETTINGS)
    assert 0.8 < (rate_row(given, dummy, 100.0).measured_arl0 or 0.0) / 100.0 < 1.25
    ours = RuleDetector("x", fixed_rule(by_session=False, threshold=6.0, drift=0.25), SETTINGS)
    found = delay_row(given, ours, set_knob(ours, given.reported, 100.0), made, "S1")
    clock = delay_row(given, dummy, set_knob(dummy, given.reported, 100.0), made, "S1")
    assert found.missed is not None and clock.missed is not None and found.missed < clock.missed - 0.3
    low, high = found.ci95["missed"]
    assert low <= found.missed <= high


def test_users_that_differ_widen_the_interval_of_a_rate() -> None:
    """One user with most of the alarms: drawing users anew moves the rate far more than a Poisson count does."""

    class Bursty(DummyDetector):
        def outcome(self, histories: Histories, knob: float) -> Outcome:
            alarm_B = (histories.user == 3) & (np.arange(len(histories)) % 2 == 0)
            return Outcome(alarm_B=alarm_B, monitored=len(histories))

    row = rate_row(study(), Bursty(SETTINGS), 1.0)
    (low, high), (few, many) = row.ci95["measured_arl0"], row.ci95["measured_arl0_by_users"]
    assert few < low < (row.measured_arl0 or 0.0) < high < many
    even = rate_row(study(), DummyDetector(SETTINGS), 20.0)
    assert even.ci95["measured_arl0_by_users"][1] / even.ci95["measured_arl0_by_users"][0] < 1.3


def test_planted_shifts_are_named() -> None:
    """S3: what the alarm says was gained and lost is what was planted, and the onset is near."""
    given = study()
    ours = RuleDetector("x", fixed_rule(by_session=True, threshold=6.0, drift=0.25), SETTINGS)
    row = planted_row(given, ours, 1.0, planted(given.reported, 1, users=60))
    assert (row.gained_hit_3 or 0) > 0.85 and (row.lost_hit_3 or 0) > 0.85 and (row.onset_error or 0) <= 8


def test_meaning_needs_events_that_follow() -> None:
    """S7 counts only alarms with a past and a future to compare, and random moments beside each."""
    given = study()
    ours = frozen_detector(fixed_rule(by_session=False, threshold=2.0, drift=0.25), SETTINGS)
    row = meaning_row(given, ours, 1.0)
    assert row.alerts and row.confirmed is not None and row.confirmed_random is not None
    assert row.confirmed <= 1.0 and row.confirmed_random >= 0.0


def test_meaning_is_that_of_shifts_and_not_of_moments() -> None:
    """S7: alarms at lasting changes are confirmed far more often than random moments, those of a clock are not."""
    one, other = shop(150, 90, seed=13), shop(150, 90, seed=14)
    turn = 40 + (7 * one.user) % 30
    shifted = (one.user % 3 == 0) & (np.arange(len(one)) - one.first[one.user] >= turn)
    users = histories_of(one.user, np.where(shifted, other.interest, one.interest), one.time_ms)
    given = replace(study(), tuned=users, reported=users, reported_users=np.arange(150))
    ours = RuleDetector("x", fixed_rule(by_session=False, threshold=4.0, drift=0.25), SETTINGS)
    found, clock = meaning_row(given, ours, 1.0), meaning_row(given, DummyDetector(SETTINGS), 60.0)
    assert (found.alerts or 0) > 20 and (found.confirmed or 0) > (found.confirmed_random or 1) + 0.25
    assert (clock.alerts or 0) > 50 and abs((clock.confirmed or 0) - (clock.confirmed_random or 1)) < 0.15


def test_a_visit_of_a_settled_user_counts_for_more() -> None:
    """How far a user's level lies below that of most users is added, to the share of the mean that is asked for."""
    rng = np.random.default_rng(5)
    own, foreign = (rng.normal(m, 1.0, (400, FEATURE_COUNT)) for m in (0.0, 1.0))
    place = FEATURES.index("settled")
    free, more = (fit(own, foreign, (0, 1, 2), share) for share in (0.0, 2.0))
    assert free[place] == 0.0 and more[place] == pytest.approx(2.0 * more[0]) and more[0] > 0.0
    assert [c for i, c in enumerate(free) if i != place] == [c for i, c in enumerate(more) if i != place]

    rule = msgspec.structs.replace(fixed_rule(by_session=True, threshold=1e9, drift=0.25), hold_share=1.0)
    settled, roving = (shop(1, 200, seed=19, loyal=loyal) for loyal in (1.0, 0.2))
    level = {
        name: run(with_share(users, share=0.02), rule, SETTINGS, features=True).features_BF[-1, place]
        for name, users in (("settled", settled), ("roving", roving))
    }
    assert level["settled"] > 0.5 and level["roving"] == 0.0


def test_a_rise_above_the_own_mean_is_found_sooner() -> None:
    """At one rate of alarms on users of every kind, the second statistic is ahead where a settled user changes."""
    users, one, other = shop(60, 120, seed=23, loyal=0.6), *(shop(40, 150, seed=s, loyal=0.95) for s in (24, 25))
    shifted = (np.arange(len(one)) - one.first[one.user]) >= 90
    changed = histories_of(one.user, np.where(shifted, other.interest, one.interest), one.time_ms)
    made = Splices(runs=changed, at=np.full(40, 90), owner=np.arange(40), window=60)
    plain = fixed_rule(by_session=False, threshold=3.0, drift=0.25, kappa=20.0, short_share=0.3)
    delay = {}
    for scale in (0.0, 1.0):
        detector = RuleDetector("x", msgspec.structs.replace(plain, rise_scale=scale), SETTINGS)
        delay[scale] = mean_delay(made, detector.at(set_knob(detector, users, 100.0)), SETTINGS)
    assert delay[1.0] < 0.8 * delay[0.0]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.name}-{rule.unit_events}")
def test_a_history_may_be_cut_anywhere(rule: Rule) -> None:
    """Event by event, in parts, at once, and after a restore from bytes: the same evidence, alarms and records."""
    histories = shop(4, 90, seed=27, loyal=0.7)
    events = columns(histories.user, histories.interest, histories.time_ms)
    whole = np.zeros(4, user_dtype_of(0))
    at_once = replay(whole, events, histories.share, rule, SETTINGS)
    assert at_once.alert_B.any()
    for size in (1, 64):
        records = np.zeros(4, user_dtype_of(0))
        for start in range(0, len(events), size):
            part = slice(start, start + size)
            records = np.frombuffer(records.tobytes(), records.dtype).copy()
            done = replay(records, events.take(part), histories.share[part], rule, SETTINGS)
            assert done.evidence_B.tobytes() == at_once.evidence_B[part].tobytes()
            assert done.alert_B.tobytes() == at_once.alert_B[part].tobytes()
        assert records.tobytes() == whole.tobytes()


def test_a_rule_without_the_second_statistic_forgets_it() -> None:
    """What one rule had added up does not keep the next one from calming down, nor count when it comes back."""
    histories = shop(1, 120, seed=29, loyal=0.5)
    events = columns(histories.user, histories.interest, histories.time_ms)
    plain = fixed_rule(by_session=False, threshold=1e9, drift=0.1)
    records = np.zeros(1, user_dtype_of(0))
    replay(records, events, histories.share, msgspec.structs.replace(plain, rise_scale=1.0), SETTINGS)
    assert records["rise"][0] > 0
    replay(records, events, histories.share, plain, SETTINGS)
    assert records["rise"][0] == 0


def test_the_detector_has_sixteen_bytes_a_user() -> None:
    """What it remembers of a user beside the profile."""
    fields = ("evidence", "rise", "session_nats", "session_count", "session_known", "session_share", "session_rarity",
              "level", "spread", "watch")  # fmt: skip
    assert sum(user_dtype_of(0)[name].itemsize for name in fields) == 16


def test_shares_leave_the_user_out() -> None:
    """What only one user does is as rare for him as what nobody does; memory is longer where histories are long."""
    histories = histories_of(
        np.repeat([0, 1], 50), np.repeat([1, 2], 50).astype(np.uint32), np.arange(100, dtype=np.int64)
    )
    assert histories.share.max() < 0.01 < shop(30, 40, seed=1).share.max()
    assert memory_of(shop(2, 1_200, seed=1), SETTINGS) > memory_of(histories, SETTINGS)
    assert len(columns(histories.user, histories.interest, histories.time_ms)) == 100 and AGES == 7


def test_looked_up_p_values_change_no_alarm() -> None:
    """The faster KSWIN drifts where river's does, with ties and without."""
    rng = np.random.default_rng(4)
    for digits in (0, 6):
        numbers = np.round(np.concatenate([rng.normal(m, 1.0, 150) for m in (0.0, 1.5, 0.0)]), digits).tolist()
        plain, fast = (kind(alpha=0.01, window_size=40, stat_size=15, seed=7) for kind in (KSWIN, LookedUpKSWIN))
        said = []
        for number in numbers:
            plain.update(number)
            fast.update(number)
            assert fast.drift_detected == plain.drift_detected and fast.p_value == pytest.approx(plain.p_value)
            said.append(fast.drift_detected)
        assert 1 <= sum(said) < 20


def test_what_alarms_too_many_leave_behind_is_bounded_and_fades() -> None:
    """Alarms at every event raise all thresholds by twelve steps at most; without alarms that is forgotten again."""
    settings = ShiftSettings(evidence="event", refractory_events=0, age_min_events=1)
    rule = fixed_rule(by_session=False, threshold=1.0, drift=0.25)
    rule = msgspec.structs.replace(rule, tail=1.0, false_alarm_events=20.0)

    def after(events: int, offset: float, threshold: float) -> float:
        table = GroupTable(settings)
        table.rule = msgspec.structs.replace(rule, thresholds=(threshold,) * AGES)
        table.surges.offset = offset
        made = columns(np.arange(events) % 50, np.full(events, 9, np.uint32), np.arange(events) * 1_000)
        records = np.zeros(50, user_dtype_of(settings.profile_interests))
        done = advance(records, made, table, settings, EmissionSettings(), np.zeros(events, np.bool_))
        assert done.crowd is not None
        return float(done.crowd.offset[0])

    calm = after(450, 1.2, 1e9)  # 400 monitored: twenty alarms' worth
    assert after(450, 0.0, -1e9) <= 1.2 and -1.2 <= calm < 1.2 - 20 * 0.1
    assert after(450, -1.2, 1e9) == pytest.approx(-1.2)


def test_a_far_rate_asks_for_more_than_a_straight_line_does() -> None:
    """Few events and a rare rate: the threshold grows by a power, and is not below the setting."""
    few = shop(30, 90, seed=8, loyal=0.6)
    plain = fixed_rule(by_session=True, threshold=1.0, drift=0.25)
    near, far = (match([(few, plain)], plain, SETTINGS, rate) for rate in (100.0, 100_000.0))
    assert near.thresholds[0] < SETTINGS.threshold <= far.thresholds[0]
    assert far.tail < near.tail
    lower = msgspec.structs.replace(SETTINGS, threshold=0.1)
    assert match([(few, plain)], plain, lower, 100_000.0).thresholds[0] > near.thresholds[0] * 600.0**0.3


def test_a_rule_is_fitted_anew_when_the_events_have_about_doubled() -> None:
    """Epochs double, less the records that could not be used: those must not put a refit off for an epoch."""
    users = shop(40, 120, seed=9)
    table = GroupTable(SETTINGS)
    key = users.user.astype(np.uint64)
    table.shadow = Shadow(key, users.interest, users.time_ms)
    table.events, table.rule_epoch = 8_000, 4_001
    next_rule(table, Tallies.zeros(), SETTINGS)
    assert table.rule_epoch == 8_000 and table.rule.false_alarm_events == SETTINGS.false_alarm_events
    kept = table.rule
    table.events = 15_000
    next_rule(table, Tallies.zeros(), SETTINGS)
    assert table.rule_epoch == 8_000 and table.rule.coefficients == kept.coefficients
