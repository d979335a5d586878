"""The grids: what every study holds at every scale, and when two cells are one."""

from dataclasses import replace
from pathlib import Path

import pytest

from gacd import config as c
from gacd.methods.registry import parse_method
from gacd.models import create_model
from gacd.study.cells import Cell
from gacd.study.grids import STUDIES, Entry, entries
from gacd.study.work import chosen
from made_up import parsed

SCALES = ("tiny", "small", "full")


def keys(cfg: c.Study) -> list[str]:
    return [entry.cell.key for entry in chosen(cfg)]


def only(cfg: c.Study, study: str, **labels: object) -> Entry:
    found = [
        e
        for e in entries(cfg, study, cfg.seeds[0])
        if all(e.labels.get(k) == v for k, v in labels.items())
    ]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize("scale", SCALES)
def test_every_entry_of_a_study_is_told_apart_by_its_labels(scale: str) -> None:
    cfg = parsed("run", "--scale", scale)
    for study in STUDIES:
        cells: dict[str, set[str]] = {}
        for entry in entries(cfg, study, 0):
            cells.setdefault(repr(sorted(entry.labels.items())), set()).add(entry.cell.key)
        assert all(len(found) == 1 for found in cells.values())


@pytest.mark.parametrize("scale", SCALES)
def test_every_network_named_exists(scale: str) -> None:
    cfg = parsed("run", "--scale", scale)
    pairs = [cfg.main_pair, cfg.correlations_pair, *cfg.table1_pairs, *cfg.table2_pairs]
    for name in {name for pair in pairs for name in pair}:
        create_model(name, num_classes=10, channels=3, seed=0)


@pytest.mark.parametrize("scale", SCALES)
def test_autoattack_stands_beside_every_pgd_accuracy(scale: str) -> None:
    for entry in chosen(parsed("run", "--scale", scale)):
        if isinstance(entry.cell.config, c.Analyze):
            continue  # measures no accuracy
        attacks = entry.cell.config.evaluation.attacks
        assert "autoattack" in attacks and any(name.startswith("pgd") for name in attacks)


def test_the_full_scale_is_the_papers_grid() -> None:
    cfg = parsed("run", "--scale", "full")
    for study, teachers, students in (
        ("table1", {"resnet18", "wrn-34-10"}, {"resnet18", "wrn-34-10", "mobilenetv2"}),
        ("table2", {"resnet56", "wrn-40-2"}, {"resnet32", "wrn-16-2", "mobilenetv2"}),
    ):
        labels = [e.labels for e in entries(cfg, study, 0)]
        for method in ("kd", "ard", "gacd", "gacd+aft"):
            rows = [(x["teacher"], x["student"]) for x in labels if x["method"] == method]
            assert sorted(rows) == sorted((t, s) for t in teachers for s in students)
        (data,) = {e.cell.config.data.name for e in entries(cfg, study, 0)}
        assert {data} == {e.labels["dataset"] for e in entries(cfg, study, 0)}
    k = {e.labels["negatives"] for e in entries(cfg, "figure2", 0)}
    temperatures = {e.labels["temperature"] for e in entries(cfg, "figure2", 0)}
    assert k == {16, 64, 256, 1024, 4096, 16384}
    assert temperatures == {0.02, 0.05, 0.07, 0.1, 0.2}
    targets = {e.labels["dataset"] for e in entries(cfg, "table4", 0)}
    assert targets == {"stl10", "cifar100"}
    [analysis] = entries(cfg, "figure3", 0)
    assert (analysis.labels["teacher"], analysis.labels["student"]) == ("wrn-40-2", "wrn-16-2")
    assert analysis.cell.config.data.name == "cifar100"


def test_studies_share_their_cells() -> None:
    cfg = parsed("run", "--scale", "small")
    plain = only(cfg, "ablation", method="ard", reweight="none").cell
    teacher, student = cfg.main_pair
    where = {"method": "ard", "teacher": teacher, "student": student}
    assert only(cfg, "table1", **where).cell.key == plain.key
    assert only(cfg, "rivals", method="ard").cell.key == plain.key
    assert only(cfg, "ablation", method="ard", reweight="teacher").cell.key != plain.key
    aft = only(cfg, "rivals", method="gacd+aft").cell
    assert aft.parents["student"].key == only(cfg, "rivals", method="gacd").cell.key
    at_the_default = [e for e in entries(cfg, "figure2", 0) if e.cell.key == aft.key]
    assert len(at_the_default) == 2  # once among k, once among T


