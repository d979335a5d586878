import argparse
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from gacd.errors import UserError
from gacd.models import create_model
from gacd.models.base import Backbone
from gacd.models.checkpoints import load_model, load_weights, said_of, save_model
from gacd.storage import save_tensors
from gacd.training.state import save_state

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)


def make(
    name: str = "wrn-10-1", *, seed: int = 0, num_classes: int = 4, channels: int = 3
) -> Backbone:
    return create_model(name, num_classes=num_classes, channels=channels, seed=seed)


def source() -> Backbone:
    """A network with running statistics of its own."""
    model = make(seed=1)
    model(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    return model


def assert_same(model: Backbone, other: Backbone) -> None:
    for name, tensor in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def renamed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def test_own_file_round_trip(tmp_path: Path) -> None:
    model = create_model("wrn-10-1", num_classes=4, mean=MEAN, std=STD, seed=1)
    model(torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    path = tmp_path / "model.safetensors"
    save_model(path, model, {"architecture": "WRN-10-1", "epoch": 3})
    again, meta = load_model(path)
    assert_same(again, model)
    assert meta["epoch"] == 3
    assert (again.num_classes, again.channels) == (4, 3)
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), model.eval()(x))  # the normalisation is the file's too


def test_own_file_into_a_given_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, source(), {"architecture": "wrn-10-1"})
    model = make()
    load_weights(model, path)
    assert_same(model, source())


def test_own_file_of_another_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, source(), {"architecture": "wrn-10-1"})
    model = create_model("wrn-10-1", num_classes=4, mean=MEAN, std=STD, seed=0)
    with pytest.raises(UserError, match=r"mean None, the model has \[0.1, 0.2, 0.3\]"):
        load_weights(model, path)


def test_saving_needs_the_architecture(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="architecture"):
        save_model(tmp_path / "x.safetensors", source(), {})
    with pytest.raises(UserError, match=r"x\.pt: name the file \.safetensors"):
        save_model(str(tmp_path / "x.pt"), source(), {"architecture": "wrn-10-1"})


@pytest.mark.parametrize("averaged", [False, True])
def test_training_checkpoint_gives_the_student_preferably_averaged(
    tmp_path: Path, averaged: bool
) -> None:
    def method(student: nn.Module) -> nn.Module:
        return nn.ModuleDict({"student": student, "projection": nn.Linear(2, 3)})

    path, live = tmp_path / "checkpoint.safetensors", method(source())
    mean = method(make(seed=2)) if averaged else None
    save_state(path, live, mean, SGD(live.parameters(), 0.1), {"step": 9})
    model = make()
    load_weights(model, path)
    assert_same(model, make(seed=2) if averaged else source())


@pytest.mark.parametrize("key", [None, "state_dict", "model", "net"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "backbone.", "1."])
@pytest.mark.parametrize("new", [True, False])
def test_files_from_elsewhere(tmp_path: Path, key: str | None, prefix: str, new: bool) -> None:
    state = renamed(source().state_dict(), prefix)
    path = tmp_path / "model.pt"
    content = {key: state, "epoch": 7, "acc": 0.5} if key else state
    torch.save(content, path, _use_new_zipfile_serialization=new)
    model = make()
    load_weights(model, path)
    assert_same(model, source())


def test_unused_blocks_and_missing_counters_are_tolerated(tmp_path: Path) -> None:
    state = source().state_dict()
    unused = {f"sub_{name}": tensor for name, tensor in state.items() if name.startswith("block1.")}
    assert unused
    counters = [name for name in state if name.endswith("num_batches_tracked")]
    old = {name: tensor for name, tensor in (state | unused).items() if name not in counters}
    for prefix in ("", "module."):
        torch.save(renamed(old, prefix), tmp_path / "model.pth")
        model = make()
        load_weights(model, tmp_path / "model.pth")
        for name in state.keys() - counters:
            assert torch.equal(model.state_dict()[name], state[name]), name


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_classes": 9}, r"'fc.weight' is \(4, 64\) .* \(9, 64\) .* 4 classes, not 9"),
        ({"channels": 1}, r"'conv1.weight' is \(16, 3, 3, 3\) .* 3 channels, not 1"),
        (
            {"name": "wrn-10-2"},
            r"'block1.layer.0.conv1.weight' is \(16, 16, 3, 3\) .* architecture",
        ),
        (
            {"name": "wrn-16-1"},
            r"it has no 'block1.layer.1.bn1.weight' \(but '.*'\); name",
        ),
        ({"name": "mobilenetv2"}, "not the weights of this network: .* architecture"),
    ],
)
def test_another_network(
    tmp_path: Path, suffix: str, other: dict[str, object], message: str
) -> None:
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pt":
        torch.save(source().state_dict(), path)
    else:
        save_model(path, source(), {"architecture": "wrn-10-1"})
    model = make(**other)  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(
    ("mean", "std", "prefix"),
    [
        ("0.mean", "0.std", "1."),
        ("normalize.mean", "normalize.std", "model."),
        ("module.0.mean", "module.0.std", "module.1."),
        ("mu", "sigma", ""),
    ],
)
def test_a_network_that_normalises_by_itself(
    tmp_path: Path, mean: str, std: str, prefix: str
) -> None:
    """As public checkpoints hold it; what is said to do makes a file that is taken."""
    path = tmp_path / "teacher.pt"
    weights = renamed(source().state_dict(), prefix)
    normaliser = {mean: torch.tensor(MEAN).view(1, 3, 1, 1), std: torch.tensor(STD).view(3, 1, 1)}
    torch.save({**normaliser, **weights}, path)
    said = r"its images itself .* without these and say --mean 0\.1 0\.2 0\.3 --std 0\.5 0\.6 0\.7$"
    with pytest.raises(UserError, match=said):
        load_weights(make(), path)
    torch.save(weights, path)
    load_weights(make(), path)


