"""Weights from files: our own safetensors, and PyTorch files from elsewhere.

No file is trusted: PyTorch files are read with `weights_only`, so that none can run code.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gacd.errors import UserError
from gacd.models import check_model, create_model
from gacd.models.base import Backbone, check_backbone
from gacd.storage import (
    Shape,
    are_numbers,
    check_json,
    is_count,
    is_number,
    load_meta,
    load_tensors,
    save_tensors,
)

_SAID = {
    "architecture?": str,
    "num_classes?": is_count,
    "channels?": is_count,
    **dict.fromkeys(("mean?", "std?"), lambda value: value is None or are_numbers(value)),
    "classes?": lambda value: value is None or isinstance(value, list),
    "size?": lambda value: value is None or is_number(value),
}
# A training checkpoint's networks, the preferred one first; a stage's best has one alone.
_OURS = ("average.student.", "method.student.", "student.")
# Keys under which scripts put the weights.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_ANOTHER = "name the architecture that it was saved from"
_OLD_FILES_LACK = "num_batches_tracked"  # unused here
_NORMALISATION = ("mean", "mu"), ("std", "sigma")
_TOLD = "--mean", "--std"  # the flags of most commands
_UNUSED = "sub_block1."  # some public WideResNets carry these blocks without using them


def save_model(path: Path | str, model: Backbone, meta: Mapping[str, Any]) -> None:
    """Write a network, and in the file's JSON all that `load_model` needs to build it again.

    `meta` must name the "architecture" as `create_model` knows it, and may hold anything else that
    JSON can hold.
    """
    if "architecture" not in meta:
        raise UserError("save_model: meta must name the architecture")
    if Path(path).suffix != ".safetensors":
        raise UserError(f"{path}: name the file .safetensors, as it holds that")
    try:
        json.dumps(dict(meta))
    except (TypeError, ValueError) as error:
        raise UserError(f"save_model: meta must be such as JSON can hold ({error})") from None
    rebuilt = {"num_classes": model.num_classes, "channels": model.channels, **statistics(model)}
    save_tensors(path, model.state_dict(), {**meta, **rebuilt})


def statistics(model: Backbone) -> dict[str, list[float] | None]:
    """The input normalisation as files hold it: weights are nothing without it."""
    return {"mean": _numbers(model.mean), "std": _numbers(model.std)}


def said_of(path: Path) -> dict[str, Any]:
    """What a file says of itself: nothing, where it is no .safetensors.

    Raises UserError for a .safetensors that is not there, or damaged.
    """
    return check_said(path, load_meta(path)) if path.suffix == ".safetensors" else {}


def check_said(path: Path, meta: dict[str, Any], shape: Shape = _SAID) -> dict[str, Any]:
    """What a file says of itself, or a refusal where it is not of this shape."""
    check_json(path, meta, shape, "make it, or download it, again")
    return meta


def method_of(path: Path) -> str:
    """How a file says that its network was trained; its own name where it does not say."""
    return str(said_of(path).get("method", path.stem))


def names_itself(path: Path) -> bool:
    """Whether a file says what network it holds, as `load_model` needs. Raises as `said_of`."""
    return "architecture" in said_of(path)


def load_model(path: Path | str) -> tuple[Backbone, dict[str, Any]]:
    """The network that `save_model` wrote, and its meta. Raises UserError for any other file.

    The input normalisation is in the meta, not in the state dict: networks saved otherwise have to
    be made with it (`create_model(mean=..., std=...)`).
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path}: only a .safetensors file of this library says what network it holds; "
            "name the architecture and load the weights alone"
        )
    tensors, meta = load_tensors(path)
    check_said(path, meta)
    try:
        shape = {key: meta[key] for key in ("num_classes", "channels", "mean", "std")}
        name = meta["architecture"]
    except KeyError as error:
        raise UserError(
            f"{path}: does not say what network it holds (no {error}); "
            "name the architecture and load the weights alone"
        ) from None
    try:
        check_model(name)
    except UserError as error:
        raise UserError(
            f"{path}: {error}; register a network of your own before you load it (docs/methods.md)"
        ) from None
    model = create_model(name, seed=0, **shape)
    _fill(model, tensors, path)
    return model, meta


def load_weights(model: Backbone, path: Path | str, *, told: tuple[str, str] = _TOLD) -> None:
    """Fill `model` with the weights in a file: `.safetensors`, or PyTorch's `.pt` and `.pth`.

    Of a training checkpoint it takes the student, its averaged weights where there are any. Raises
    UserError, naming the first entry that differs, where the file is not of this network. `told`
    are the command line's flags for a network's mean and std, for a refusal to name.
    """
    check_backbone(model)
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, meta = load_tensors(path)
        _check_statistics(model, check_said(path, meta), path)
    else:
        tensors = _read_pytorch(path)
    _fill(model, tensors, path, told)


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(256).lstrip()
    if start.startswith(b"<"):
        raise UserError(f"{path}: a web page, not a checkpoint; the download failed, repeat it")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path}: a Git LFS pointer, not a checkpoint; fetch it with 'git lfs pull'"
        )
    if not start or (start.startswith(b"PK") and not zipfile.is_zipfile(path)):
        raise UserError(f"{path}: truncated; download it again")
    try:
        with warnings.catch_warnings(action="ignore"):  # about what is refused below anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: a TorchScript archive, a program and not weights alone, and was not "
                "loaded; if you trust it, save torch.jit.load(FILE).state_dict() in another file"
            ) from None
        plain_pickle = start[:2] in (b"\x80\x04", b"\x80\x05")
        if plain_pickle or (
            isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower()
        ):
            raise UserError(
                f"{path}: a pickle of more than weights, which could run code and was not loaded; "
                "if you trust it, load it yourself once and save its state_dict() alone"
            ) from None
        raise UserError(f"{path}: truncated or not a PyTorch file; download it again") from None
    return _unwrap(content, path)


