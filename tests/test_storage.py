"""Files are whole or absent, and what goes wrong is said in one line."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gacd.errors import UserError
from gacd.storage import (
    append_json_line,
    fingerprint,
    is_count,
    is_number,
    is_whole,
    load_meta,
    load_tensors,
    read_json,
    read_json_lines,
    save_tensors,
    write_bytes,
    write_json,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    "json": lambda path: write_json(path, {"a": 1}),
    "bytes": lambda path: write_bytes(path, b"abc"),
    "tensors": lambda path: save_tensors(path, {"a": torch.zeros(2)}, {}),
    "line": lambda path: append_json_line(path, {"a": 1}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
atomic = pytest.mark.parametrize("write", list(WRITERS.values())[:3], ids=list(WRITERS)[:3])


def test_json_comes_back_and_folders_are_made(tmp_path):
    value = {"ε": [0.5, None, "8/255"], "deep": {"n": 3}}
    write_json(tmp_path / "a" / "b" / "c.json", value)
    assert read_json(tmp_path / "a" / "b" / "c.json") == value


def test_bytes_come_back(tmp_path):
    write_bytes(tmp_path / "figures" / "a.png", bytes(range(256)))
    assert (tmp_path / "figures" / "a.png").read_bytes() == bytes(range(256))


def test_tensors_and_meta_come_back(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors = {
        "x": torch.arange(6.0).reshape(2, 3).t(),
        "half": torch.ones(2, dtype=torch.bfloat16),
    }
    save_tensors(path, tensors, {"epoch": 3, "nested": {"a": [1, 2]}})
    loaded, meta = load_tensors(path)
    assert meta == load_meta(path) == {"epoch": 3, "nested": {"a": [1, 2]}}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[k], tensors[k]) for k in tensors)
    assert loaded["half"].dtype == torch.bfloat16


def test_lines_survive_a_kill_in_the_last_one(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    for epoch in (1, 2):
        append_json_line(path, {"epoch": epoch})
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + '{"epoch": 3, "lo', encoding="utf-8")
    assert read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]
    path.write_text('{"epoch": 1, "lo\n' + whole, encoding="utf-8")  # what follows counts
    assert read_json_lines(path) == [{"epoch": 1}, {"epoch": 2}]


def test_lines_of_another_kind_are_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'\xff\n3\n[]\n{}\n{"epoch": "x"}\n{"epoch": 1}\n')
    assert read_json_lines(path, {"epoch": is_whole}) == [{"epoch": 1}]
    assert read_json_lines(path) == [{}, {"epoch": "x"}, {"epoch": 1}]


@writers
def test_a_file_in_the_place_of_the_folder(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "folder" / "x"):
        with pytest.raises(UserError, match=r"cannot be written \(a file stands where"):
            write(path)
    assert (tmp_path / "file").read_text() == "mine"


@writers
def test_no_space_left(tmp_path, write, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for name in ("write_text", "write_bytes", "open"):
        monkeypatch.setattr(Path, name, full)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"x: no space left on the disk; free some"):
        write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_no_space_left_as_safetensors_says_it(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        save_tensors(tmp_path / "x", {"a": torch.zeros(2)}, {})


@atomic
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, write, monkeypatch):
    path = tmp_path / "x"
    write(path)
    before = path.read_bytes()

    def half_written(self: Path, target: Path) -> None:
        assert self.stat().st_size > 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "replace", half_written)
    with pytest.raises(UserError, match=r"cannot be written \(Input/output error\)"):
        write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@atomic
def test_an_interrupt_while_writing_leaves_the_old_file(tmp_path, write, monkeypatch):
    path = tmp_path / "x"
    write(path)
    before = path.read_bytes()

    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("load", [load_tensors, load_meta])
@pytest.mark.parametrize("keep", [0, 5, 100], ids="{} bytes".format)
def test_damaged_tensor_files_are_named_with_a_remedy_that_spares_them(tmp_path, load, keep):
    path = tmp_path / "teacher.safetensors"
    save_tensors(path, {"a": torch.zeros(100)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"teacher\.safetensors: truncated .* download it, again"):
        load(path)
    with pytest.raises(UserError, match="delete it and run the same command again"):
        load_tensors(path, kept=False)  # what a run made for itself


@pytest.mark.parametrize("load", [load_tensors, load_meta])
@pytest.mark.parametrize("text", ["{broken", "[]", "3"])
def test_a_tensor_file_whose_description_is_damaged_is_named(tmp_path, load, text):
    from safetensors.torch import save_file

    path = tmp_path / "teacher.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"gacd": text})
    with pytest.raises(UserError, match=r"teacher\.safetensors: what it says of itself.*damaged"):
        load(path)


@pytest.mark.parametrize("load", [load_tensors, load_meta, read_json])
def test_missing_files_are_named(tmp_path, load):
    with pytest.raises(UserError, match="nothing: no such file"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b'{"a": 1', b"\xff\xfe"], ids=["cut", "not utf-8"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"record\.json: not a whole JSON file"):
        read_json(path)


@pytest.mark.parametrize("content", ["{}", "[]", "3", '{"seed": 1}'])
def test_json_of_another_shape_is_named(tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    read_json(path)
    with pytest.raises(UserError, match=r"record\.json: not written by this package; delete it"):
        read_json(path, {"seed": is_whole, "method": str})


@pytest.mark.parametrize(
    ("content", "misfit"),
    [
        ("[]", "it is []"),
        ('{"n": 1}', "it has no deep"),
        ('{"n": NaN, "deep": {}}', "n is NaN"),
        ('{"n": true, "deep": {}}', "n is true"),
        ('{"n": 1, "deep": {"a": [1, "x"]}}', 'deep.a.1 is "x"'),
        ('{"n": 1, "deep": {}, "name": null}', "name is null"),
        ('{"n": 1, "deep": {"a": [1, 2.5]}, "name": "x"}', None),
    ],
)
def test_json_is_of_the_shape_asked_for(tmp_path, content, misfit):
    path = tmp_path / "record.json"
    path.write_text(content)
    shape = {"n": is_count, "deep": {str: [is_number]}, "name?": str}
    if misfit is None:
        assert read_json(path, shape)["n"] == 1
        return
    with pytest.raises(UserError) as refused:
        read_json(path, shape, remedy="mend it")
    said = f"{path}: not written by this package; mend it ({misfit})"
    assert str(refused.value) == said


def test_fingerprints_tell_where_one_part_ends():
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"]) != fingerprint(["abc"])
    assert fingerprint(["ab", b"c"]) == fingerprint([b"ab", "c"])
    assert len(fingerprint([])) == 16


def test_tied_weights_are_written_under_both_names(tmp_path):
    tied = torch.arange(6.0)
    save_tensors(tmp_path / "t.safetensors", {"a": tied, "b": tied, "c": tied[2:]}, {})
    found, _ = load_tensors(tmp_path / "t.safetensors")
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied[2:])


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_tensor_file_is_as_readable_as_the_others(tmp_path):
    before = os.umask(0o022)
    try:
        save_tensors(tmp_path / "t.safetensors", {"a": torch.zeros(1)}, {})
        write_json(tmp_path / "t.json", {})
    finally:
        os.umask(before)
    modes = {path.suffix: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes[".safetensors"] == modes[".json"]
