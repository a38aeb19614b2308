"""The sampled softmax: right on average, close to the whole one, and steps that are as large as what was met."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from made_events import made, rounds
from torch import Tensor

from models.gru import CROWD_COUNT, Network
from models.learner import Learner
from models.optimiser import Optimiser
from models.profile import HIDDEN
from models.sampled_softmax import Draw, log_softmax_of
from models.settings import LearningSettings, NetworkSettings

SETTINGS = NetworkSettings(interest_width=16, item_rows=64, item_width=4, copy_width=8)
ROWS = 500
MOMENTS = 12


def case() -> tuple[Network, dict[str, Any]]:
    """A network that has left its start, and moments with followers, some of them the target; row 7 is hardly met."""
    torch.manual_seed(3)
    random = np.random.default_rng(3)
    network = Network(SETTINGS, ROWS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    popularity_V = (1.0 / np.arange(1, ROWS + 1)).astype(np.float32) * 100.0
    popularity_V[7] = 1e-3
    follower_EM = torch.from_numpy(random.integers(0, ROWS, (MOMENTS, 4)))
    for row_M in follower_EM:
        row_M[:] = torch.from_numpy(random.choice(ROWS, 4, replace=False))
    lift_EM = torch.rand(MOMENTS, 4) * 4.0 + 0.1
    lift_EM[:, 3] = 0.0  # a place that is not used
    follower_EM[:, 3] = 0
    target_E = torch.from_numpy(random.integers(0, ROWS, MOMENTS))
    target_E[0], target_E[1], target_E[2] = 7, follower_EM[1, 0], 0
    return network, {
        "state_EH": torch.randn(MOMENTS, HIDDEN),
        "follower_EM": follower_EM,
        "lift_EM": lift_EM,
        "live_E": torch.ones(MOMENTS),
        "log_popularity_V": torch.from_numpy(np.log(popularity_V / popularity_V.sum())),
        "crowd_VK": torch.randn(ROWS, CROWD_COUNT),
        "target_E": target_E,
        "popularity_V": popularity_V,
    }


def whole(network: Network, given: dict[str, Any]) -> Tensor:
    names = ("state_EH", "follower_EM", "lift_EM", "live_E", "log_popularity_V", "crowd_VK")
    logit_EV = network.logits(*(given[name] for name in names))
    return torch.log_softmax(logit_EV, dim=1).gather(1, given["target_E"].unsqueeze(1)).squeeze(1)


def sampled(network: Network, given: dict[str, Any], draws: int, random: np.random.Generator) -> Tensor:
    rest = {name: value for name, value in given.items() if name != "popularity_V"}
    return log_softmax_of(network, draw=Draw.of(given["popularity_V"], draws, random), **rest)


def test_the_sum_is_right_on_average() -> None:
    """1 / p is the sum over all scores relative to the target's: its mean over draws is that of the whole softmax."""
    network, given = case()
    random = np.random.default_rng(1)
    with torch.no_grad():
        expected_E = torch.exp(-whole(network, given))
        found_RE = torch.stack([torch.exp(-sampled(network, given, 64, random)) for _ in range(800)])
    error_E = found_RE.std(dim=0) / len(found_RE) ** 0.5
    assert (found_RE.mean(dim=0) - expected_E).abs().sub(4.5 * error_E).max() < 0
    assert (error_E > 0).all() and (error_E < 0.2 * expected_E).all()


def test_with_many_draws_it_is_the_whole_softmax() -> None:
    """A target that is hardly ever drawn is not corrected like a drawn one, and one that is drawn counts once."""
    network, given = case()
    with torch.no_grad():
        expected_E = whole(network, given)
        found_E = sampled(network, given, 4_000_000, np.random.default_rng(2))
    assert found_E == pytest.approx(expected_E, abs=0.06)
    corrected = given["log_popularity_V"][7] - given["log_popularity_V"].exp().logsumexp(0)
    assert abs(float(found_E[0] - expected_E[0])) < 0.06 < abs(float(corrected))


