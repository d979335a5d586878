"""A network made ready for an attack: constants are computed once, not in each of its passes."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from gacd.models.modes import evaluating
from gacd.shapes import Images

Pair = tuple[str, str]
"""A convolution, and the batch normalisation that alone reads its output; by name."""

_PAIRS: WeakKeyDictionary[nn.Module, list[Pair]] = WeakKeyDictionary()
_IDENTITY = nn.Identity()


@contextmanager
def frozen(model: nn.Module, x: Images) -> Iterator[None]:
    """`evaluating`, with batch normalisation folded into the convolutions before it.

    W' = s W and b' = s (b - mean) + beta, s = gamma / sqrt(var + eps): the same function, to
    rounding, in fewer passes over memory. Under autocast the weights of convolutions and linear
    layers are cast here, once. An image of `x` shows, the first time, what follows what; a network
    whose `folds` is False is left as it is (`folds_exactly`). Everything is put back afterwards,
    also after an exception.
    """
    with evaluating(model):
        swaps = _swaps(model, x)
        before = [where[what] for where, what, _ in swaps]
        try:
            for where, what, new in swaps:
                where[what] = new
            yield
        finally:
            for (where, what, _), old in zip(swaps, before, strict=True):
                where[what] = old


@torch.no_grad()
def _swaps(model: nn.Module, x: Images) -> list[tuple[dict[str, Any], str, Any]]:
    """Where, what, and what is put there instead."""
    if not getattr(model, "folds", True):
        return []
    parts = dict(model.named_modules())
    dtype = _autocast_dtype(x)
    bn_of = dict(_pairs(model, x))
    swaps: list[tuple[dict[str, Any], str, Any]] = []
    for name, part in parts.items():
        if not isinstance(part, nn.Conv2d | nn.Linear) or not _plain(part):
            continue
        weight, bias = part.weight, part.bias
        if name in bn_of:
            weight, bias = _folded(weight, bias, parts[bn_of[name]])
            parent, _, child = bn_of[name].rpartition(".")
            swaps.append((parts[parent]._modules, child, _IDENTITY))
        swaps.append((part._parameters, "weight", weight.to(dtype or weight.dtype)))
        swaps.append(
            (part._parameters, "bias", None if bias is None else bias.to(dtype or bias.dtype))
        )
    return swaps


def _plain(part: nn.Module) -> bool:
    """Whether the weights are parameters: spectral normalisation computes one in each pass."""
    return {"weight", "bias"} <= part._parameters.keys()


def _is_linear_in_its_weight(part: nn.Module) -> bool:
    """A convolution as torch has it: a subclass may standardise its weight in the pass."""
    own = type(part)
    return (
        isinstance(part, nn.Conv2d)
        and own.forward is nn.Conv2d.forward
        and own._conv_forward is nn.Conv2d._conv_forward  # type: ignore[attr-defined]
        and _plain(part)
    )


def _autocast_dtype(x: Images) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _folded(weight: Tensor, bias: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    return weight * scale[:, None, None, None], shift


def _pairs(model: nn.Module, x: Images) -> list[Pair]:
    if model not in _PAIRS:
        _PAIRS[model] = find_pairs(model, x[:1])
    return _PAIRS[model]


@torch.no_grad()
def folds_exactly(model: nn.Module, x: Images) -> bool:
    """Whether a copy of `model`, its batch normalisations drawn at random, answers as it does.

    The graph does not show who reads a convolution's output without gradient, or in larger batches
    alone, nor a layer that computes in float32 under any autocast.
    """
    try:
        model = copy.deepcopy(model)
    except (TypeError, RuntimeError):  # it holds what cannot be copied: then it is not tried
        return False
    model.folds = True  # type: ignore[assignment]  # whatever an earlier look said
    generator = torch.Generator(x.device).manual_seed(0)
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            for tensor in (part.running_var, part.weight, part.running_mean, part.bias):
                if tensor is not None:
                    tensor.uniform_(0.5, 1.5, generator=generator)
    with evaluating(model), torch.autocast(x.device.type, enabled=False):
        plain = model(x)
        with frozen(model, x):
            folded = model(x)
    try:
        with torch.autocast(x.device.type, torch.bfloat16), frozen(model, x):
            model(x)
    except RuntimeError:
        return False
    return torch.allclose(plain, folded, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


def find_pairs(model: nn.Module, x: Images) -> list[Pair]:
    """Convolutions whose only reader is a batch normalisation in evaluation mode.

    Read off the graph that autograd records of one forward pass of `x`, so it needs no knowledge of
    the network; a reader that autograd does not see is missed (`folds_exactly` finds it). A module
    that is used twice is left alone.
    """
    maker: dict[Any, str] = {}  # of an autograd node
    calls: Counter[str] = Counter()

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.grad_fn is not None:  # or the attack refuses it, in its own words
                maker[output.grad_fn] = name
            calls[name] += 1

        return hook

    parts = dict(model.named_modules())
    hooks = [
        part.register_forward_hook(note(name))
        for name, part in parts.items()
        if isinstance(part, nn.Conv2d | _BatchNorm)
    ]
    try:
        with (
            evaluating(model),
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
        ):
            output = model(x.detach().requires_grad_())
    finally:
        for hook in hooks:
            hook.remove()
    reads = Counter(node for user in _graph(output.grad_fn) for node, _ in user.next_functions)
    pairs = []
    for node, name in maker.items():
        if not isinstance(parts[name], _BatchNorm) or parts[name].running_var is None:
            continue
        read = node.next_functions[0][0]
        conv = maker.get(read, name)
        once = reads[read] == calls[conv] == calls[name] == 1
        if once and _is_linear_in_its_weight(parts[conv]):
            pairs.append((conv, name))
    return pairs


def _graph(root: Any) -> set[Any]:
    """Every node that `root` depends on, itself included."""
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return seen
