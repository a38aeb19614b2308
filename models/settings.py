"""What can be set of the network and of its learning. Free of torch, so that the configuration loads in no time."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct


class NetworkSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network's shape. A change makes older weights unusable."""

    interest_width: Annotated[
        int, Meta(description="length of an interest's embedding; tied to the output layer", ge=4, le=1_024)
    ] = 64
    item_rows: Annotated[int, Meta(description="rows of the hashed table of item embeddings", ge=16, le=2**24)] = 4_096
    item_width: Annotated[int, Meta(description="length of an item's embedding", ge=1, le=512)] = 16
    hashed_rows: Annotated[
        int, Meta(description="rows shared by interests that the vocabulary does not hold yet", ge=1, le=65_536)
    ] = 32
    copy_width: Annotated[
        int, Meta(description="width of the hidden layers of the copy head and of the moment", ge=1, le=1_024)
    ] = 32
    successors: Annotated[int, Meta(description="interests remembered as followers of each interest", ge=1, le=512)] = (
        32
    )
    vector_length: Annotated[
        int, Meta(description="length of the content vectors of events; 0 = none are used", ge=0, le=4_096)
    ] = 0
    copy_head: Annotated[
        bool, Meta(description="whether the user's own interests are candidates; false to measure what that gives")
    ] = True
    slow_profile: Annotated[
        bool, Meta(description="whether the slow profile adds candidates; false to measure what that gives")
    ] = True
    time_gaps: Annotated[
        bool, Meta(description="whether the network sees time gaps; false to measure what that gives")
    ] = True
    event_features: Annotated[
        bool,
        Meta(description="whether it sees item, type, price and all else but the interest; false to measure"),
    ] = True


class LearningSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Online learning."""

    step_events: Annotated[int, Meta(description="new events in one gradient step", ge=1, le=65_536)] = 64
    replay_share: Annotated[
        float, Meta(description="older events added to a step, as a share of the new ones, 0..4", ge=0, le=4)
    ] = 0.5
    horizon_share: Annotated[
        float, Meta(description="share of the new events that also train the steps behind the first", ge=0, le=1)
    ] = 0.25
    horizon_steps: Annotated[
        int,
        Meta(
            description="steps that are trained, the first included; purchases are forecast for as many events",
            ge=1,
            le=50,
        ),
    ] = 5
    auxiliary_losses: Annotated[
        bool,
        Meta(
            description="whether the type of the next event and the steps behind the first are trained beside the "
            "next interest; false to measure what that gives"
        ),
    ] = True
    softmax_interests_max: Annotated[
        int,
        Meta(
            description="interests up to which a gradient step goes through all of them; with more, those that were "
            "not met are sampled",
            ge=1,
        ),
    ] = 5_000
    softmax_draws: Annotated[int, Meta(description="interests that are drawn for a step then", ge=16, le=2**20)] = 1_024
    burn_in_events: Annotated[
        int, Meta(description="older events of a user through which gradients flow", ge=1, le=64)
    ] = 4
    gap_dropout: Annotated[
        float, Meta(description="share of events learned as if the time gap were not known yet, 0..1", ge=0, le=1)
    ] = 0.2
    rate: Annotated[float, Meta(description="AdamW's learning rate for all but embeddings", gt=0, le=1)] = 4e-3
    embedding_rate: Annotated[
        float, Meta(description="row-wise Adagrad's learning rate for embeddings", gt=0, le=1)
    ] = 0.03
    accumulator_decay: Annotated[
        float, Meta(description="what a step leaves of row-wise Adagrad's sums, 0..1", gt=0, le=1)
    ] = 0.999
    weight_decay: Annotated[float, Meta(description="AdamW's weight decay", ge=0, le=1)] = 1e-3
    average_decay: Annotated[
        float,
        Meta(
            description="what a step leaves of the running average of the weights, which is what forecasts are made "
            "with; the tables of interests and items are not averaged; 0 = no average",
            ge=0,
            lt=1,
        ),
    ] = 0.95
    clip: Annotated[float, Meta(description="largest norm of a gradient", gt=0)] = 1.0
    dropout: Annotated[float, Meta(description="dropout of the hidden state before the output, 0..1", ge=0, lt=1)] = 0.1
    warmup_steps: Annotated[int, Meta(description="steps over which the rates rise to their values", ge=0)] = 50
    admit_sightings: Annotated[
        int, Meta(description="sightings after which an interest enters the vocabulary", ge=1, le=1_000)
    ] = 2
    admit_at_once: Annotated[
        int, Meta(description="rows of the vocabulary up to which one sighting is enough", ge=0, le=2**24)
    ] = 5_000
    interests_max: Annotated[int, Meta(description="interests in the vocabulary, at most", ge=16, le=2**24)] = 200_000
    interest_ttl_events: Annotated[
        int, Meta(description="an interest not seen for this many events leaves the vocabulary", ge=1_000)
    ] = 10_000_000
    popularity_half_life_events: Annotated[
        float, Meta(description="an event counts half in the popularity after this many newer ones", ge=100)
    ] = 50_000.0
    successor_decay: Annotated[
        float, Meta(description="what a new follower of an interest leaves of the older ones' counts, 0..1", gt=0, le=1)
    ] = 0.995
    users_max: Annotated[int, Meta(description="users whose histories are kept, at most", ge=16)] = 100_000
    history_events: Annotated[
        int, Meta(description="newest events kept for replay and burn-in", ge=256, le=10_000_000)
    ] = 65_536
    backlog_events: Annotated[
        int, Meta(description="events waiting to be learned, at most; older ones are shed and counted", ge=1)
    ] = 32_768
    drift_boost: Annotated[
        float, Meta(description="factor on the learning rates after a rise of the loss (ADWIN)", ge=1, le=100)
    ] = 2.0
    drift_boost_steps: Annotated[int, Meta(description="steps for which it holds", ge=0)] = 100