def test_its_gradient_is_close_to_the_whole_one() -> None:
    """The mean gradient over draws points the same way and is as long, for tables and for dense weights."""
    network, given = case()
    given["state_EH"] *= 0.2  # no score stands out by so much that a mean over few draws would not settle
    random = np.random.default_rng(4)
    whole(network, given).sum().backward()
    names = ("interest", "bias", "query.weight", "crowd.weight", "popularity", "lift")
    expected = {name: parameter.grad.clone() for name, parameter in network.named_parameters() if name in names}
    network.zero_grad()
    for _ in range(100):
        (sampled(network, given, 512, random).sum() / 100).backward()  # type: ignore[no-untyped-call]
    for name, parameter in network.named_parameters():
        if name in names:
            ours, theirs = (g.to_dense().flatten() for g in (parameter.grad, expected[name]))
            assert ours @ theirs > 0.97 * ours.norm() * theirs.norm() > 0, name
            assert float(ours.norm() / theirs.norm()) == pytest.approx(1.0, abs=0.1), name


def test_nothing_is_drawn_that_stands_for_nothing() -> None:
    """Free rows have no popularity; the others are drawn as often as their share says."""
    popularity_V = np.array([0.0, 3.0, 0.0, 1.0, 0.0], np.float32)
    draw = Draw.of(popularity_V, 40_000, np.random.default_rng(0))
    assert draw.row_K.tolist() == [1, 3]
    assert draw.log_weight_K == pytest.approx([0.0, 0.0], abs=0.05)


def test_a_sparse_gradient_moves_what_a_dense_one_moves() -> None:
    """The same tables, sums and dense weights after three steps, clipped or not, whichever way the gradient comes."""
    learning = LearningSettings(warmup_steps=1, clip=0.5)
    index = torch.tensor([3, 9, 3, 40])
    tables = []
    for sparse in (False, True):
        torch.manual_seed(0)
        network = Network(SETTINGS, ROWS)
        optimiser = Optimiser(network, learning)
        for step in range(3):
            optimiser.zero()
            rows = torch.nn.functional.embedding(index + step, network.interest, sparse=sparse)
            (rows.square().sum() * 5 + network.query.weight.square().sum()).backward()  # type: ignore[no-untyped-call]
            assert network.interest.grad is not None and network.interest.grad.is_sparse == sparse
            assert optimiser.step(1.0)
        tables.append((network.interest.detach(), optimiser._sums["interest"], network.query.weight.detach()))
    for dense, found in zip(*tables, strict=True):
        assert torch.allclose(dense, found, atol=1e-6)


def test_a_large_vocabulary_is_learned_as_a_small_one() -> None:
    """Beyond the bound the loss falls as it does with the whole softmax; growth, saving and going on work as before."""
    events = rounds(np.random.default_rng(2), 1_600, interests=30)
    losses = []
    for bound in (5_000, 8):
        learning = LearningSettings(warmup_steps=5, step_events=32, softmax_interests_max=bound, softmax_draws=32)
        learner = Learner(SETTINGS, learning, seed=1, device="cpu")
        found = []
        for start in range(0, 1_600, 400):
            span = slice(start, start + 400)
            learner.observe(events.user_row[span].astype(np.uint64) + np.uint64(1), events.take(span), {})
            found.append(learner.learn(100).loss)
        assert learner._is_sampled() == (bound == 8)
        back = Learner.restore(learner.state_bytes(), SETTINGS, learning, device="cpu")
        same = back.weights_bytes() == learner.weights_bytes()  # a diff of all bytes would take for ever
        assert same
        losses.append(found)
    assert losses[1][-1] < 0.9 * losses[1][0]
    assert losses[1][-1] == pytest.approx(losses[0][-1], rel=0.1)


def test_a_step_touches_what_it_met_alone() -> None:
    """Of 600 interests the rows that were neither met, nor followers, nor drawn stay bit for bit where they are."""
    learning = LearningSettings(warmup_steps=1, step_events=32, softmax_interests_max=100, softmax_draws=64)
    learner = Learner(SETTINGS, learning, seed=1, device="cpu")
    known = np.repeat(np.arange(1, 601), 2)
    events = made(np.arange(len(known)) % 50, known)
    learner.observe(events.user_row.astype(np.uint64) + np.uint64(1), events, {})
    learner._count(learner._waiting.take(len(known)))
    before = learner._network.interest.detach().clone()
    events = made(np.arange(160) % 5, np.arange(160) % 7 + 1)
    learner.observe(events.user_row.astype(np.uint64) + np.uint64(1), events, {})
    assert learner.learn(9).steps == 5  # in the first one every head is still 0
    moved = (learner._network.interest.detach() != before).any(dim=1)
    assert 20 < int(moved.sum()) < 450
