"""Every claim on made-up studies in which it is true, false, or neither; and what is left out."""

import pytest
from made_up import STAND_INS, whole_study

from gacd.study.claims import judge_claims

EVERY = [f"C{i}" for i in range(1, 10)]


def verdicts(results, stand_ins=STAND_INS):
    return {claim.claim: claim.verdict for claim in judge_claims(results, stand_ins)}


@pytest.mark.parametrize(
    ("gain", "verdict"), [(12.0, "held"), (-12.0, "not held"), (0.0, "not decided")]
)
def test_a_clear_effect_is_judged_as_what_it_is(maker, gain, verdict):
    assert verdicts(whole_study(maker, gain=gain)) == dict.fromkeys(EVERY, verdict)
