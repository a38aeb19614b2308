"""The network: it starts as the rule, masks what is missing, and gradients reach every part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_events import made, walked

from models.forecaster import initial_weights
from models.gru import MOMENT_NUMBERS, NEVER, Network, log_general, log_probability
from models.inputs import NUMBER_COUNT, Normaliser, event_numbers
from models.knowledge import Knowledge
from models.profile import HIDDEN
from models.purchases import Purchases, pairs_of
from models.settings import NetworkSettings
from models.successors import Successors
from models.vocabulary import RowIndex


def network(interests: int, settings: NetworkSettings | None = None) -> Network:
    torch.manual_seed(0)
    return Network(settings or NetworkSettings(), interests)


def knowledge(interests: int, settings: NetworkSettings | None = None) -> Knowledge:
    """Interests 1..n in rows 0..n-1, number 1 the most popular."""
    successors = Successors.empty(4)
    successors.grow(interests)
    popularity = np.arange(interests, 0, -1).astype(np.float32)
    index = RowIndex(np.arange(1, interests + 1, dtype=np.uint32))
    crowd = np.stack([popularity, popularity], axis=1)
    return Knowledge.of(settings or NetworkSettings(), index.find, popularity, crowd, successors, Normaliser.initial())


def test_copy_and_general_probabilities_sum_to_one() -> None:
    """The mixture is a distribution, whatever the weights."""
    net, known = network(30), knowledge(30)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    after = walked(made([0, 0, 1, 0, 1], [3, 4, 31, 3, 99]), 2).after
    _found, moments = known.moments(after, None)
    view = net.view(moments)
    step = net.step(net.at_moment(torch.randn(5, HIDDEN), moments), view)
    log_popularity_V, crowd_VK = torch.from_numpy(known.log_popularity_V), torch.from_numpy(known.crowd_VK)
    with torch.no_grad():
        general_EV = net.general(step, moments, moments.lift(log_popularity_V), log_popularity_V, crowd_VK)
    copy_E = torch.exp(step.log_gate_E) * torch.exp(step.copy_EC).sum(dim=1)
    general_E = torch.exp(step.log_rest_E) * general_EV.sum(dim=1)
    assert (copy_E + general_E).tolist() == pytest.approx([1.0] * 5, abs=1e-5)


def test_a_moment_sees_its_own_newest_candidates() -> None:
    """The two newest in their order, nothing where there are fewer, and parts of a view keep what is theirs."""
    net, known = network(30), knowledge(30)
    after = walked(made([0, 0, 1, 0, 1], [3, 4, 31, 3, 31]), 2).after
    _found, moments = known.moments(after, None)
    numbers = moments.number_SF.shape[1]
    newest_EKF = moments.newest().view(5, 2, numbers)
    for e, here in enumerate(newest_EKF):
        own = moments.number_SF[moments.owner_S == e]
        assert torch.equal(here[0], own[0])
        assert torch.equal(here[1], own[1] if len(own) > 1 else torch.zeros(numbers))
    view = net.view(moments)
    assert torch.equal(view.after(2).moment_EW, view.moment_EW[2:])
    assert torch.equal(view.after(2).moments.newest(), newest_EKF.view(5, -1)[2:])


def test_gradients_reach_every_parameter() -> None:
    """Nothing of the network is out of reach of the loss once it has left its start."""
    net, known = network(30), knowledge(30)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    events = made([0, 0, 1, 0, 1], [3, 4, 31, 3, 9])
    advanced = walked(events, 2)
    inputs = known.inputs(events, advanced.gap_s_B, advanced.aggregates_BA)
    x = net.inputs(
        torch.from_numpy(inputs.embedding_B),
        torch.from_numpy(inputs.item_B),
        torch.from_numpy(inputs.type_B),
        torch.from_numpy(inputs.number_BN),
    )
    hidden_EH = net.encode_last(x, torch.tensor([3, 2]), torch.randn(3, HIDDEN))[[0, 1, 2, 0, 1]]
    candidates, moments = known.moments(advanced.after, None)
    view = net.view(moments)
    step = net.step(net.at_moment(hidden_EH, moments), view)
    later = net.step(net.next_state(step, view, 2), view)
    log_popularity_V, crowd_VK = torch.from_numpy(known.log_popularity_V), torch.from_numpy(known.crowd_VK)
    moments.extra_EM.fill_(0.1)
    logit_EV = net.logits(
        later.state_EH, moments.follower_EM, moments.lift(log_popularity_V), moments.live_E, log_popularity_V, crowd_VK
    )
    counted_E = moments.log_counted(torch.arange(5), torch.full((5,), 3), log_popularity_V)
    general_E = log_general(later, torch.log_softmax(logit_EV, dim=1)[:, 3], counted_E)
    loss = -log_probability(later, general_E, torch.tensor([0, 0, 0, 1, -1])).sum()
    loss = loss + net.type_logits(hidden_EH, moments.context_EG).square().sum()
    purchases = Purchases(np.zeros(30, np.float32), np.zeros((2, 2)))
    found = pairs_of(known, purchases, advanced.after, candidates, moments, candidates.key_EC)
    owner_P, number_PF, prior_P = found.owner_P, found.number_PF, found.prior_P
    bought_P = net.purchase_logits(hidden_EH, moments.context_EG, found.buyer_EU, owner_P, number_PF, prior_P)
    loss = loss + bought_P.square().sum()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_an_interest_that_is_nowhere_has_no_probability() -> None:
    """Neither slot nor row: a probability of next to nothing, and no NaN."""
    net, known = network(3), knowledge(3)
    _found, moments = known.moments(walked(made([0], [1]), 1).before, None)
    step = net.step(torch.zeros(1, HIDDEN), net.view(moments))
    log_p = log_probability(step, torch.full((1,), NEVER), torch.tensor([-1]))
    assert log_p.item() <= NEVER + 1


def test_missing_numbers_are_masked_not_zeroed() -> None:
    """A missing price and a price of the mean differ in the mask; outliers are clipped; nothing is NaN."""
    events = made([0, 0, 0, 0], [1, 2, 3, 4], price=[np.nan, 10.0, 12.0, 1e30])
    advanced = walked(events, 1)
    normaliser = Normaliser.initial().with_events(events.take(slice(0, 3)), 1e4)
    number_BN = event_numbers(events, advanced.gap_s_B, advanced.aggregates_BA, normaliser)
    assert number_BN.shape == (4, NUMBER_COUNT)
    assert np.isfinite(number_BN).all()
    assert number_BN[:, 8].tolist() == pytest.approx([0.0, -1.0, 1.0, 4.0], abs=1e-3)
    assert number_BN[:, 11].tolist() == [0, 1, 1, 1]


def test_switches_take_away_what_they_name() -> None:
    """Without copy head no candidates, without profile only the ring, without gaps no time, without features none."""
    events = made([0] * 40, [*range(1, 25), *range(1, 17)])
    advanced = walked(events, 1)

    def slots(**off: bool) -> int:
        known = knowledge(30, NetworkSettings(**off))  # type: ignore[arg-type]
        return len(known.moments(advanced.after.take(slice(39, 40)), None)[1].place_S)

    assert slots() > 16
    assert (slots(slow_profile=False), slots(copy_head=False)) == (16, 0)
    late = advanced.after.take(slice(39, 40))
    timeless = knowledge(30, NetworkSettings(time_gaps=False))
    one, two = (timeless.moments(late, np.array([gap], np.float32))[1] for gap in (5.0, 5e5))
    assert torch.equal(one.number_SF, two.number_SF)
    assert torch.equal(one.context_EG, two.context_EG)
    assert one.context_EG.shape[1] == MOMENT_NUMBERS
    plain = knowledge(30, NetworkSettings(event_features=False))
    inputs = plain.inputs(events, advanced.gap_s_B, advanced.aggregates_BA)
    assert not inputs.item_B.any()
    assert not inputs.type_B.any()
    assert not inputs.number_BN[:, 2:].any()


def test_content_vectors_are_read() -> None:
    """With a vector length set, vectors enter at the end of the numbers, and missing ones are zero."""
    settings = NetworkSettings(vector_length=3)
    events = made([0, 0], [1, 2])
    events.vector = np.array([[1, 2, 3], [np.nan] * 3], np.float32)
    advanced = walked(events, 1)
    number_BN = knowledge(5, settings).inputs(events, advanced.gap_s_B, advanced.aggregates_BA).number_BN
    assert number_BN[:, -3:].tolist() == [[1, 2, 3], [0, 0, 0]]
    assert initial_weights(settings, 1).tensors["network.gru.weight_ih_l0"].shape[1] == 64 + 16 + 8 + NUMBER_COUNT + 3
