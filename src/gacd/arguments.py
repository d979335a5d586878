"""Words of the command line as the parser reads them, and what it says in our words.

Nothing here imports torch, so that help and refusals are quick.
"""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from importlib.resources import files
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from gacd.errors import UserError, unknown
from gacd.storage import from_home

DISTILLING = ("distill", "quickstart", "speedrun")
"""The commands that the package's recipes are of."""
_ABSENT = object()


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = files("gacd") / "recipes"
    return sorted(
        f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml")
    )


def prepared(command: str, config: type, arguments: Sequence[str]) -> list[str]:
    """The arguments of a command with everything written out that the parser asks for.

    Raises:
        UserError: an unknown recipe, or a file that holds none.
    """
    words = list(arguments)
    if command in ("quickstart", "speedrun"):
        words = ["--config", command, *words]
    if command == "compare":
        words = _compared(words)
    if command == "seeds":
        words = _runs(words)
    if command == "study":
        words = _scaled(words)
    if command == "report" and words and not words[0].startswith("-"):
        words = ["--out", *words]
    settings = _settings(config)
    _refuse_files(words, settings)
    return _listed(_recipes_first(command, words, settings), settings)


def _refuse_files(words: Sequence[str], settings: Mapping[str, Any]) -> None:
    """Refuse `--teacher teacher.pt`: the parser would read the file as YAML."""
    for word, value in _followed(words):
        name = word.removeprefix("--")
        if word == name or not is_dataclass(settings.get(name)):
            continue
        # Path.is_file raises for words that are too long for a name.
        if os.path.isfile(value) and not value.endswith((".yaml", ".yml", ".json")):  # noqa: PTH113
            of = f"--{name}.checkpoint" if f"{name}.checkpoint" in settings else f"--{name}.NAME"
            raise UserError(
                f"{name} is '{value}', but holds settings of its own: say {of} {value} "
                "(a file of settings ends in .yaml)"
            )


def defaults(config: type, words: Sequence[str]) -> dict[str, Any]:
    """What the recipes among prepared words make the defaults, for `--help` to show."""
    import yaml

    if not {"-h", "--help"} & set(words):
        return {}
    settings = _settings(config)

    def flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in tree.items():
            if is_dataclass(settings.get(prefix + name)):
                yield from flat(value, f"{prefix}{name}.")
            elif prefix + name in settings:  # running it would refuse others
                yield prefix + name, value

    found: dict[str, Any] = {}
    for path in _given(words, "--config"):
        found |= flat(yaml.safe_load(Path(path).read_text(encoding="utf-8")), "")
    return found


def _settings(config: type, prefix: str = "") -> dict[str, Any]:
    """The types of a configuration's settings and sections, by name, with dots."""
    settings: dict[str, Any] = {}
    for name, kind in get_type_hints(config).items():
        settings[prefix + name] = kind
        if is_dataclass(kind):
            assert isinstance(kind, type)
            settings |= _settings(kind, f"{prefix}{name}.")
    return settings


