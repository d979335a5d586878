"""An evaluation that goes on from what it has, of the same weights and settings alone."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gacd.evaluation.robust as robust_module
from evaluation.running import run
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.models import create_model
from gacd.models.base import model_fingerprint


def test_interrupted_run_goes_on_and_gives_the_same(
    honest, digits, threat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_autoattack
) -> None:
    def go(cache: Path | None):
        return run(
            honest, digits, "pgd3x2", "autoattack",
            threat=threat, batch_size=30, autoattack_limit=12, cache=cache,
        )  # fmt: skip

    calls = []
    real = robust_module._Run.attack

    def stumble(self, attack, number, x, labels):
        calls.append((attack.name, number))
        if len(calls) == 7:  # the third batch under attack, after four without
            raise KeyboardInterrupt
        return real(self, attack, number, x, labels)

    whole = go(None)
    monkeypatch.setattr(robust_module._Run, "attack", stumble)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    resumed = go(tmp_path)
    assert calls[6:] == [("pgd3x2", 2), ("pgd3x2", 2), ("pgd3x2", 3)]
    for name in whole.robust:
        assert torch.equal(resumed.robust[name], whole.robust[name])
    assert go(tmp_path).seconds == resumed.seconds
    assert len(calls) == 9


def test_cache_of_other_weights_or_settings_is_not_taken(
    honest, masked, digits, threat, tmp_path: Path
) -> None:
    other = masked()
    with torch.no_grad():
        other.head.bias[0] += 100
    first = run(honest, digits, cache=tmp_path)
    assert run(other, digits, cache=tmp_path).accuracy("natural") == 10.0
    weak = run(honest, digits, "pgd3", threat=ThreatModel(eps=0.01), cache=tmp_path)
    strong = run(honest, digits, "pgd3", threat=ThreatModel(eps=0.3), cache=tmp_path)
    assert strong.accuracy("pgd3") < weak.accuracy("pgd3") <= first.accuracy("natural")


@pytest.mark.parametrize(
    "change",
    [
        {"threat": ThreatModel(eps=0.05)},
        {"threat": ThreatModel(norm="l2", eps=0.1)},
        {"step_size": 0.01},
        {"seed": 1},
        {"batch_size": 50},
        {"source": "other"},
        {"data": "other"},
        {"version": "another"},
    ],
)
def test_nothing_is_taken_from_a_cache_of_other_settings(
    honest, tiny_net, digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict
) -> None:
    calls = []
    monkeypatch.setattr(
        robust_module._Run,
        "attack",
        lambda self, attack, number, x, labels: calls.append(number) or torch.ones(len(x)) > 0,
    )

    def go(**settings: Any) -> int:
        """How many batches were attacked."""
        before = len(calls)
        settings = {"source": honest, "batch_size": 40} | settings
        data = digits
        if settings.pop("data", None):
            data = replace(digits, images=digits.images.flip(3))
        if version := settings.pop("version", None):
            monkeypatch.setattr("gacd.__version__", version)
        if settings["source"] == "other":
            settings["source"] = tiny_net()
        run(honest, data, "transfer", cache=tmp_path, **settings)
        return len(calls) - before

    assert (go(), go()) == (6, 0)
    assert go(**change) == (4 if "batch_size" in change else 6)


def test_a_cascade_and_its_attacks_alone_share_a_cache(
    honest, digits, threat, tmp_path: Path
) -> None:
    names = ("fgsm", "noise", "pgd3")
    expected = run(honest, digits, *names, threat=threat, cascade=True)
    run(honest, digits, *names, threat=threat, cache=tmp_path)
    found = run(honest, digits, *names, threat=threat, cascade=True, cache=tmp_path)
    assert all(torch.equal(found.robust[name], expected.robust[name]) for name in names)


def test_a_networks_fingerprint_is_of_all_that_it_computes_with() -> None:
    def network(mean: float = 0.4) -> nn.Module:
        return create_model(
            "digits-cnn-2", num_classes=3, channels=1, mean=(mean,), std=(0.3,), seed=0
        )

    first, parameter, statistic = network(), network(), network()
    with torch.no_grad():
        parameter.body[1].bias[0] += 1
        statistic.body[1].running_mean[0] += 1
    same = copy.deepcopy(first)
    others = [parameter, statistic, network(mean=0.5)]
    assert model_fingerprint(same) == model_fingerprint(first)
    assert len({model_fingerprint(net) for net in (first, *others)}) == 4


@pytest.mark.parametrize(
    ("content", "misfit"),
    [
        ("{}", "it has no robust"),
        ('{"robust": "1", "seconds": 1.0}', 'robust is "1"'),
        ('{"robust": 7, "seconds": 1.0}', "robust is 7"),
    ],
)
def test_a_damaged_batch_is_named(
    honest, digits, threat, tmp_path: Path, content: str, misfit: str
) -> None:
    run(honest, digits, threat=threat, cache=tmp_path)
    path = next(tmp_path.rglob("00000.json"))
    path.write_text(content)
    with pytest.raises(UserError) as refused:
        run(honest, digits, threat=threat, cache=tmp_path)
    said = f"{path}: not written by this package; delete it and run again ({misfit})"
    assert str(refused.value) == said
    path.unlink()
    run(honest, digits, threat=threat, cache=tmp_path)
