"""The learner: it learns, forgets nothing at a restart, and neither growth nor reuse of rows harms it."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from made_events import made, rounds

from models.features import TYPE_CODES, EventColumns
from models.forecaster import Forecaster
from models.gru import Network
from models.history import Users, previous_events
from models.learner import Learner
from models.optimiser import Optimiser
from models.profile import AGGREGATE_COUNT, HIDDEN, Snapshot
from models.settings import LearningSettings, NetworkSettings
from models.snapshot import Weights

NETWORK = NetworkSettings(interest_width=16, item_rows=64, item_width=4, copy_width=8)
LEARNING = LearningSettings(warmup_steps=5, step_events=32, history_events=2_048, backlog_events=1_024)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; a GPU only where there is one."""
    name: str = request.param
    return name if name == "cpu" else request.getfixturevalue("cuda")


def fresh(learning: LearningSettings = LEARNING, seed: int = 1, device: str = "cpu") -> Learner:
    return Learner(NETWORK, learning, seed=seed, device=device)


def feed(learner: Learner, events: EventColumns, span: slice, **how: Any) -> None:
    keys = events.user_row[span].astype(np.uint64) + np.uint64(1)
    learner.observe(keys, events.take(span), {}, **how)


def stream(count: int, seed: int = 2) -> EventColumns:
    return rounds(np.random.default_rng(seed), count)


def test_it_learns_what_follows_what(device: str) -> None:
    """Users who go round in one order: the loss falls far below that of the rule it starts as."""
    events = stream(6_000)
    learner = fresh(device=device)
    losses = []
    for start in range(0, 6_000, 500):
        feed(learner, events, slice(start, start + 500))
        losses.append(learner.learn(100).loss)
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < 2.0  # the source of the events has 0.5 nats; a uniform guess has 4.1


def test_a_step_needs_its_events_and_every_event_is_learned_once() -> None:
    """Fewer events than a step takes wait for the next call; events learned + waiting = events seen."""
    events = stream(150)
    learner = fresh()
    feed(learner, events, slice(0, 31))
    assert learner.learn(10).steps == 0
    feed(learner, events, slice(31, 150))
    report = learner.learn(10)
    assert (report.steps, report.events, report.shed) == (4, 128, 0)
    assert learner.learn(10).events == 0


def test_a_stream_that_begins_with_nothing_but_new_interests(device: str) -> None:
    """No interest has entered the vocabulary when the first events are replayed: learning goes on."""
    learner = fresh(msgspec.structs.replace(LEARNING, admit_at_once=0), device=device)
    feed(learner, made([n % 7 for n in range(128)], list(range(1, 129))), slice(0, 128))
    report = learner.learn(10)
    assert (report.events, len(learner._vocabulary)) == (128, 0)


def test_an_event_sent_twice_is_learned_once() -> None:
    """With ids, the second is passed over, also in another batch; the learner is that of a stream without it."""
    events = stream(400)
    ids = np.arange(1, 401, dtype=np.uint32)
    once, twice = fresh(), fresh()
    for start in range(0, 400, 100):
        feed(once, events, slice(start, start + 100), id_hash_B=ids[start : start + 100])
        again = np.sort(np.concatenate([np.arange(start, start + 100), np.arange(start, start + 100, 7)]))
        keys = events.user_row[again].astype(np.uint64) + np.uint64(1)
        twice.observe(keys, events.take(again), {}, id_hash_B=ids[again])
        twice.observe(keys[-3:], events.take(again[-3:]), {}, id_hash_B=ids[again[-3:]])
        assert once.learn(10).events == twice.learn(10).events
    assert once.weights_bytes() == twice.weights_bytes()


