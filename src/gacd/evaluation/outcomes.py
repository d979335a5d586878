"""What an evaluation found: for every attack and every image, whether the model was still right."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from gacd.errors import UserError, unknown
from gacd.evaluation.statistics import binomial_interval, mcnemar
from gacd.storage import is_count, is_number, load_tensors, misfits, save_tensors

OUTCOMES = "outcomes.safetensors"
"""The file of a model's outcomes, in its folder."""
_META = {"n": is_count, "attacks": [str], "settings": dict, "seconds": {str: is_number}}
WORST = "worst"
"""The worst case over all attacks, an accuracy every evaluation has."""


@dataclass(frozen=True)
class Evaluation:
    """Per-image outcomes of a set of attacks on one model.

    `robust[name][i]` tells whether the model was still right on test image `index[name][i]`. An
    image that is wrong without any attack is wrong under every attack.
    """

    n: int
    robust: Mapping[str, Bool[Tensor, " n"]]
    index: Mapping[str, Int[Tensor, " n"]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def outcomes(self, name: str) -> tuple[Bool[Tensor, " n"], Int[Tensor, " n"]]:
        """Outcomes under one attack, and the test images they belong to, ascending.

        `worst` covers the images that met every attack; right are those that survived them all.
        """
        if name == WORST:
            common = reduce(_intersection, self.index.values())
            survived = [_at(self.robust[key], self.index[key], common) for key in self.robust]
            return torch.stack(survived).all(dim=0), common
        if name not in self.robust:
            raise unknown("attack of this evaluation", name, [*self.robust, WORST])
        return self.robust[name], self.index[name]

    def accuracy(self, name: str) -> float:
        """Share of images still right, in percent."""
        return _accuracy(self.outcomes(name)[0])

    def interval(self, name: str) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy, in percent."""
        return _interval(self.outcomes(name)[0])

    def to_record(self) -> dict[str, dict[str, float | int]]:
        """`{attack: {accuracy, low, high, n}}` in percent, with the worst case over all."""
        found = {name: self.outcomes(name)[0] for name in [*self.robust, WORST]}
        return {name: {**_summary(right), "n": len(right)} for name, right in found.items()}

    def save(self, path: Path | str) -> None:
        """Write every image's outcome as a safetensors file."""
        tensors = {f"robust/{name}": t for name, t in self.robust.items()}
        tensors |= {f"index/{name}": t for name, t in self.index.items()}
        meta = {
            "n": self.n,
            "attacks": list(self.robust),
            "settings": dict(self.settings),
            "seconds": dict(self.seconds),
        }
        save_tensors(path, tensors, meta)

    @classmethod
    def load(cls, path: Path | str) -> "Evaluation":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path)
        if "attacks" not in meta:
            raise UserError(f"{path}: holds no outcomes of an evaluation")
        if any(misfits(meta, _META)) or not _paired(tensors, meta["attacks"]):
            raise UserError(
                f"{path}: damaged; delete it and the record.json beside it, and run again"
            )
        names = meta["attacks"]
        return cls(
            n=meta["n"],
            robust={name: tensors[f"robust/{name}"] for name in names},
            index={name: tensors[f"index/{name}"] for name in names},
            settings=meta["settings"],
            seconds=meta["seconds"],
        )


def _paired(tensors: Mapping[str, Tensor], names: Sequence[str]) -> bool:
    """Whether every attack has outcomes, and an image for each."""
    for name in names:
        robust, index = tensors.get(f"robust/{name}"), tensors.get(f"index/{name}")
        if robust is None or index is None or not len(robust) or robust.shape != index.shape:
            return False
        if (robust.dtype, index.dtype, robust.dim()) != (torch.bool, torch.int64, 1):
            return False
    return True


def compare(a: Evaluation, b: Evaluation, name: str) -> dict[str, Any]:
    """Two models under one attack on the images both met, and McNemar's exact p of the difference.

    `a`, `b`: accuracy, low, high (Wilson, 95 %), in percent; `only_a`, `only_b`: images on which
    one alone was right. Raises UserError for other test images, or another attack of that name.
    """
    (robust_a, index_a), (robust_b, index_b) = a.outcomes(name), b.outcomes(name)
    images_a, images_b = (e.settings.get("test_images") for e in (a, b))
    common = _intersection(index_a, index_b)
    if images_a is None or images_a != images_b or a.n != b.n:
        raise UserError(
            f"the two were not evaluated on the same test images, but on {_images(a)} and "
            f"{_images(b)}: evaluate both on one test set"
        )
    if not len(common):
        raise UserError(f"no test image met {name} in both evaluations: evaluate both alike")
    for key, (ours, theirs) in _attacked_how(a, b, name).items():
        if ours != theirs:
            raise UserError(
                f"the two did not meet the same {name} ({key} was {ours} for one and {theirs} for "
                "the other): evaluate both alike"
            )
    right_a, right_b = _at(robust_a, index_a, common), _at(robust_b, index_b, common)
    only_a, only_b = (int((x & ~y).sum()) for x, y in ((right_a, right_b), (right_b, right_a)))
    return {
        "n": len(common),
        "a": _summary(right_a),
        "b": _summary(right_b),
        "only_a": only_a,
        "only_b": only_b,
        "p": mcnemar(only_a, only_b),
    }


def _images(evaluation: Evaluation) -> str:
    name, images = (evaluation.settings.get(k, "unknown") for k in ("dataset", "test_images"))
    return f"{evaluation.n} of {name} (fingerprint {images})"


def _attacked_how(a: Evaluation, b: Evaluation, name: str) -> dict[str, tuple[Any, Any]]:
    """What decides how hard an attack is, for both."""
    if name == "natural":
        return {}
    keys = ["norm", "eps", "cascade"]
    steps = name not in ("autoattack", "fgsm", "noise")  # of a size that can be chosen
    keys += ["step_size"] * steps + ["source"] * (name in ("transfer", WORST))
    how = {key: (a.settings.get(key), b.settings.get(key)) for key in keys}
    orders = [list(e.robust) for e in (a, b)]
    if name == WORST:
        how["the set of attacks"] = (sorted(orders[0]), sorted(orders[1]))
    elif a.settings.get("cascade"):
        ours, theirs = (order[: order.index(name)] for order in orders)
        how["what came before it"] = (ours, theirs)
    return how


def _accuracy(robust: Tensor) -> float:
    return 100.0 * int(robust.sum()) / len(robust)


def _interval(robust: Tensor) -> tuple[float, float]:
    return binomial_interval(int(robust.sum()), len(robust))


def _summary(robust: Tensor) -> dict[str, float]:
    low, high = _interval(robust)
    return {"accuracy": _accuracy(robust), "low": low, "high": high}


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    return a[torch.isin(a, b)]


def _at(values: Tensor, index: Tensor, wanted: Tensor) -> Tensor:
    return values[torch.searchsorted(index, wanted)]
