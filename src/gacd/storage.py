"""Files that are either whole or absent: JSON, and tensors with JSON beside them.

Everything is written to a temporary neighbour and renamed, so a killed process leaves the old file.
Tensors are safetensors: nothing here can execute code from a file.
"""

import errno
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any

from gacd.errors import UserError

WITHOUT_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP
"""What a file system answers that knows no locks."""
_META = "gacd"
_AGAIN = "delete it and run again"

Shape = Any
"""Of a JSON value: a type, a test, or what looks as the value does: [shape] or {key: shape}.

`key?` may be missing; the key `str` stands for all that there are.
"""


def from_home(path: Path) -> Path:
    """A path with `~` as the folder that it means; as it is where it means none."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


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


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return is_whole(value) and value >= 1


def is_percent(value: Any) -> bool:
    """Whether it is a share in percent."""
    return is_number(value) and 0 <= value <= 100


def are_numbers(value: Any, n: int | None = None) -> bool:
    """Whether it is a list of (so many) finite numbers."""
    return (
        isinstance(value, list) and len(value) == (n or len(value)) and all(map(is_number, value))
    )


def read_json(path: Path, shape: Shape = object, *, remedy: str = _AGAIN) -> Any:
    """The JSON value in a file, of this `shape`.

    Raises a UserError that names the file, and the remedy, where it holds no such thing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not a whole JSON file; {remedy}") from None
    check_json(path, value, shape, remedy)
    return value


def check_json(path: Path, value: Any, shape: Shape, remedy: str = _AGAIN) -> None:
    """Refuse a value, read from this file, that is not of a shape."""
    for misfit in misfits(value, shape):
        raise UserError(f"{path}: not written by this package; {remedy} ({misfit})")


def misfits(value: Any, shape: Shape, *at: str) -> Iterator[str]:
    """What is not of the shape, in words."""
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            names = list(value) if key is str else [key.removesuffix("?")]
            for name in names:
                if name in value:
                    yield from misfits(value[name], inner, *at, name)
                elif not key.endswith("?"):
                    yield f"it has no {'.'.join([*at, name])}"
    elif isinstance(shape, list) and isinstance(value, list):
        for place, item in enumerate(value):
            yield from misfits(item, shape[0], *at, str(place))
    elif isinstance(shape, dict | list) or not (
        isinstance(value, shape) if isinstance(shape, type | UnionType) else shape(value)
    ):
        yield f"{'.'.join(at) or 'it'} is {json.dumps(value)[:40]}"


def read_json_lines(path: Path, shape: Shape = dict) -> list[Any]:
    """The objects of a JSON-lines file that have this shape; lines cut by a kill are left out."""
    values = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not any(misfits(value, shape)):
            values.append(value)
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
    remedy = (
        "make it, or download it, again (in a run's folder: delete it and run that command again)"
        if kept
        else "delete it and run the same command again"
    )
    try:
        with safe_open(path, framework="pt") as file:
            yield file, _meta(path, (file.metadata() or {}).get(_META, "{}"), remedy)
    except SafetensorError:
        raise UserError(f"{path}: truncated or not a safetensors file; {remedy}") from None


def _meta(path: Path, text: str, remedy: str) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        meta = json.loads(text)
        if isinstance(meta, dict):
            return meta
    raise UserError(f"{path}: what it says of itself, '{_META}', is damaged; {remedy}")


def fingerprint(parts: Iterable[str | bytes]) -> str:
    """A short stable hash (16 hex digits) of some strings or bytes."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def sweep(folder: Path) -> None:
    """Remove what killed processes left of files that they were writing somewhere in `folder`.

    What is younger than an hour may be another's, who is at it.
    """
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > 3600
            if old and path.name.split(".")[-2].isdigit():  # the process
                path.unlink()


def _atomically(path: Path, write: Callable[[Path], object]) -> None:
    # Two machines that share a folder may have processes of one number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{secrets.randbelow(10**9):09}.tmp")
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