def _recipes_first(command: str, words: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Every `--config NAME` as the path of the recipe of that name, before the flags.

    Flags override recipes wherever they stand; the parser lets the last one win.
    """
    configs, flags = [], []
    given = iter(words)
    for word in given:
        name, equals, value = word.partition("=")
        if name != "--config":
            flags.append(word)
        elif equals or (value := next(given, "")):
            configs.append(f"--config={_recipe(command, value, settings)}")
        else:
            flags.append(word)  # the parser says what it lacks
    return [*configs, *flags]


def _recipe(command: str, name: str, settings: Mapping[str, Any]) -> Path:
    path, plain = from_home(Path(name)), name.removesuffix(".yaml")
    is_ours = plain in recipes() and path.is_dir()  # such as runs/quickstart, seen from runs
    if os.sep not in name and (is_ours or not path.exists()):
        if plain not in recipes() and (plain != name or command not in DISTILLING):
            raise UserError(f"{path}: no such file")
        if plain not in recipes():
            raise unknown("recipe", name, recipes())
        if command not in DISTILLING:
            raise UserError(
                f"the recipe '{plain}' is one of 'gacd distill': give a YAML file of your own"
            )
        path = Path(str(files("gacd") / "recipes" / f"{plain}.yaml"))
    _check_recipe(path, settings)
    return path


def _check_recipe(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what the parser would take without a word, or refuse with a strange one."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise UserError(f"{path}: {why}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: no text, but a recipe is a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{line}: not YAML ({problem})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no settings; write them as lines of KEY: VALUE")
    _refuse_repeated(path, text)
    for name, kind in settings.items():
        value: Any = content
        for key in name.split("."):
            value = value.get(key, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        if value is None and type(None) not in get_args(kind):
            raise UserError(f"{path}: {name} is empty; give it a value, or leave it out")
        if is_dataclass(kind) and value is not _ABSENT and not isinstance(value, Mapping):
            raise UserError(f"{path}: {name} is '{value}', but must hold settings, one a line")


def _refuse_repeated(path: Path, text: str) -> None:
    """Refuse a key that stands twice in one place: of the two, YAML drops the first."""
    import yaml

    left, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set[int]()
    while left:
        node = left.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))  # an alias may lead back
        if isinstance(node, yaml.SequenceNode):
            left += node.value
            continue
        keys = set()
        for key, value in node.value:
            name = key.tag, key.value
            if name in keys and name[0] != "tag:yaml.org,2002:merge":
                line = key.start_mark.line + 1
                raise UserError(f"{path}, line {line}: {key.value} stands there a second time")
            keys.add(name)
            left.append(value)


def _listed(words: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """`--attacks a b c`, `--methods a, b` and the like as the YAML lists that the parser reads."""
    kinds = {f"--{name}": (kind, *get_args(kind)) for name, kind in settings.items()}
    names = {n: n for n, kind in kinds.items() if any(get_origin(k) is list for k in kind)}
    if "evaluation.attacks" in settings:
        names["--attacks"] = "--evaluation.attacks"
    result: list[str] = []
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name not in names:
            result.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        text = " ".join(values)
        if not text.startswith("[") and text != "null":
            files = name in ("--students", "--runs")  # with whatever a file's name may hold
            classes = list[str | int] in kinds[names[name]]  # such as 01, 1e3 or yes
            items = values if files else [i for value in values for i in value.split(",") if i]
            if classes and len(values) > 1:  # one with a space, such as 'a, b', is a name
                parts = ([v.removesuffix(",")] if " " in v else v.split(",") for v in values)
                items = [item for part in parts for item in part if item]
            if files or classes:
                items = [json.dumps(item, ensure_ascii=False) for item in items]
            text = f"[{', '.join(items)}]"
        result += [names[name], text]
    return result


def _runs(words: Sequence[str]) -> list[str]:
    """`RUN RUN --json` as `--runs RUN RUN --json=true`, in whatever order."""
    runs, flags = [], []
    given = iter(_switched(words, "--json", "--markdown"))
    for word in given:
        if word in ("--minus", "--figure", "--config"):
            flags += [word, *islice(given, 1)]
        elif word.startswith("--runs=["):
            runs += _flow(word.partition("=")[2])
        elif word.startswith("--runs="):
            runs.append(word.partition("=")[2])
        elif word.startswith("-"):
            flags += [word] * (word != "--runs")
        else:
            runs.append(word)
    return [*(["--runs", *runs] if runs else []), *flags]


def _flow(text: str) -> list[str]:
    """The names in `[A, "B, C"]`."""
    import yaml

    try:
        return [str(name) for name in yaml.load(text, Loader=yaml.BaseLoader)]
    except yaml.YAMLError:
        raise UserError(f"runs are '{text}', but must be a list, such as [A, B]") from None


def _switched(words: Sequence[str], *switches: str) -> list[str]:
    """Every `--json`, `--json true` and `--json false` with an equals sign."""
    result: list[str] = []
    for before, word in pairwise(["", *words]):
        if before in switches and word in ("true", "false"):
            result[-1] = f"{before}={word}"
        else:
            result.append(f"{word}=true" if word in switches else word)
    return result


def _compared(words: Sequence[str]) -> list[str]:
    """`A B --json` as `--a=A --b=B --json=true`."""
    names = iter(("--a=", "--b="))
    result: list[str] = []
    for before, word in pairwise(["", *_switched(words, "--json")]):
        flagged = before.startswith("--") and "=" not in before
        if flagged or word.startswith("-"):
            result.append(word)
        else:
            result.append(next(names, "") + word)
    return result


def _scaled(words: Sequence[str]) -> list[str]:
    """`run table1 figure2 --scale small` as the scale's recipe, then `--action`, `--studies`."""
    rest = list(words)
    if len(rest) > 2 and rest[0].startswith("--scale"):  # the one flag that people put first
        first = 1 if "=" in rest[0] else 2
        rest = rest[first:] + rest[:first]
    named = []
    while rest and not rest[0].startswith("-"):
        named.append(rest.pop(0))
    flags = [f"--action={named[0]}"] if named else []
    flags += [f"--studies=[{', '.join(named[1:])}]"] if named[1:] else []
    scale = (_given(rest, "--scale") or [_scale_of(_given(rest, "--config"))])[-1]
    recipe = files("gacd") / "study" / "scales" / f"{scale}.yaml"
    known = recipe.is_file()  # the parser refuses another
    return [*(["--config", str(recipe)] if known else []), *flags, *rest]


def paths_from_home(value: Any) -> Any:
    """Settings with every `~` of a path as the folder that it means: shells leave `--out=~/x`."""
    if isinstance(value, Path):
        return from_home(value)
    if isinstance(value, list):
        return [paths_from_home(item) for item in value]
    if is_dataclass(value):
        for name, item in vars(value).items():
            setattr(value, name, paths_from_home(item))
    return value


def _given(words: Sequence[str], flag: str) -> list[str]:
    """The values of a flag."""
    return [after for word, after in _followed(words) if word == flag]


def _followed(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every word and the next one, `--name=value` as two."""
    return pairwise(chain.from_iterable(word.split("=", 1) for word in words))


def _scale_of(configs: Sequence[str]) -> str:
    """What the user's own recipes say of the scale, whose recipe they stand on."""
    import yaml

    for name in reversed(configs):
        path = from_home(Path(name))
        with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # refused later
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "scale" in content:
                return str(content["scale"])
    return "tiny"


_UNKNOWN_SETTING = re.compile(
    r"unrecognized arguments: (?P<flag>\S+)"
    r"|Group '(?P<group>.+?)' does not accept option '(?P<option>.+?)'"
    r"|Option '(?P<key>.+?)' is not accepted"
)
_UNKNOWN_CHOICE = re.compile(
    r'Parser key "(.+?)": Expected a typing\.Literal\[(.+)\]\. Got value: (.*)'
)
_WRONG_TYPE = re.compile(r"""Parser key "(.+?)": Expected a <class '(\w+)'>\. Got value: (.*)""")
_NONE_OF_TYPES = re.compile(
    r'Parser key "(.+?)": Does not validate against any of the Union subtypes '
    r"Subtypes: \[(.+?)\] Errors: .* Given value: (.*)"
)
_WRONG_SECTION = re.compile(r'Parser key "(.+?)": Unable to load config .(.*?). - ')


def explained(text: str, settings: Iterable[str]) -> str:
    """The parser's message in our words, with the nearest name where one is not known."""
    if found := _UNKNOWN_SETTING.match(text):
        parts = [part for part in found.groups() if part]
        name = ".".join(parts).removeprefix("--").partition("=")[0]
        if found["flag"] and not found["flag"].startswith("-"):
            return f"'{name}' stands where a setting was expected: --NAME VALUE; see --help"
        near = difflib.get_close_matches(name, settings, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown setting '{name}': {hint}--help lists them all"
    if found := _UNKNOWN_CHOICE.match(text):
        key, known, value = found.groups()
        return str(unknown(key, value, [name.strip(" '") for name in known.split(",")]))
    if found := _WRONG_TYPE.match(text):
        key, kind, value = found.groups()
        return f"{key} is '{value}', but must be of type {kind}"
    if found := _NONE_OF_TYPES.match(text):
        key, kinds, value = found.groups()
        kinds = re.sub(r"<class '(\w+)'>", r"\1", kinds).replace("NoneType", "null")
        quoted = "; quote yes, no, on and off" if re.search(r"\b(True|False)\b", value) else ""
        return f"{key} is '{value}', but must be of type {' or '.join(kinds.split(', '))}{quoted}"
    if found := _WRONG_SECTION.match(text):
        key, value = found.groups()
        return f"{key} is '{value}', but holds settings of its own, such as --{key}.NAME VALUE"
    return text


def one_line(text: str) -> str:
    """What a parser's error says, on one line."""
    return " ".join(text.split())
