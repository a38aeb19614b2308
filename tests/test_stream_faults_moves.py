"""Users move between workers under load with everything that a real worker has: nothing of it is lost or changed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pipeline_site import PARTITIONS, PipelineSite, alike, bite, wake


@pytest.mark.kafka
def test_users_move_with_all_that_is_known_of_them(kafka_bootstrap: str, tmp_path: Path) -> None:
    """A zombie inside of a transaction, that wakes up under later weights; a kill inside of a commit. State logs are
    cleaned and users are forgotten all the while.

    Against one worker that nobody disturbed: states, group tables and evidence bit for bit, hidden states within 1e-5,
    each forecast, alert, verdict and dead letter once, in order, under the same version; no version goes back.
    """
    with contextlib.closing(PipelineSite(kafka_bootstrap, tmp_path, seed=1)) as site:
        first = site.start("0", point="committing", countdown=3)
        second = site.start("1", point="step 6", countdown=3, how="stop")
        with site.version_of_its_own():
            for process in (first, second):
                site.wait_running(process)
            bite(site, second, first)
        with site.version_of_its_own():
            wake(site, second)
        with site.version_of_its_own():
            bite(site, first, second)
        verdict = site.ended()
        assert verdict.problems == []
        assert verdict.outputs + verdict.dead_letters == verdict.inputs > 1_000
        assert site.moves() >= PARTITIONS and site.version == 3
        assert min(site.outputs[stream] for stream in ("forecasts", "alerts", "verdicts", "dead_letters")) > 0
        assert site.cleaned() > 0, "no state log was ever cleaned"
        assert site.forgotten() > 0, "nobody was ever forgotten"


def test_what_counts_as_alike() -> None:
    """Last digits of probabilities may differ, and what lies at the end of a list; names and counts may not."""
    one = [{"interest": "a", "probability": 0.5}, {"interest": "b", "probability": 0.2}]
    assert alike(one, [{"interest": "a", "probability": 0.50001}, {"interest": "c", "probability": 0.2}])
    assert not alike(one, [{"interest": "a", "probability": 0.5001}, {"interest": "b", "probability": 0.2}])
    assert not alike(one, [{"interest": "c", "probability": 0.5}, {"interest": "b", "probability": 0.2}])
    assert not alike(one, one[:1]) and not alike("a", "b") and not alike({"x": 1}, {"x": 2})
    assert alike([{"step": 1, "interests": one}], [{"step": 1, "interests": one[:]}])
