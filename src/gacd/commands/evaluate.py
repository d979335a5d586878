"""`gacd evaluate` and `gacd report`: a finished network attacked, a finished run drawn."""

from gacd import build
from gacd import config as c
from gacd.commands.rows import Row, Spent, row_order
from gacd.commands.run import Run
from gacd.models.checkpoints import method_of
from gacd.report.run import write_run_report


def evaluate(cfg: c.Evaluate) -> None:
    """Attack a saved network."""
    run = Run(cfg)
    model, name = run.load(cfg.checkpoint, build.Given(cfg.model, cfg.mean, cfg.std))
    assert cfg.checkpoint is not None
    if cfg.source is not None:
        given = build.Given(cfg.source_model, cfg.source_mean, cfg.source_std)
        run.keep_source(cfg.source, given)
    method, spent = method_of(cfg.checkpoint), Spent.read(cfg.checkpoint)
    run.keep(cfg.out / "model", model, name, method, spent)
    run.measure(Row("model", name, method, spent=spent))
    run.finish(f"{method} ({name}) on {run.test.name}")


def report(cfg: c.Report) -> None:
    """Draw the report of a run folder anew from its records."""
    write_run_report(cfg.out, order=row_order(cfg.out))
    print(f"report: {cfg.out / 'report.html'}")
