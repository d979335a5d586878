"""An evaluation in a line."""

from gacd.attacks.threat import ThreatModel
from gacd.evaluation.robust import evaluate


def run(model, data, *attacks: str, **kwargs):
    kwargs.setdefault("threat", ThreatModel(eps=0.1))
    return evaluate(model, data, attacks=attacks, show_progress=False, **kwargs)
