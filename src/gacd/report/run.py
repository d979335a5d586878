"""The report of one run folder, made of the files in it and of nothing else."""

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gacd.errors import UserError
from gacd.report.figures import (
    accuracy_against_eps,
    natural_against_autoattack,
    training_curves,
)
from gacd.report.page import Check, Checks, Section, write_report
from gacd.report.pictures import Pictures, attacked_pictures
from gacd.report.records import RECORD, read_checks, read_examples, read_log, read_record
from gacd.report.tables import (
    Cell,
    Column,
    Record,
    Table,
    comparison_table,
    method_cell,
    number,
)
from gacd.storage import read_json, write_json

Records = Mapping[str, Record]
"""The record of every evaluated model, by its name in the table."""


def write_run_report(out: Path, title: str | None = None, *, order: Sequence[str] = ()) -> None:
    """Write `report.html` of a run folder, and every figure of it as `figures/*.svg` or `*.png`.

    Read are `<model>/record.json`, `examples.json` and `diagnosis.json`, and the `log.jsonl` of
    every stage; what has no data is left out. Models and stages follow `order`, then the alphabet.
    A `title` is kept in `report.json`, for the times when none is given.

    Raises:
        UserError: the folder holds no record, a file in it is damaged, or it cannot be written to.
    """
    folders = [path.parent for path in sorted_paths(out, f"*/{RECORD}", order)]
    if not folders:
        raise UserError(f"{out}: no evaluated model in this folder (no */record.json) to report on")
    kept = out / "report.json"
    if title is not None:
        write_json(kept, {"title": title})
    elif kept.is_file():
        title = read_json(kept, {"title": str})["title"]

    every = [read_record(folder / RECORD) for folder in folders]
    names = [str(method_cell(record)) for record in every]
    records = dict(zip(names, every, strict=True))
    examples = _beside(folders, names, "examples.json", read_examples)
    logs = {
        path.parent.relative_to(out).as_posix(): read_log(path)
        for path in sorted_paths(out, "**/log.jsonl", order)
    }
    write_report(
        out / "report.html",
        title=title or f"Run {out.name}",
        intro=list(_intro(every, trained=any(logs.values()))),
        sections=[
            _accuracies(every),
            *_pictured(records, examples, logs),
            *_costs(every),
            *_masking(records, _beside(folders, names, "diagnosis.json", read_checks)),
        ],
        provenance=provenance(every, "results.json; in full in record.json of each model's folder"),
    )


def _pictured(
    records: Records, examples: Mapping[str, Record], logs: Mapping[str, Sequence[Record]]
) -> Iterator[Section]:
    """A section for every figure that there are data for."""
    if examples:
        first = next(iter(examples.values()))
        pictures = attacked_pictures(
            _pixels(first, "clean"),
            {name: _pixels(example, "attacked") for name, example in examples.items()},
            {name: example["answers"] for name, example in examples.items()},
            first["truth"],
        )
        text = "The first test image of each class shown, attacked by PGD-20 against each model."
        yield Section("Attacked images", [text], [pictures.named("attacked-images")])
    curves = {name: _curve(r) for name, r in records.items() if r.get("eps_curve")}
    if curves:
        first = next(iter(records.values()))  # one run has one budget
        eps, in_255ths = first["settings"]["eps"], "/255" in str(first["config"]["threat"]["eps"])
        text = (
            "A robust model loses little by little as the budget of PGD-20 (in steps of ε/4) grows."
        )
        figure = accuracy_against_eps(curves, eps, in_255ths).named("accuracy-against-eps")
        yield Section("Accuracy against the budget", [text], [figure])
    if any("autoattack" in record for record in records.values()):
        figure = natural_against_autoattack(list(records.values()))
        content = [figure.named("natural-against-autoattack")]
        yield Section("Natural against robust accuracy", [], content)
    if any(logs.values()):
        mi = any("mi" in row for rows in logs.values() for row in rows)
        text = (
            "The mutual information is what the student's features tell about the teacher's, at "
            "least (InfoNCE's lower bound); that bound cannot exceed its ceiling, the logarithm of "
            "the number of anchors. It is taken at the loss's temperature, at which images that an "
            "attack leads astray can bring it below 0: there it tells nothing."
        )
        yield Section("Training", [text] * mi, [training_curves(logs).named("training-curves")])