def test_the_same_seed_gives_the_same_bytes() -> None:
    """Deterministic on a CPU; another seed differs; the global generators are not touched."""
    events = stream(400)
    made_bytes = []
    for seed in (1, 1, 2):
        torch.manual_seed(int.from_bytes(np.random.default_rng().bytes(4), "little"))
        learner = fresh(seed=seed)
        feed(learner, events, slice(0, 400))
        learner.learn(100)
        made_bytes.append((learner.weights_bytes(), learner.state_bytes()))
    assert made_bytes[0] == made_bytes[1]
    assert made_bytes[0] != made_bytes[2]


def test_auxiliary_losses_can_be_left_out() -> None:
    """Then neither the decoder nor the head of the next type gets a gradient; the copy head learns as before."""
    events = stream(200)
    start = fresh()._network.state_dict()
    for auxiliary in (True, False):
        learning = LearningSettings(warmup_steps=1, step_events=32, weight_decay=0.0, auxiliary_losses=auxiliary)
        learner = fresh(learning)
        feed(learner, events, slice(0, 200))
        learner.learn(6)
        after = learner._network.state_dict()
        for name in ("next_type.weight", "decoder.weight_hh"):
            assert torch.equal(after[name], start[name]) != auxiliary, name
        assert not torch.equal(after["copy_score.weight"], start["copy_score.weight"])


def test_versions_count_up_and_do_not_change_afterwards(device: str) -> None:
    """weights_bytes is the next version; weights taken before a step stay as they were."""
    events = stream(200)
    learner = fresh(device=device)
    feed(learner, events, slice(0, 200))
    assert learner.version == 0
    learner.learn(1)
    taken = learner.weights()
    before = taken.to_bytes()
    learner.learn(3)
    assert taken.to_bytes() == before
    payload = learner.weights_bytes()
    assert (learner.version, Weights.from_bytes(payload).version) == (1, 1)
    assert Forecaster.from_weights(Weights.from_bytes(payload)).version == 1


def test_a_forecaster_changes_only_once_that_is_told(device: str) -> None:
    """Whoever is asked before a change gets the forecasts of before, whatever was computed since; then they change."""
    events = stream(400)
    events.type[::7] = TYPE_CODES["purchase"]
    learner = fresh(device=device)
    seen: list[list[bytes]] = []
    for start in range(0, 384, 32):
        feed(learner, events, slice(start, start + 32))
        forecaster, probe = learner.forecaster(), learner._history.snapshot(np.arange(8))

        def look(forecaster: Forecaster = forecaster, probe: Snapshot = probe) -> None:
            made = forecaster.forecast(np.ones((8, HIDDEN), np.float32), probe, None, steps=2, top_k=5)
            seen[-1].append(made.probability_ENK.tobytes() + made.purchase_probability_EK.tobytes())

        learner.before_change = look
        seen.append([])
        look()
        assert learner.learn(1).steps == 1
        look(learner.forecaster())
    assert all(len(found) == 4 and found[0] == found[1] for found in seen)  # before the gradient, before the counts
    assert all(found[0] != found[3] for found in seen[1:])


def test_a_restored_learner_goes_on_where_it_stood(device: str) -> None:
    """With its histories observed again, it takes the same steps on the same events, also on those that waited."""
    events = stream(1_200)
    whole = fresh(device=device)
    feed(whole, events, slice(0, 800))
    whole.learn(20)
    assert len(whole._waiting) == 160
    back = Learner.restore(whole.state_bytes(), NETWORK, LEARNING, device=device)
    assert back.weights_bytes() == whole.weights_bytes()
    feed(back, events, slice(0, 800), learn=False)
    assert len(back._waiting) == 160
    for learner in (whole, back):
        feed(learner, events, slice(800, 1_200))
    reports = [learner.learn(100) for learner in (whole, back)]
    assert [r.events for r in reports] == [544, 544]
    assert reports[0].loss == pytest.approx(reports[1].loss, abs=0.4)  # states and replay are those of another history
    again = Learner.restore(back.state_bytes(), NETWORK, LEARNING, device=device)
    feed(again, events, slice(0, 1_200), learn=False)
    assert len(again._waiting) == 16


