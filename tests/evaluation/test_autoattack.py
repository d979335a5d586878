"""AutoAttack: the verdict of pyautoattack itself, resumable, and without traces."""

import logging
import re
import sys
from pathlib import Path
from typing import Any

import pyautoattack
import pytest
import torch
from torch import nn

import gacd.evaluation.autoattack as autoattack_module
import gacd.progress
from gacd.attacks.threat import ThreatModel
from gacd.errors import UserError
from gacd.evaluation.autoattack import AutoAttackResult, autoattack, standard_attacks
from gacd.evaluation.robust import evaluate
from gacd.ranks import Ranks


class Dead(nn.Module):
    """Passes the image on and no gradient back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach() + 0 * x


def ours(model, x, labels, threat, **kwargs):
    kwargs.setdefault("num_classes", model.num_classes)
    return autoattack(model, x, labels, threat=threat, show_progress=False, **kwargs)


def directly(adversary, x, labels, batch_size: int) -> torch.Tensor:
    _, answers = adversary.run_standard_evaluation(x, labels, batch_size=batch_size)
    return answers == labels


@pytest.fixture
def images(digits) -> tuple[torch.Tensor, torch.Tensor]:
    return digits.float_images().contiguous(), digits.labels


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.08), ("l2", 0.4)])
def test_verdict_is_that_of_a_direct_call(honest, images, quick_autoattack, norm, eps) -> None:
    x, labels = images
    direct = quick_autoattack(
        honest.eval(), norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, seed=3
    )
    expected = directly(direct, x, labels, 32)
    found = ours(honest, x, labels, ThreatModel(norm=norm, eps=eps), batch_size=32, seed=3)
    assert torch.equal(found.robust, expected)
    assert 0 < int(expected.sum()) < 0.9 * len(x)
    figures = list(found.after.values())
    assert figures == sorted(figures, reverse=True)
    assert found.after["square"] == pytest.approx(100 * float(expected.double().mean()))


def test_three_classes_with_full_gradient_attacks(
    honest, digits, tiny_net, monkeypatch: pytest.MonkeyPatch
) -> None:
    standard = pyautoattack.AutoAttack

    def few_queries(*args, **kwargs):
        adversary = standard(*args, **kwargs)
        assert (adversary.square.n_queries, adversary.seed) == (5000, 5)
        adversary.square.n_queries = 300
        return adversary

    monkeypatch.setattr(pyautoattack, "AutoAttack", few_queries)
    few = digits.subset((digits.labels < 3).nonzero()[:8, 0])
    x = few.float_images().contiguous()
    net = tiny_net(3)
    net.body.load_state_dict(honest.body.state_dict())
    net.head.load_state_dict({k: v[:3] for k, v in honest.head.state_dict().items()})
    names = ["apgd-ce", "apgd-dlr", "fab-t", "square"]
    direct = pyautoattack.AutoAttack(net.eval(), attacks=names, eps=0.2, seed=5, version="custom")
    direct.apgd.n_restarts = direct.fab.n_restarts = 1
    direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 2
    expected = directly(direct, x, few.labels, 8)
    found = ours(net, x, few.labels, ThreatModel(eps=0.2), seed=5)
    assert torch.equal(found.robust, expected)
    assert (list(found.after), found.targets) == (names, 2)
    assert not any("classes" in note for note in found.notes)


@pytest.mark.parametrize(
    ("classes", "dlr"), [(2, []), (3, ["apgd-dlr"]), (4, ["apgd-t"]), (100, ["apgd-t"])]
)
def test_attacks_fit_the_number_of_classes(classes: int, dlr: list[str]) -> None:
    assert standard_attacks(classes) == ("apgd-ce", *dlr, "fab-t", "square")


@pytest.mark.parametrize("classes", [2, 4])
def test_few_classes_run(tiny_net, images, quick_autoattack, classes: int) -> None:
    x, _ = images
    net = tiny_net(classes)
    found = ours(net, x[:10], net(x[:10]).argmax(1), ThreatModel(eps=0.01))
    assert found.targets == classes - 1
    assert set(found.after) == set(standard_attacks(classes))


def test_resumes_batch_by_batch(
    honest, images, threat, quick_autoattack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, labels = images
    whole = ours(honest, x[:40], labels[:40], threat, batch_size=16)
    calls = []
    real = autoattack_module._attack_batch

    def stumble(model, x, labels, name, *rest):
        calls.append(name)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(model, x, labels, name, *rest)

    monkeypatch.setattr(autoattack_module, "_attack_batch", stumble)
    with pytest.raises(KeyboardInterrupt):
        ours(honest, x[:40], labels[:40], threat, batch_size=16, cache=tmp_path)
    resumed = ours(honest, x[:40], labels[:40], threat, batch_size=16, cache=tmp_path)
    assert calls[:3] == ["apgd-ce"] * 3
    assert calls[5] == calls[4] != "apgd-ce"
    assert torch.equal(resumed.robust, whole.robust)
    assert resumed.after == whole.after


def test_leaves_no_trace(honest, images, threat, quick_autoattack, capfd) -> None:
    x, labels = images
    honest.train()
    honest.zero_grad()
    logger = logging.getLogger("auto-attack")
    before = (logger.handlers, logger.propagate, logger.level, sys.gettrace())
    state = torch.random.get_rng_state()
    ours(honest, x[:10], labels[:10], threat)
    assert torch.equal(state, torch.random.get_rng_state())
    assert before == (logger.handlers, logger.propagate, logger.level, sys.gettrace())
    assert honest.training
    assert all(p.grad is None and p.requires_grad for p in honest.parameters())
    assert capfd.readouterr() == ("", "")


def test_warnings_become_notes(masked, images, threat, quick_autoattack, capfd) -> None:
    x, labels = images
    net = masked(Dead())
    found = ours(net, x[:20], labels[:20], threat)
    assert "some images had a gradient of exactly zero" in found.notes
    assert capfd.readouterr().err == ""


def test_nothing_right_needs_no_attack(masked, images, threat, monkeypatch) -> None:
    x, _ = images
    monkeypatch.setattr(autoattack_module, "_attack_batch", None)
    found = ours(masked(), x, (masked()(x).argmax(1) + 1) % 10, threat)
    assert not found.robust.any()
    assert set(found.after.values()) == {0.0}


def test_what_cannot_run_is_refused(honest, images) -> None:
    x, labels = images
    with pytest.raises(UserError, match="at least 2 classes"):
        ours(honest, x, labels, ThreatModel(eps=0.1), num_classes=1)
    with pytest.raises(UserError, match="above 0"):
        ours(honest, x, labels, ThreatModel(eps=0.0))
    with pytest.raises(UserError, match="5 pixels"):
        ours(honest, x[..., :4, :4], labels, ThreatModel(norm="l2", eps=0.1))


def test_each_attack_has_a_bar_that_ends_where_its_work_does(
    honest, images, threat, quick_autoattack, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gacd.progress._Lines, "every", -1.0)
    x, labels = images
    for size in (1, 2):  # three batches: the first rank has two of them
        found = autoattack(
            honest, x[:40], labels[:40], num_classes=10, threat=threat, batch_size=16,
            ranks=Ranks(0, size),
        )  # fmt: skip
        lines = capsys.readouterr().err.splitlines()
        for name in ("apgd-ce", "apgd-t", "fab-t", "square"):
            own = [line for line in lines if line.startswith(f"autoattack {name}: ")]
            counted = re.search(r"(\d+)/(\d+) images", own[-1])
            assert counted and counted[1] == counted[2]
            if name == "apgd-ce":  # of three batches the first of two ranks has two
                assert len(own) == (2 if size == 2 else 3)
        if size == 1:
            assert lines[-1].endswith(f"standing {int(found.robust.sum())}")

    with pytest.raises(UserError, match="at least one image"):
        ours(honest, x[:0], labels[:0], ThreatModel(eps=0.1))


@pytest.mark.parametrize(("by_square", "suspect"), [(1, False), (2, True)])
def test_square_alone_makes_suspicious(
    honest, images, threat, monkeypatch: pytest.MonkeyPatch, by_square: int, suspect: bool
) -> None:
    """Of 100 images; what the gradient attacks broke before it does not count."""
    x, _ = images
    lost = {"apgd-ce": 20, "apgd-t": 5, "fab-t": 0, "square": by_square}

    def broken(model, x, labels, name, *_):
        bits = "0" * lost[name] + "1" * (len(x) - lost[name])
        return {"robust": bits, "notes": [], "seconds": 0.0}

    monkeypatch.setattr(autoattack_module, "_attack_batch", broken)
    found = ours(honest, x, honest(x).argmax(1), threat)
    assert list(found.after.values()) == pytest.approx([80, 75, 75, 75 - by_square])
    said = [note for note in found.notes if f"Square broke {by_square} of 100 images" in note]
    assert bool(said) == suspect


def test_an_attack_outside_its_budget_is_caught(
    honest, images, threat, monkeypatch: pytest.MonkeyPatch
) -> None:
    class TooFar(pyautoattack.AutoAttack):
        def run_standard_evaluation(self, x, labels, batch_size):
            return (x + 1.01 * threat.eps).clamp(0, 1), labels

    monkeypatch.setattr(pyautoattack, "AutoAttack", TooFar)
    with pytest.raises(RuntimeError, match="left its budget"):
        ours(honest, *images, threat)


def test_an_evaluations_settings_reach_autoattack(
    honest, digits, threat, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def noted(model, images, labels, **settings: Any) -> AutoAttackResult:
        given.update(settings)
        return AutoAttackResult(torch.ones(len(images), dtype=torch.bool), {}, 9, [], 0.0)

    monkeypatch.setattr("gacd.evaluation.robust.autoattack", noted)
    wanted = {"threat": threat, "batch_size": 30, "seed": 3, "show_progress": False}
    evaluate(honest, digits, attacks=["autoattack"], **wanted)
    assert {key: given[key] for key in wanted} == wanted
    assert given["num_classes"] == 10