def _curve(record: Record) -> list[tuple[float, float, float, float]]:
    """The recorded points, and the natural accuracy for eps = 0."""
    points = [tuple(point) for point in record["eps_curve"]]
    low, high = record["intervals"]["natural"]
    return [(0.0, record["natural"], low, high), *(p for p in points if p[0] > 0)]


def _pixels(example: Record, which: str) -> Pictures:
    return np.frombuffer(base64.b64decode(example[which]), np.uint8).reshape(example["shape"])


def _intro(records: Sequence[Record], *, trained: bool) -> Iterator[str]:
    """What was run: which networks on what data, and against which attacker.

    Only of what was `trained` here is it known what it was trained and chosen on.
    """
    first = records[0]
    teacher = [f"a teacher, {_size(r)}" for r in records if r.get("role") == "teacher"]
    counts = Counter(_size(r) for r in records if r.get("role") != "teacher")
    others = [f"{n} networks, {s}" if n > 1 else f"a network, {s}" for s, n in counts.items()]
    networks = ", and ".join([*teacher, *others])
    seeds = ", ".join(str(seed) for seed in sorted({r["seed"] for r in records}))
    yield f"{networks[0].upper()}{networks[1:]}, on {first['dataset']}; seed {seeds}."
    if more := max(r.get("unlabelled", 0) for r in records):
        yield (
            f"Students with a teacher also trained on {more:,} images without labels, with the "
            "teacher's answers as their labels."
        )
    eps = f"ε\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{first['config']['threat']['eps']}"
    reach = {
        "linf": f"change every pixel value by up to {eps}",
        "l2": f"move an image by a Euclidean distance of up to {eps}",
    }[first["settings"]["norm"]]
    apart = "were used neither for training nor for any choice made here"
    fate = apart if trained else "are the data's own test part"
    yield (
        f"The attacker knows the whole model and may {reach}, where black is 0 and white is 1. "
        f"The {first['n']:,} test images {fate}."
    )


def _size(record: Record) -> str:
    return f"{record['model']} ({record['parameters']:,} parameters)"


def _accuracies(records: Sequence[Record]) -> Section:
    compared = (
        "AutoAttack is the strongest, and the figure to compare."
        if any("autoattack" in record for record in records)
        else "AutoAttack was not run: a weaker attack alone can flatter a model."
    )
    return Section(
        "Accuracy under attack",
        [
            "Natural: the images as they are. Under attack: the share on which the model is still "
            f"right when each image is attacked against it. {compared}"
        ],
        [comparison_table(records, worst=True)],
    )


def _costs(records: Sequence[Record]) -> Iterator[Section]:
    """Passes and FLOPs of every method, so that results can be compared at equal compute."""
    known = [record for record in records if "cost" in record and "train_flops" in record]
    if not known:
        return
    passes = ("student_forward", "student_backward", "teacher_forward", "teacher_backward")
    rows = [
        (
            method_cell(record),
            *(Cell(f"{record['cost'][name]:.3g}") for name in passes),
            Cell(f"{record['cost']['flops'] / 1e6:,.2f}"),
            Cell(f"{record['train_flops'] / 1e12:,.3g}"),
        )
        for record in known
    ]
    yield Section(
        "Cost of training",
        [
            "Counted per training image, the attack included, and averaged over a method's stages: "
            "passes forward and backward through student and teacher, and floating-point "
            "operations in matrix products and convolutions."
        ],
        [
            Table(
                "Passes and millions of operations an image; 10^12 operations in all",
                (
                    Column("method"),
                    *(Column(name.replace("_", " "), numeric=True) for name in passes),
                    Column("MFLOP", numeric=True),
                    Column("TFLOP in all", numeric=True),
                ),
                tuple(rows),
            )
        ],
    )