def _unwrap(content: object, path: Path) -> dict[str, Tensor]:
    while isinstance(content, Mapping):
        inner = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    found = content if isinstance(content, Mapping) else {}
    tensors = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        held = f"keys {', '.join(map(str, found))}" if found else f"a {type(content).__name__}"
        raise UserError(f"{path}: holds no weights but {held}; save a model's state_dict() in it")
    return tensors


def _fill(
    model: Backbone, tensors: Mapping[str, Tensor], path: Path, told: tuple[str, str] = _TOLD
) -> None:
    wanted = model.state_dict()
    state = _stripped(tensors, {name for name in wanted if not name.endswith(_OLD_FILES_LACK)})
    _refuse_normalisation(model, state, path, told)
    for name, tensor in wanted.items():
        if name.endswith(_OLD_FILES_LACK):
            state.setdefault(name, tensor)
    for name, tensor in wanted.items():
        if name not in state:
            first = next(iter(state), None)
            raise _different(
                path, f"it has no '{name}' (but '{first}')" if first else "it is empty"
            )
        if state[name].shape != tensor.shape:
            raise _different(path, *_shapes(model, name, state[name], tensor))
        kind = state[name].layout, state[name].is_floating_point()
        if kind != (tensor.layout, tensor.is_floating_point()):
            dtype = str(state[name].dtype).removeprefix("torch.")
            held = dtype if state[name].layout == torch.strided else f"sparse {dtype}"
            raise UserError(f"{path}: '{name}' holds {held} numbers; save the weights as float32")
        if state[name].is_floating_point() and not state[name].isfinite().all():
            raise UserError(f"{path}: '{name}' holds NaN or infinite weights; take an earlier file")
    if extra := next((name for name in state if name not in wanted), None):
        raise _different(path, f"its '{extra}' has no place there")
    model.load_state_dict(state)


def _refuse_normalisation(
    model: Backbone, state: Mapping[str, Tensor], path: Path, told: tuple[str, str]
) -> None:
    """Refuse a file whose network normalises its own input: ours are told by what."""
    own = model.state_dict()
    inside = {
        flag: name
        for flag, words in zip(told, _NORMALISATION, strict=True)
        for name, tensor in state.items()
        if name.rpartition(".")[2] in words and name not in own and tensor.numel() == model.channels
    }
    if len(inside) == len(_NORMALISATION):
        said = " ".join(
            f"{flag} {' '.join(f'{value:.6g}' for value in state[name].flatten().tolist())}"
            for flag, name in inside.items()
        )
        raise UserError(
            f"{path}: normalises its images itself ({' and '.join(inside.values())}): save the "
            f"state_dict() without these and say {said}"
        )


def _stripped(tensors: Mapping[str, Tensor], wanted: Set[str]) -> dict[str, Tensor]:
    """Without what containers (DataParallel, torch.compile, wrappers) put before every name."""
    state = dict(tensors)
    if "n_averaged" not in wanted:
        state.pop("n_averaged", None)  # how many networks torch's AveragedModel is the mean of
    ready = wanted <= state.keys()  # a network's own parts may be called as a wrapper is
    for own in () if ready else _OURS:
        if student := {k.removeprefix(own): v for k, v in state.items() if k.startswith(own)}:
            return student
    while not wanted <= state.keys():
        fronts = {name.partition(".")[0] for name in state if "." in name}
        if len(fronts) != 1 or not all("." in name for name in state):
            break
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    return {
        name: tensor
        for name, tensor in state.items()
        if name in wanted or not name.startswith(_UNUSED)
    }


def _shapes(model: Backbone, name: str, found: Tensor, wanted: Tensor) -> tuple[str, str]:
    """How one entry's shapes differ, and the remedy."""
    there, here = tuple(found.shape), tuple(wanted.shape)
    detail = f"'{name}' is {there} in the file and {here} in the model"
    classes, channels = model.num_classes, model.channels
    if len(here) == len(there) == 2 and here[0] == classes and here[1] == there[1]:
        return detail, f"it knows {there[0]} classes, not {classes}: match the file and the data"
    if len(here) == len(there) == 4 and here == (there[0], channels, *there[2:]):
        return detail, f"it takes {there[1]} channels, not {channels}: match the file and the data"
    if len(here) == len(there) == 4 and there[2:] == (7, 7):
        return detail, "it is for large images: networks here begin with a 3x3 convolution"
    return detail, _ANOTHER


def _different(path: Path, detail: str, remedy: str = _ANOTHER) -> UserError:
    return UserError(f"{path}: not the weights of this network: {detail}; {remedy}")


def _check_statistics(model: Backbone, meta: Mapping[str, Any], path: Path) -> None:
    """Weights are right only with the input normalisation that they were trained with."""
    for key, here in statistics(model).items():
        if key in meta and _rounded(meta[key]) != _rounded(here):
            raise UserError(
                f"{path}: was trained with {key} {_rounded(meta[key])}, the model has "
                f"{_rounded(here)}; build the model with the file's {key}"
            )


def _numbers(values: Tensor | None) -> list[float] | None:
    return None if values is None else values.flatten().tolist()


def _rounded(values: list[float] | None) -> list[float] | None:
    return None if values is None else [round(value, 6) for value in values]
