"""`gacd train` and `gacd finetune`: one network, without a teacher."""

from gacd import build
from gacd import config as c
from gacd.commands.identity import Goal
from gacd.commands.rows import Row, Spent
from gacd.commands.training import TrainingRun, refuse_teacher
from gacd.errors import UserError
from gacd.methods.registry import parse_method
from gacd.models.checkpoints import names_itself


def train(cfg: c.Train, *, goal: Goal = "report") -> None:
    """Train one network and evaluate it."""
    refuse_teacher(cfg.method, cfg.training)
    run = TrainingRun(cfg, goal)
    run.check_stage(cfg.training, "training", parse_method(cfg.method))
    model = build.model(cfg.model, run.splits.train, seed=cfg.seed)
    spent = run.train(cfg.method, cfg.method, model, cfg.model, cfg.training)
    run.measure(Row(cfg.method, cfg.model, cfg.method, spent=spent))
    run.finish(f"{cfg.method} on {run.test.name}")


def finetune(cfg: c.Finetune, *, goal: Goal = "report") -> None:
    """Fine-tune a saved network adversarially and evaluate it."""
    refuse_teacher(cfg.method, cfg.training)
    run = TrainingRun(cfg, goal)
    run.check_stage(cfg.training, "training", parse_method(cfg.method))
    model, name = run.load(cfg.checkpoint, build.Given(cfg.model, cfg.mean, cfg.std))
    assert cfg.checkpoint is not None
    run.note_seed(cfg.checkpoint)
    if cfg.source is not None:
        if not names_itself(cfg.source):
            raise UserError(f"{cfg.source}: the source must be a .safetensors of this package")
        run.keep_source(cfg.source, build.Given())
    method = "finetuned"
    before = Spent.read(cfg.checkpoint)
    label = f"{cfg.method} fine-tuned"
    spent = run.train(method, cfg.method, model, name, cfg.training, before=before, label=label)
    run.measure(Row(method, name, label, spent=spent))
    run.finish(f"{name}, fine-tuned on {run.test.name}")
