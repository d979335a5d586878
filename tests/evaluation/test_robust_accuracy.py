"""Robust accuracy: closed forms, honest counting, resuming, and what it leaves untouched."""

import pytest
import torch
from torch import nn

import gacd.evaluation.robust as robust_module
from evaluation.running import run
from gacd.attacks.threat import ThreatModel
from gacd.data.dataset import ArrayDataset
from gacd.errors import UserError
from gacd.evaluation.batches import assert_within
from gacd.evaluation.names import Attack, parse_attack
from gacd.evaluation.robust import answered_alike, epsilon_curve


@pytest.fixture
def linear(linear_net, generator: torch.Generator):
    """A linear model, images far from the box's walls, and each image's signed margin."""
    weight = torch.randn(64, generator=generator)
    pixels = torch.randint(90, 166, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
    score = pixels.flatten(1).double() / 255 @ weight.double()
    bias = -float(score.median()) - 0.01
    labels = torch.randint(0, 2, (60,), generator=generator)
    margin = (score + bias) * (1 - 2 * labels)
    data = ArrayDataset(pixels, labels, ("positive", "negative"), "linear")
    return linear_net(weight, bias), data, margin


@pytest.mark.parametrize(
    ("name", "attack"),
    [
        ("fgsm", Attack("fgsm", "fgsm")),
        ("pgd20", Attack("pgd20", "pgd", 20)),
        ("pgd100x5", Attack("pgd100x5", "pgd", 100, 5)),
        ("cw", Attack("cw", "cw", 40)),
        ("cw20", Attack("cw20", "cw", 20)),
        ("cw40x5", Attack("cw40x5", "cw", 40, 5)),
        ("transfer", Attack("transfer", "transfer", 20)),
    ],
)
def test_names_are_parsed(name: str, attack: Attack) -> None:
    assert parse_attack(name) == attack


@pytest.mark.parametrize(
    ("name", "near"),
    [("autoatack", "autoattack"), ("pgd", "pgd20"), ("pgd0", "pgd20"), ("cw0", "cw")],
)
def test_unknown_names_get_a_suggestion(name: str, near: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{near}'"):
        parse_attack(name)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd20", "cw20", "pgd20x2"])
def test_linear_model_is_as_robust_as_its_closed_form(linear, norm: str, name: str) -> None:
    model, data, margin = linear
    weight = model.weight.detach()
    dual = float(weight.abs().sum() if norm == "linf" else weight.norm())
    eps = float(margin[margin > 0].median() / dual)
    found = run(model, data, name, threat=ThreatModel(norm=norm, eps=eps), batch_size=17)
    assert found.robust["natural"].tolist() == (margin > 0).tolist()
    distance = margin - eps * dual
    clear = distance.abs() > 1e-4  # the image that sets eps lies on the border itself
    assert found.robust[name][clear].tolist() == (distance > 0)[clear].tolist()
    assert 0 < found.accuracy(name) < found.accuracy("natural") < 100


def test_what_is_wrong_without_attack_is_broken_and_not_attacked(
    linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, margin = linear
    attacked = []
    real = robust_module.pgd

    def count(objective, x, *args, **kwargs):
        attacked.append(len(x))
        return real(objective, x, *args, **kwargs)

    monkeypatch.setattr(robust_module, "pgd", count)
    found = run(model, data, "pgd3", threat=ThreatModel(eps=0.001))
    assert sum(attacked) == int((margin > 0).sum()) < len(data)
    assert not found.robust["pgd3"][margin < 0].any()


def test_restarts_never_help_the_defender(honest, digits) -> None:
    found = run(honest, digits, "pgd1", "pgd1x2", threat=ThreatModel(eps=0.2), step_size=0.03)
    once, often = found.robust["pgd1"], found.robust["pgd1x2"]
    assert bool((once | ~often).all())
    assert 0 < int(often.sum()) < int(once.sum())


def test_cascade_counts_the_worst_case_so_far(honest, digits, threat) -> None:
    names = ("fgsm", "pgd5", "cw5")
    alone, together = (run(honest, digits, *names, threat=threat, cascade=c) for c in (False, True))
    assert together.settings["cascade"] is True
    figures = [together.accuracy(name) for name in ("natural", *names)]
    assert figures == sorted(figures, reverse=True)
    assert together.accuracy("worst") == figures[-1]
    assert together.robust["fgsm"].equal(alone.robust["fgsm"])
    weaker = run(honest, digits, "fgsm", "noise", threat=threat)  # no cascade: each by itself
    assert weaker.accuracy("noise") > weaker.accuracy("fgsm")


@pytest.fixture
def no_autoattack(monkeypatch: pytest.MonkeyPatch) -> None:
    """An AutoAttack that breaks nothing."""
    monkeypatch.setattr(
        robust_module._Run, "autoattack", lambda self, candidates, folder: (candidates, 0.0, {})
    )


def test_a_cascade_goes_on_with_images_that_no_subset_held(
    honest, digits, threat, no_autoattack
) -> None:
    alone = run(honest, digits, "fgsm", threat=threat)
    names, options = ("autoattack", "fgsm"), {"autoattack_limit": 20, "cascade": True}
    cascade = run(honest, digits, *names, threat=threat, **options)
    assert cascade.robust["fgsm"].equal(alone.robust["fgsm"])


def test_autoattack_meets_the_same_images_whatever_the_seed(honest, digits, no_autoattack) -> None:
    first, second = (
        run(honest, digits, "autoattack", autoattack_limit=20, seed=seed).index["autoattack"]
        for seed in (0, 1)
    )
    assert first.equal(second)


def test_cw_needs_no_softmax(masked, digits, threat) -> None:
    """Where the softmax is saturated the cross-entropy has no gradient, and the margin has one."""
    found = run(masked(scale=1e4), digits, "pgd5", "cw5", threat=threat)
    assert found.accuracy("cw5") < found.accuracy("pgd5") - 10


@pytest.mark.parametrize(("given", "used"), [(None, 0.025), (0.03, 0.03)])
def test_a_step_is_a_quarter_of_eps_unless_said(
    honest, digits, monkeypatch: pytest.MonkeyPatch, given: float | None, used: float
) -> None:
    sizes: list[float] = []
    real = robust_module.pgd

    def noted(*args, step_size: float, **kwargs):
        sizes.append(step_size)
        return real(*args, step_size=step_size, **kwargs)

    monkeypatch.setattr(robust_module, "pgd", noted)
    found = run(honest, digits, "fgsm", "pgd2", "cw2", step_size=given)
    assert sizes == pytest.approx([used, used])  # FGSM goes all of eps
    assert found.settings["step_size"] == pytest.approx(used)


def test_each_batch_and_each_seed_draws_noise_of_its_own(
    linear, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, _ = linear  # whose images are far enough from the box
    noise: list[torch.Tensor] = []
    monkeypatch.setattr(
        robust_module, "assert_within", lambda _, x_adv, x: noise.append((x_adv - x)[0])
    )
    for seed in (0, 1):
        run(model, data, "noise", batch_size=15, seed=seed)
    drawn = [one for one in noise if one.any()]  # the others are without attack
    assert len(drawn) == 2 * 4
    assert all(not torch.allclose(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_autoattack_subset_is_stated_and_stratified(
    honest, digits, threat, quick_autoattack
) -> None:
    found = run(honest, digits, "pgd5", "autoattack", threat=threat, autoattack_limit=20)
    index = found.index["autoattack"]
    assert torch.bincount(digits.labels[index]).tolist() == [2] * 10
    assert not bool((found.robust["autoattack"] & ~found.robust["natural"][index]).any())
    record = found.to_record()
    assert (record["pgd5"]["n"], record["autoattack"]["n"], record["worst"]["n"]) == (100, 20, 20)
    assert found.settings["autoattack"]["attacks"] == ["apgd-ce", "apgd-t", "fab-t", "square"]


def test_model_and_global_randomness_are_left_alone(honest, digits, threat) -> None:
    honest.train()
    honest.body[2].eval()
    honest.zero_grad()
    state = torch.random.get_rng_state()
    run(honest, digits, "noise", "fgsm", "pgd2", threat=threat)
    assert honest.training and honest.head.training and not honest.body[2].training
    assert all(p.grad is None and p.requires_grad for p in honest.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_evaluation_is_float32_under_autocast(honest, digits, threat) -> None:
    plain = run(honest, digits, "pgd3", threat=threat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(honest, digits, "pgd3", threat=threat)
    assert torch.equal(plain.robust["pgd3"], cast.robust["pgd3"])


def test_broken_network_is_right_about_nothing(masked, digits) -> None:
    net = masked()
    nn.init.constant_(net.head.weight, torch.nan)
    assert run(net, digits).accuracy("natural") == 0.0


def test_attack_outside_its_budget_is_caught(
    honest, digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_module, "pgd", lambda o, x, threat, **_: x + 1.01 * threat.eps)
    with pytest.raises(RuntimeError, match="budget"):
        run(honest, digits, "pgd3")


@pytest.mark.parametrize("eps", [0.5, 3.0, 12.0])
def test_l2_balls_of_any_size_hold_their_own_points(eps: float, generator) -> None:
    """Of 12,288 pixels: a sum whose float32 rounding alone is more than 1e-6."""
    threat = ThreatModel(norm="l2", eps=eps)
    x = torch.full((16, 3, 64, 64), 0.5)
    x_adv = threat.project(x + torch.randn(x.shape, generator=generator) / 4, x)
    assert_within(threat, x_adv, x)
    with pytest.raises(RuntimeError, match="left its budget"):
        assert_within(threat, x + (x_adv - x) * (1 + 5e-6), x)


@pytest.mark.parametrize("side", [-1, 1])
def test_an_image_outside_the_box_is_caught_within_the_ball(side: int) -> None:
    x = torch.full((2, 1, 4, 4), 0.5 + 0.45 * side)
    assert_within(ThreatModel(eps=0.1), x + 0.05 * side, x)
    with pytest.raises(RuntimeError, match="left its budget"):
        assert_within(ThreatModel(eps=0.1), x + 0.06 * side, x)


def test_autoattack_at_eps_0_is_refused_before_anything_runs(
    honest, digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_module, "is_right", None)
    with pytest.raises(UserError, match="eps above 0"):
        run(honest, digits, "fgsm", "autoattack", threat=ThreatModel(eps=0.0))


def test_transfer_attacks_another_model(honest, tiny_net, digits, threat) -> None:
    with pytest.raises(UserError, match="source"):
        run(honest, digits, "transfer")
    itself = run(honest, digits, "transfer", "pgd20", threat=threat, source=honest)
    stranger = run(honest, digits, "transfer", "pgd20", threat=threat, source=tiny_net())
    assert abs(itself.accuracy("transfer") - itself.accuracy("pgd20")) <= 2
    assert stranger.accuracy("transfer") > stranger.accuracy("pgd20") + 10


def test_the_source_is_in_evaluation_mode_too(tiny_net, honest, digits, threat) -> None:
    source, modes = tiny_net().train(), []
    source.register_forward_pre_hook(lambda net, _: modes.append(net.training))
    run(honest, digits, "transfer", threat=threat, source=source)
    assert modes and not any(modes)
    assert source.training


def test_model_must_fit_the_data(tiny_net, digits) -> None:
    with pytest.raises(UserError, match="7 classes"):
        run(tiny_net(7), digits)
    with pytest.raises(UserError, match="no images"):
        run(tiny_net(), digits.subset(torch.arange(0)))
    with pytest.raises(UserError, match="at least 1"):
        run(tiny_net(), digits, batch_size=0)
    with pytest.raises(UserError, match="at least 1, not 256 and 0"):
        run(tiny_net(), digits, autoattack_limit=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_curve_follows_the_closed_form_and_never_rises(linear, norm: str) -> None:
    model, data, margin = linear
    weight = model.weight.detach()
    reach = margin / float(weight.abs().sum() if norm == "linf" else weight.norm())
    rising = reach[reach > 0].sort().values
    values = [0.0, *(float(rising[i] + rising[i + 1]) / 2 for i in (3, 9, 20))]
    threat = ThreatModel(norm=norm, eps=1.0)
    points = epsilon_curve(model, data, eps_values=values[::-1], threat=threat, show_progress=False)
    assert [p.eps for p in points] == values
    assert [p.accuracy for p in points] == pytest.approx(
        [100 * float((reach > eps).double().mean()) for eps in values]
    )
    assert all(p.low <= p.accuracy <= p.high for p in points)
    assert points[0].accuracy > points[1].accuracy > points[2].accuracy


def test_what_a_smaller_eps_broke_is_not_attacked_again(honest, digits, monkeypatch) -> None:
    attacked, real = [], robust_module.pgd
    monkeypatch.setattr(
        robust_module, "pgd", lambda o, x, *a, **k: attacked.append(len(x)) or real(o, x, *a, **k)
    )
    values, threat = [0.2, 0.05, 0.1], ThreatModel(eps=1.0)
    points = epsilon_curve(honest, digits, eps_values=values, threat=threat, show_progress=False)
    assert attacked[1:] == [point.accuracy for point in points[:-1]]  # in %, of 100 images
    assert points[-1].accuracy < points[0].accuracy


def test_a_point_of_the_curve_is_an_evaluation_of_the_same_seed_and_batches(honest, digits) -> None:
    threat, found = ThreatModel(eps=0.2), set()
    for seed in range(4):
        options = {"threat": threat, "batch_size": 30, "seed": seed}
        (point,) = epsilon_curve(
            honest, digits, eps_values=[0.2], steps=1, show_progress=False, **options
        )
        assert point.accuracy == run(honest, digits, "pgd1", **options).accuracy("pgd1")
        found.add(point.accuracy)
    assert len(found) > 1  # the seed has a say


def test_how_many_images_get_one_and_the_same_answer(tiny_net, digits) -> None:
    net = tiny_net()
    with torch.no_grad():
        answers = net.eval()(digits.float_images()).argmax(1).tolist()
        most = max(answers.count(answer) for answer in answers)
        assert answered_alike(net, digits, batch_size=7) == pytest.approx(100 * most / len(digits))
        net.head.bias[3] += 1e4
    assert answered_alike(net, digits) == 100