def test_entries_too_many(tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(source().state_dict() | {"fc2.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"its 'fc2.weight' has no place there"):
        load_weights(make(), path)


class Code:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.mkdir, (Path("executed"),)  # type: ignore[return-value]


def cut(path: Path, *, new: bool, keep: float) -> None:
    torch.save({"state_dict": source().state_dict()}, path, _use_new_zipfile_serialization=new)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])


def pickled(path: Path, value: object, protocol: int | None = None) -> None:
    path.write_bytes(pickle.dumps(value, protocol))


def scripted(path: Path) -> None:
    with warnings.catch_warnings(action="ignore"):  # TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: p.write_text("\n<!DOCTYPE html><html>Quota exceeded</html>"), "a web page"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda p: p.write_text("hello, this is not a checkpoint"), "not a PyTorch file"),
        (lambda p: p.write_bytes(b""), "truncated"),
        (lambda p: p.write_bytes(bytes(range(256)) * 8), "not a PyTorch file"),
        (lambda p: cut(p, new=True, keep=0.001), "truncated"),
        (lambda p: cut(p, new=True, keep=0.9), "truncated"),
        (lambda p: cut(p, new=False, keep=0.001), "truncated"),
        (lambda p: cut(p, new=False, keep=0.9), "truncated"),
        (lambda p: torch.save({"state_dict": {}, "x": Code()}, p), "could run code"),
        (lambda p: torch.save(nn.Linear(2, 2), p), "could run code"),
        (lambda p: torch.save({"args": argparse.Namespace(a=1)}, p), "could run code"),
        (lambda p: pickled(p, Code()), "could run code"),
        (lambda p: pickled(p, Code(), 2), "not a PyTorch file|could run code"),
        (lambda p: torch.save({"epoch": 3, "best": 0.5}, p), "no weights but keys epoch, best"),
        (lambda p: torch.save([1, 2], p), "no weights but a list"),
        (lambda p: torch.save({}, p), "no weights but a dict"),
        (scripted, "a TorchScript archive, .* save torch.jit.load"),
        (lambda p: p.mkdir(), "no such file"),
        (lambda p: None, "no such file"),
    ],
)
def test_files_that_are_no_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[Path], object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "teacher.pt"
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(make(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("said", [{"classes": [1, 2]}, {"classes": None}, {"size": None}])
def test_files_of_a_script_may_say_more_or_less(tmp_path: Path, said: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    save_model(path, make(), {"architecture": "wrn-10-1", **said})
    _, meta = load_model(path)
    assert meta.items() >= said.items()


@pytest.mark.parametrize(
    "said",
    [
        {"num_classes": "10"}, {"channels": None}, {"mean": "x"}, {"std": ["x"]},
        {"architecture": 3}, {"classes": "cat"}, {"size": "x"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("load", [load_model, said_of])
def test_own_files_that_say_the_impossible(
    tmp_path: Path, load: Callable[[Path], object], said: dict[str, Any]
) -> None:
    path = tmp_path / "model.safetensors"
    meta = {"architecture": "resnet20", "num_classes": 10, "channels": 3, "mean": None, "std": None}
    save_tensors(path, {}, {**meta, **said})
    with pytest.raises(
        UserError, match=rf"not written by this package; make it, .*{next(iter(said))}"
    ):
        load(path)


def test_own_files_that_are_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {}, {})
    with pytest.raises(UserError, match="does not say what network"):
        load_model(path)
    with pytest.raises(UserError, match=r"it has no 'conv1.weight'"):
        load_weights(make(), path)
    with pytest.raises(UserError, match="name the architecture"):
        load_model(tmp_path / "model.pt")
    save_model(path, source(), {"architecture": "wrn-10-3"})
    with pytest.raises(UserError, match=r"'block1.layer.0.conv1.weight' is"):
        load_model(path)
    save_model(path, source(), {"architecture": "mine"})
    with pytest.raises(UserError, match=r"m.*: unknown model 'mine'.*; register a network of your"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        load_model(path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = create_model("digits-cnn-2", num_classes=3, channels=1, seed=0)
    with torch.no_grad():
        model.get_classifier().weight[0, 0] = torch.nan
    save_model(tmp_path / "m.safetensors", model, {"architecture": "digits-cnn-2"})
    with pytest.raises(UserError, match=r"'.*weight' holds NaN or infinite weights"):
        load_model(str(tmp_path / "m.safetensors"))


@pytest.mark.parametrize("kind", ["sparse", "int8", "complex64"])
def test_weights_of_another_kind_are_refused(tmp_path: Path, kind: str) -> None:
    state = create_model("digits-cnn-2", num_classes=10, channels=1, seed=0).state_dict()
    name = next(name for name, value in state.items() if value.ndim == 2)
    convert = {"sparse": Tensor.to_sparse, "int8": Tensor.char, "complex64": Tensor.cfloat}[kind]
    torch.save(state | {name: convert(state[name])}, tmp_path / "m.pt")
    model = create_model("digits-cnn-2", num_classes=10, channels=1, seed=1)
    with pytest.raises(UserError, match=rf"'{name}' holds {kind}.* numbers; save the weights as"):
        load_weights(model, tmp_path / "m.pt")


def test_the_average_that_torch_keeps_loads(tmp_path: Path) -> None:
    average = torch.optim.swa_utils.AveragedModel(source())
    path = tmp_path / "average.pt"
    torch.save(average.state_dict(), path)
    model = make(seed=3)
    load_weights(model, path)
    assert_same(model, average.module)