def test_a_restore_with_other_settings_is_refused() -> None:
    """Weights of another shape are an error that says so; broken bytes too."""
    payload = fresh().state_bytes()
    with pytest.raises(ValueError, match="other \\[network\\] settings"):
        Learner.restore(payload, NetworkSettings(), LEARNING, device="cpu")
    with pytest.raises(ValueError, match="not a learner's state"):
        Learner.restore(b"\x01", NETWORK, LEARNING, device="cpu")


def test_a_backlog_over_its_bound_is_shed_and_counted() -> None:
    """What is too much is not trained, but counted: popularity knows it."""
    events = stream(3_000)
    learner = fresh()
    feed(learner, events, slice(0, 3_000))
    report = learner.learn(1_000)
    assert (report.shed, report.events) == (1_976, 1_024)
    assert learner._vocabulary.events == 3_000


def test_a_loss_that_is_not_finite_never_reaches_the_optimiser(device: str) -> None:
    """The step is skipped and counted, the weights stay bit for bit, and learning goes on afterwards."""
    events = stream(200)
    learner = fresh(device=device)
    feed(learner, events, slice(0, 128))
    learner.learn(2)
    before = {n: t.clone() for n, t in learner._network.state_dict().items()}
    learner._history.number[:] = np.nan
    learner._history.hidden[:] = np.nan
    report = learner.learn(2)
    assert (report.steps, report.skipped_non_finite) == (2, 2)
    assert np.isnan(report.loss)
    assert all(torch.equal(t, before[n]) for n, t in learner._network.state_dict().items() if n in before)
    learner._history.number[:] = 0
    learner._history.hidden[:] = 0
    feed(learner, events, slice(128, 200))
    assert learner.learn(10).skipped_non_finite == 0


