"""Files that are either whole or absent: JSON, and tensors with JSON beside them.

Everything is written to a temporary neighbour and renamed, so a killed process leaves the old file.
Tensors are safetensors: nothing here can execute code from a file.
"""

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gacd.errors import UserError

_META = "gacd"


def from_home(path: Path) -> Path:
    """A path with `~` as the folder that it means; as it is where it means none."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    _atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data`, atomically."""
    _atomically(path, lambda temporary: temporary.write_bytes(data))


def append_json_line(path: Path, value: Any) -> None:
    """Append `value` as one line of JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(value))
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """Write a JSON-lines file anew, atomically."""
    write_bytes(path, "".join(map(_line, values)).encode())


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def read_json(path: Path, *keys: str) -> Any:
    """The JSON value in a file: an object with these `keys`, if there are any.

    Raises a UserError that names the file where it holds no such thing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: not a whole JSON file; delete it and run again") from None
    if keys and not (isinstance(value, dict) and value.keys() >= set(keys)):
        raise UserError(f"{path}: not written by this package; delete it and run again")
    return value


def read_json_lines(path: Path) -> list[Any]:
    """The values of a JSON-lines file; a line cut short by a kill is left out."""
    values = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return values


def save_tensors(path: Path | str, tensors: "Mapping[str, Any]", meta: Mapping[str, Any]) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, atomically."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    header = {_META: json.dumps(dict(meta))}
    whole: dict[str, Any] = {}
    places = set()
    for name, tensor in tensors.items():
        kept = tensor.detach().contiguous()
        place = kept.untyped_storage().data_ptr()  # tied weights: each name gets numbers of its own
        whole[name] = kept.clone() if place in places else kept
        places.add(place)

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # the user's; safetensors' files are its owner's alone
        try:
            save_file(whole, temporary, metadata=header)
        except SafetensorError as error:  # it wraps the operating system's errors in its own
            text = str(error)
            if "No space left" in text or "os error 28" in text:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise OSError(text) from error
        temporary.chmod(mode)

    _atomically(Path(path), write)


def load_tensors(path: Path | str, *, kept: bool = True) -> "tuple[dict[str, Any], dict[str, Any]]":
    """The tensors (on the CPU, mapped from the file) and the `meta` that `save_tensors` wrote.

    A damaged file that a run makes for itself need not be `kept`: the user is told to delete it.
    """
    with _opened(Path(path), kept) as (file, meta):
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118


def load_meta(path: Path) -> dict[str, Any]:
    """The `meta` of a tensor file, without reading its tensors."""
    with _opened(path, kept=True) as (_, meta):
        return meta


@contextmanager
def _opened(path: Path, kept: bool) -> Iterator[tuple[Any, dict[str, Any]]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise UserError(f"{path}: no such file")
    path.open("rb").close()  # one that may not be read is "not there" to safetensors
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads((file.metadata() or {}).get(_META, "{}"))
    except SafetensorError:
        remedy = (
            "make it, or download it, again" if kept else "delete it and run the same command again"
        )
        raise UserError(f"{path}: truncated or not a safetensors file; {remedy}") from None


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """A short stable hash (16 hex digits) of some strings or bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def sweep(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing somewhere in `folder`."""
    for path in folder.rglob(".*.tmp"):
        if path.name.split(".")[-2].isdigit():  # the process
            path.unlink(missing_ok=True)


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    if error.errno == errno.ENOSPC:
        return UserError(
            f"{path}: no space left on the disk; free some and run the same command again"
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return UserError(f"{path}: cannot be written (a file stands where its folder should be)")
    return UserError(f"{path}: cannot be written ({error.strerror or error})")
