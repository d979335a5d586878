"""Learning rates against their closed forms."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gacd.training.schedules import learning_rate

NAMES = ("cosine", "one-cycle", "constant")


@pytest.mark.parametrize(
    ("schedule", "warmup", "progress", "expected"),
    [
        ("cosine", 0.0, 0.0, 1.0),
        ("cosine", 0.0, 1 / 3, 0.75),
        ("cosine", 0.0, 0.5, 0.5),
        ("cosine", 0.2, 0.1, 0.5),
        ("cosine", 0.2, 0.6, 0.5),
        ("one-cycle", 0.0, 0.15, 0.5),
        ("one-cycle", 0.0, 0.3, 1.0),
        ("one-cycle", 0.0, 0.65, 0.5),
        ("one-cycle", 0.5, 0.25, 0.5),
        ("one-cycle", 0.5, 0.9, 0.2),
        ("constant", 0.0, 0.9, 1.0),
        ("constant", 0.4, 0.1, 0.25),
    ],
)
def test_closed_forms(schedule: str, warmup: float, progress: float, expected: float) -> None:
    found = learning_rate(progress, peak=3.0, schedule=schedule, warmup=warmup)
    assert found == pytest.approx(3 * expected)


@settings(max_examples=50, deadline=None)
@given(
    schedule=st.sampled_from(NAMES),
    warmup=st.floats(0, 0.9),
    progress=st.floats(0, 0.999),
    step=st.floats(1e-6, 1e-3),
)
def test_between_nothing_and_the_peak_without_jumps(
    schedule: str, warmup: float, progress: float, step: float
) -> None:
    rate = learning_rate(progress, peak=2.0, schedule=schedule, warmup=warmup)
    assert 0 <= rate <= 2
    following = learning_rate(min(progress + step, 1), peak=2.0, schedule=schedule, warmup=warmup)
    rise = max(warmup, 0.3) if schedule == "one-cycle" else warmup
    steepest = math.pi / 2 / (1 - rise)
    if progress < rise:
        steepest = max(steepest, 1 / rise)
    assert abs(following - rate) <= 2 * steepest * step + 1e-9
    assert progress < rise or following <= rate
