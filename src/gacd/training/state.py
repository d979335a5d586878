"""A training run's whole state as one safetensors file, and back, to the same bits."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD

from gacd.errors import UserError
from gacd.methods.method import Method
from gacd.storage import check_json, is_number, is_whole, load_tensors, save_tensors

_META = {
    "epoch": is_whole,
    "step": is_whole,
    "seconds": is_number,
    "sums": {str: [int | float]},  # what a method logs may be no number, and is no reason to stop
    "stage?": dict | None,
}


def save_state(
    path: Path, method: nn.Module, average: nn.Module | None, optimizer: SGD, meta: dict[str, Any]
) -> None:
    """Write the networks, their running average, the momentum and the counters in `meta`."""
    tensors: dict[str, Tensor] = {f"method.{k}": v for k, v in method.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, parameter in enumerate(_parameters(optimizer)):
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{i}"] = momentum
    save_tensors(path, tensors, meta)


def load_state(
    path: Path,
    method: nn.Module,
    average: nn.Module | None,
    optimizer: SGD,
    stage: Mapping[str, Any],
) -> dict[str, Any]:
    """Put back what `save_state` wrote of this `stage`; returns its `meta`."""
    tensors, meta = load_tensors(path, kept=False)
    check_json(path, meta, _META)
    refuse_other(path.parent, meta.get("stage"), stage)
    load_networks(path, method, _under("method.", tensors))
    if average is not None:
        load_networks(path, average, _under("average.", tensors))
    for i, parameter in enumerate(_parameters(optimizer)):
        momentum = tensors.get(f"momentum.{i}")
        if momentum is not None:
            # clone of the parameter's own layout: the sums that follow then round the same way
            optimizer.state[parameter]["momentum_buffer"] = (
                parameter.detach().clone().copy_(momentum)
            )
    return meta


def load_networks(path: Path, method: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill a stage's networks with what its file `path` holds, or refuse another stage's."""
    try:
        method.load_state_dict(tensors)
    except RuntimeError:
        raise UserError(
            f"{path}: not of this stage's networks; put its own there, or delete it and run the "
            "same command again"
        ) from None


def _parameters(optimizer: SGD) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stage_of(method: Method, plan: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a stage this one, which no other may go on from: method, plan and attack."""
    planned = {key: value for key, value in plan.items() if key != "compile"}
    attack = {f"attack {key}": value for key, value in asdict(method.attack).items()}
    own = {**method.settings, **{f"awp {k}": v for k, v in method.awp._asdict().items()}}
    return {"method": "+".join(method.terms), "weights": method.weights, **planned, **attack, **own}


def refuse_other(out: Path, theirs: Mapping[str, Any] | None, ours: Mapping[str, Any]) -> None:
    """Refuse to go on from another stage. What is older than this note is taken at its word."""
    for key, value in (theirs or {}).items():
        if key in ours and ours[key] != value:
            raise UserError(
                f"{out} holds another training ({key} is {value} there and {ours[key]} here): "
                "choose another folder"
            )