def _masking(records: Records, diagnoses: Mapping[str, Sequence[Record]]) -> Iterator[Section]:
    """Pass or fail of every model in a line, then every check with its figures in a table."""
    if not diagnoses:
        return
    checks = dict.fromkeys(check["name"] for found in diagnoses.values() for check in found)
    rows = []
    for name, found in diagnoses.items():
        by_name = {check["name"]: check for check in found}
        rows.append(
            (method_cell(records[name]), *(_verdict(by_name.get(check)) for check in checks))
        )
    yield Section(
        "Are the gradients masked?",
        [
            "A defence can hide its gradients from an attack instead of withstanding it. These "
            f"checks on a fixed part of the test images{images_checked(diagnoses.values())} fail "
            "where an attack is blind (Athalye et al. 2018, Carlini et al. 2019)."
        ],
        [
            Checks([_summary(name, c) for name, c in diagnoses.items()]),
            Table(
                "Every check: what was found and the most that passes, in percentage points",
                (Column("method"), *(Column(check, numeric=True) for check in checks)),
                tuple(rows),
            ),
        ],
    )


def images_checked(diagnoses: Iterable[Sequence[Record]]) -> str:
    """On how many test images the checks were made, as far as it is recorded."""
    counts = sorted({check["n"] for found in diagnoses for check in found if "n" in check})
    return f" ({' or '.join(map(str, counts))} of them)" if counts else ""


def _summary(name: str, checks: Sequence[Record]) -> Check:
    failed = [f"{check['name']} ({check['text']})" for check in checks if not check["passed"]]
    passed = f"{len(checks) - len(failed)} of {len(checks)} checks passed."
    return Check(name, not failed, passed + (f" Failed: {'; '.join(failed)}." if failed else ""))


def _verdict(check: Record | None) -> Cell:
    if check is None:
        return Cell("–")
    word, sign = ("pass", "≤") if check["passed"] else ("FAIL", ">")
    return Cell(word, f"{number(check['value'], 1)} {sign} {number(check['limit'], 1)}")


def provenance(records: Sequence[Record], files: str) -> dict[str, object]:
    """Commits, versions, hardware and dates of all records, each once; where to read more."""
    by_time = sorted(records, key=lambda record: str(record["timestamp"]))
    machines = [record["environment"] for record in by_time]
    times = dict.fromkeys(by_time[i]["timestamp"][:16].replace("T", " ") for i in (0, -1))
    facts = {
        "gacd": _each(m["gacd"] for m in machines),
        "commit": _each(map(_commit, machines), ", "),
        "measured (UTC)": " to ".join(times),
        "python": _each(m["python"] for m in machines),
        "versions": _each(
            ", ".join(f"{name} {version}" for name, version in m["versions"].items() if version)
            for m in machines
        ),
        "platform": _each(m["platform"] for m in machines),
        "processor": _each(
            f"{m['cpu']}, {m['cores']} cores, {m['threads']} used" for m in machines
        ),
        "gpus": _each(", ".join(m["gpus"]) for m in machines),
        "figures to read by machine": files,
    }
    return {name: fact for name, fact in facts.items() if fact}


def _each(facts: Iterable[str], between: str = "; ") -> str:
    """Every fact once, in order."""
    return between.join(dict.fromkeys(fact for fact in facts if fact))


def _commit(environment: Record) -> str:
    if environment["commit"] is None:
        return "none (installed package)"
    return str(environment["commit"]) + " with changes" * bool(environment["dirty"])


def _beside(
    folders: Sequence[Path], names: Sequence[str], file: str, read: Callable[[Path], Any]
) -> dict[str, Any]:
    """What is in `file` of every folder that has it, by the name of the folder's model."""
    pairs = zip(names, folders, strict=True)
    return {name: read(folder / file) for name, folder in pairs if (folder / file).is_file()}


def sorted_paths(out: Path, pattern: str, order: Sequence[str]) -> list[Path]:
    """The files of a run folder that match: by the row in `order`, then by name."""
    rank = {name: i for i, name in enumerate(order)}

    def key(path: Path) -> tuple[int, Path]:
        return rank.get(path.relative_to(out).parts[0], len(rank)), path

    return sorted(out.glob(pattern), key=key)