def test_growth_keeps_rows_and_their_sums() -> None:
    """Doubling a table keeps weights and optimiser sums of the old rows, and the dense moments."""
    net = Network(NETWORK, 10)
    optimiser = Optimiser(net, LEARNING)
    sum(p.square().sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    assert optimiser.step(1.0)
    rows = NETWORK.hashed_rows + 10
    weights, sums = net.interest.detach().clone(), optimiser._sums["interest"].clone()
    moments = optimiser._moments[optimiser._dense[0]]["exp_avg"].clone()
    assert (sums > 0).all()
    optimiser.grow(11, np.random.default_rng(0))
    assert net.capacity == 64
    assert torch.equal(net.interest[:rows], weights)
    assert optimiser.average.interest is net.interest
    assert torch.equal(optimiser._sums["interest"][:rows], sums)
    assert not optimiser._sums["interest"][rows:].any()
    assert torch.equal(optimiser._moments[optimiser._dense[0]]["exp_avg"], moments)
    sum(p.square().sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
    assert optimiser.step(1.0)


def test_a_reused_row_starts_anew(device: str) -> None:
    """An interest that inherits a row inherits neither weights, nor bias, nor sums, nor followers."""
    learning = LearningSettings(
        warmup_steps=1, step_events=32, history_events=16_384, backlog_events=8_192, interest_ttl_events=1_000
    )
    learner = fresh(learning, device=device)
    feed(learner, made([0, 1] * 32, [5, 6] * 32), slice(0, 64))
    learner.learn(2)
    row = NETWORK.hashed_rows + int(learner._vocabulary.find(np.array([5], np.uint32))[0])
    learner._network.bias.data[row] = 3.0
    before = learner._network.interest[row].detach().clone()
    feed(learner, made(np.arange(6_000) % 7, np.arange(6_000) % 3 + 10), slice(0, 6_000))
    learner.learn(128)
    assert int(learner._vocabulary.find(np.array([5], np.uint32))[0]) == -1
    assert not torch.equal(learner._network.interest[row], before)
    assert float(learner._network.bias[row].detach()) < 1.0
    assert row - NETWORK.hashed_rows not in learner._successors.follower_VM
    optimiser, random = learner._optimiser, np.random.default_rng(0)
    optimiser._sums["interest"][row] = 9.0
    optimiser.reset_rows(np.array([row - NETWORK.hashed_rows]), random)
    assert optimiser._sums["interest"][row] == 0.0
    assert learner._network.bias[row].item() == 0.0


def test_a_decaying_sum_keeps_a_rate_alive() -> None:
    """After many steps of the same gradient a row still moves: a plain sum would have stopped it."""
    net = Network(NETWORK, 4)
    optimiser = Optimiser(net, LearningSettings(accumulator_decay=0.9, clip=1e9))
    for _ in range(300):
        net.bias.grad = torch.ones_like(net.bias)
        before = net.bias.detach().clone()
        optimiser.step(1.0)
        moved = (net.bias.detach() - before).abs().mean()
    plain = LearningSettings().embedding_rate / 300**0.5
    assert moved.item() > 3 * plain


def test_forecasts_are_made_with_the_average_of_the_weights() -> None:
    """They are the running mean of where the steps led, tables excepted, and both are there after a restart."""
    net = Network(NETWORK, 4)
    learning = LearningSettings(average_decay=0.5, warmup_steps=1, weight_decay=0.0)
    optimiser = Optimiser(net, learning)
    mean = net.copy_number.weight.detach().clone()
    for step in range(20):
        sum(p.square().sum() for p in net.parameters()).backward()  # type: ignore[union-attr]
        assert optimiser.step(1.0)
        optimiser.zero()
        mean += (net.copy_number.weight.detach() - mean) * max(0.5, 9.0 / (step + 10))
        assert torch.allclose(optimiser.average.copy_number.weight, mean, atol=1e-6)
        assert torch.equal(optimiser.average.bias, net.bias)
    assert not torch.allclose(net.copy_number.weight, mean, atol=1e-4)
    other = Network(NETWORK, 4)
    other.load_state_dict(optimiser.average.state_dict())
    again = Optimiser(other, learning)
    again.load(optimiser.to_bytes())
    assert torch.equal(other.copy_number.weight, net.copy_number.weight)
    assert torch.equal(again.average.copy_number.weight, optimiser.average.copy_number.weight)


def test_carried_states_equal_those_of_the_worker() -> None:
    """What the learner remembers as the state before an event is what `encode` says, for any cut."""
    events = stream(300)
    one, two = fresh(), fresh()
    feed(one, events, slice(0, 300), learn=False)
    for start in range(0, 300, 7):
        feed(two, events, slice(start, min(300, start + 7)), learn=False)
    assert one._history.hidden[:300] == pytest.approx(two._history.hidden[:300], abs=1e-5)
    assert np.array_equal(one._history.previous[:300], two._history.previous[:300])


def test_previous_events_of_each_user() -> None:
    """Every event points to the one before of its user, over batches too."""
    previous, newest = previous_events(np.array([1, 0, 1, 1, 0]), np.array([-1, 7]), 10)
    assert previous.tolist() == [7, -1, 10, 12, 11]
    assert newest.tolist() == [14, 13]


def test_users_are_bounded() -> None:
    """The longest unseen half gives way; those that are there keep their records."""
    users = Users(100)
    for first in range(0, 1_000, 50):
        keys = np.arange(first + 1, first + 51, dtype=np.uint64)
        rows = users.rows(keys)
        users.last_event[rows] = np.arange(first, first + 50)
        assert len(users) <= 100
        assert (users.records["key"][rows] == keys).all()
    newest = np.arange(951, 1_001, dtype=np.uint64)
    assert (users.last_event[users.rows(newest)] == np.arange(950, 1_000)).all()


def test_a_rise_of_the_loss_raises_the_rates_for_a_while() -> None:
    """ADWIN on the online loss: a jump up boosts, a jump down does not, and the boost ends."""
    learner = fresh()
    random = np.random.default_rng(0)
    for level in (3.0, 1.0):
        for loss in random.normal(level, 0.1, 300).tolist():
            learner._watch(loss)
    assert learner._boost_steps == 0
    boosted = 0
    for loss in random.normal(3.0, 0.1, 600).tolist():
        learner._watch(loss)
        boosted += learner._boost_steps > 0
    assert 100 <= boosted < 600
    assert learner._boost_steps == 0


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
def test_a_gpu_takes_the_same_steps(cuda: str) -> None:
    """Same seed, same events: losses as on the CPU, and weights that moved the same way."""
    events = stream(1_000)
    losses: dict[str, list[float]] = {}
    tensors = {}
    for device in ("cpu", cuda):
        learner = fresh(device=device)
        losses[device] = []
        for start in range(0, 1_000, 100):
            feed(learner, events, slice(start, start + 100))
            losses[device].append(learner.learn(100).loss)
        tensors[device] = learner.weights().tensors
    assert losses[cuda] == pytest.approx(losses["cpu"], rel=0.01)
    start = fresh().weights().tensors
    for name in (
        n for n, t in start.items() if n.startswith("network.") and t.size > 100 and len(t) == len(tensors[cuda][n])
    ):
        ours, theirs = ((tensors[device][name] - start[name]).ravel() for device in (cuda, "cpu"))
        assert ours @ theirs > 0.9 * np.linalg.norm(ours) * np.linalg.norm(theirs) > 0, name


@pytest.mark.gpu
def test_forecasts_beside_a_gpu_are_those_of_its_weights(cuda: str) -> None:
    """The learner's own forecaster, on the CPU, follows every step, growth and count, as its serialised weights do."""
    events = stream(400)
    learner = fresh(device=cuda)
    gap_s, aggregates = np.zeros(8, np.float32), np.zeros((8, AGGREGATE_COUNT), np.float32)
    hidden = np.zeros((40, HIDDEN), np.float32)
    last: Any = None
    for start in range(0, 400, 100):
        feed(learner, events, slice(start, start + 100))
        assert learner.learn(1).steps == 1
        few = events.take(slice(start, start + 8))
        ours = learner.forecaster().encode(few, gap_s, aggregates, hidden)[1]
        theirs = Forecaster.from_weights(learner.weights()).encode(few, gap_s, aggregates, hidden)[1]
        assert ours == pytest.approx(theirs, abs=1e-6)
        assert last is None or not np.array_equal(learner._network.gru.weight_hh_l0.detach().cpu().numpy(), last)
        last = learner._network.gru.weight_hh_l0.detach().cpu().numpy()


@pytest.mark.gpu
def test_what_a_gpu_learned_goes_on_elsewhere(cuda: str) -> None:
    """A state moves between devices both ways with AdamW's moments and steps: the next losses are the same."""
    events = stream(900)
    for origin, target in ((cuda, "cpu"), ("cpu", cuda)):
        first = fresh(device=origin)
        feed(first, events, slice(0, 600))
        first.learn(100)
        payload = first.state_bytes()
        losses = []
        for device in (origin, target):
            back = Learner.restore(payload, NETWORK, LEARNING, device=device)
            assert back._optimiser.steps == 18
            feed(back, events, slice(0, 600), learn=False)
            feed(back, events, slice(600, 900))
            report = back.learn(100)
            assert (report.events, report.skipped_non_finite) == (320, 0)
            losses.append(report.loss)
        assert losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.gpu
def test_auto_takes_the_gpu(cuda: str) -> None:
    """Without a word about the device the network is on the GPU, fresh and restored."""
    learner = Learner(NETWORK, LEARNING, seed=1)
    assert learner._network.bias.is_cuda
    assert Learner.restore(learner.state_bytes(), NETWORK, LEARNING)._network.bias.is_cuda