def test_an_address_is_of_what_decides_the_result_and_of_nothing_else() -> None:
    cfg = parsed("run", "table1", "--scale", "small")
    elsewhere = replace(
        cfg,
        data=replace(cfg.data, root=Path("elsewhere"), workers=5),
        evaluation=replace(cfg.evaluation, workers=3),
        fabric=replace(cfg.fabric, threads=2, devices=2, accelerator="gpu"),
        out=cfg.out / "elsewhere",
        workers=7,
    )
    assert keys(elsewhere) == keys(cfg)
    for other in (
        replace(cfg, data=replace(cfg.data, size=32)),
        replace(cfg, threat=replace(cfg.threat, eps="4/255")),
        replace(cfg, fabric=replace(cfg.fabric, precision="32-true")),
        replace(cfg, fabric=replace(cfg.fabric, batch_norm="synchronised")),
        replace(cfg, seeds=[3, 4, 5]),
        replace(cfg, evaluation=replace(cfg.evaluation, autoattack_limit=10)),
    ):
        assert not set(keys(other)) & set(keys(cfg))


def test_a_teacher_that_differs_makes_other_students() -> None:
    cfg = parsed("run", "table1", "--scale", "small")
    longer = replace(cfg, teacher=replace(cfg.teacher, epochs=cfg.teacher.epochs + 1))
    changed = {
        e.labels["method"]
        for e, key in zip(chosen(cfg), keys(longer), strict=True)
        if e.cell.key != key and e.labels["role"] != "teacher"
    }
    assert changed == {"kd", "ard", "gacd", "gacd+aft"}


def test_what_a_study_is_told_reaches_its_cells() -> None:
    cfg = parsed("run", "--scale", "small", "--linear_select", "natural", "--analyzed_images", "7")

    def cell(study: str, **labels: object) -> Cell:
        return only(cfg, study, **labels).cell

    def rival(method: str) -> Cell:
        return cell("rivals", method=method, student=cfg.main_pair[1])

    for method, epochs in cfg.epochs.items():
        config = rival(method).config
        if isinstance(config, c.Finetune):  # the second stage has the study's own
            assert config.training == cfg.finetune
            config = rival(method).parents["student"].config
        first = method.removesuffix("+awp").removesuffix("+aft")
        alone = parse_method(first).trains_head
        assert (config.training if alone else config.distillation).epochs == epochs, method
    assert rival("gacd").config.distillation == cfg.distillation
    assert rival("natural").config.training.select == "natural"
    assert [rival(m).config.training.awp for m in ("pgd-at", "pgd-at+awp")] == [0, 0.005]
    assert rival("gacd").config.linear_select == "natural"
    assert rival("crd+kd").config.crd.negatives == 1024
    moved = cell("table4", source="gacd")
    assert moved.config.linear_select == "natural"
    assert moved.config.data.classes == ["automobile", "cat", "dog", "horse", "truck"]
    source = moved.parents["student"].config
    assert source.data.classes == ["airplane", "bird", "deer", "frog", "ship"]
    assert cell("figure5").config.images == 7


def test_a_cell_starts_from_the_files_of_its_parents() -> None:
    tuned = only(parsed("run", "--scale", "small"), "rivals", method="gacd+aft").cell
    here = c.Fabric(threads=3)

    def resolved(cell: Cell) -> c.Finetune | c.Distill:
        found = cell.resolved(Path("out"), {name: Path(name) for name in cell.parents}, here)
        assert isinstance(found, c.Finetune | c.Distill)
        assert (found.out, found.fabric) == (Path("out"), here)
        return found

    config = resolved(tuned)
    assert config.checkpoint == Path("student/gacd/model.safetensors")
    assert config.source == Path("source/pgd-at/model.safetensors")
    config = resolved(tuned.parents["student"])
    assert config.teacher.checkpoint == Path("teacher/pgd-at/model.safetensors")
    assert config.bank == Path("teacher")  # one bank for all of its students


def test_an_analysis_and_a_transfer_are_of_what_the_study_says() -> None:
    cfg = parsed("run", "--scale", "small", "--threat.eps", "4/255")
    here = c.Fabric()
    analysis = only(cfg, "figure5").cell
    assert isinstance(analysis.config, c.Analyze)
    assert (analysis.config.threat, analysis.config.data) == (cfg.threat, cfg.data)
    config = analysis.resolved(Path("out"), {name: Path(name) for name in analysis.parents}, here)
    assert config.teacher == Path("teacher/pgd-at/model.safetensors")
    rows = {m: m for m in ("natural", "pgd-at", "ard", "gacd")} | {"gacd+aft": "finetuned"}
    assert config.students == [f"{m}={m}/{row}/model.safetensors" for m, row in rows.items()]

    moved = only(cfg, "table4", source="gacd").cell
    assert moved.config.evaluation.attacks == ["natural", "pgd7", "autoattack"]  # as Table 4 has it
    config = moved.resolved(Path("out"), {"student": Path("student")}, here)
    assert config.checkpoint == Path("student/gacd/model.safetensors")
