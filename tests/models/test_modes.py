import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gacd.models.modes import evaluating


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9))
    )


def snapshot(*modules: nn.Module) -> list[bool]:
    modes = [part.training for module in modules for part in module.modules()]
    return modes + [p.requires_grad for module in modules for p in module.parameters()]


@settings(max_examples=20, deadline=None)
@given(
    modes=st.lists(st.booleans(), min_size=6, max_size=6),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_every_mode_and_flag_comes_back(modes: list[bool], flags: list[bool]) -> None:
    net = network()
    for part, mode in zip(net.modules(), modes, strict=True):
        part.training = mode
    for parameter, flag in zip(net.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    before = snapshot(net)
    with evaluating(net):
        assert not any(snapshot(net))
    assert snapshot(net) == before == modes + flags


def test_comes_back_after_an_exception() -> None:
    net, other = network(), network().eval()
    net[1].eval()
    other[0].requires_grad_(False)
    before = snapshot(net, other)
    with pytest.raises(ZeroDivisionError), evaluating(net, other):
        _ = 1 / 0
    assert snapshot(net, other) == before


def test_nested_and_shared_modules() -> None:
    net = network()
    before = snapshot(net)
    with evaluating(net, net[0]):
        with evaluating(net[0]):
            pass
        assert not any(snapshot(net))
    assert snapshot(net) == before


def test_only_the_input_gets_a_gradient_and_statistics_stay(generator: torch.Generator) -> None:
    net = network()
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    net(x).sum().backward()
    kept = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    statistics = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with evaluating(net):
        out = net(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        out.sum().backward()
    assert gradient.abs().max() > 0
    assert len(kept) == 6
    for before, parameter in zip(kept, net.parameters(), strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, before)
    assert all(torch.equal(statistics[name], buffer) for name, buffer in net.named_buffers())


def test_a_graph_made_before_still_reaches_the_parameters() -> None:
    net = network()
    loss = net(torch.ones(4, 3)).sum()
    with evaluating(net):
        net(torch.zeros(1, 3))
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())
