"""Run by `test_ranks.py` as a program: two processes that train and evaluate together by gloo.

Fabric starts the second process. What each rank found is written into the folder given.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import pyautoattack
import torch
from lightning_fabric import Fabric
from torch import nn
from torch.optim import SGD

HERE = Path(__file__).parent


def load(path: Path, name: str):
    """A test's conftest as a module of that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def deterministic(setattr=setattr) -> None:
    """Attacks start at the image, and BatchNorm stays as it is: nothing depends on the rank."""
    from gacd.attacks.threat import ThreatModel

    setattr(ThreatModel, "random_start", lambda self, x, generator: x)
    setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))


SINGLE = {"pad": 0, "flip": False, "batch_size": 16, "epochs": 2, "ema": 0.5}


def first_batch(stage, rank: int, world_size: int):
    from gacd.data.batches import iterate

    return next(
        iterate(
            stage.splits.train, 16 // world_size, shuffle=True, seed=4, epoch=0, drop_last=True,
            rank=rank, world_size=world_size,
        )
    )  # fmt: skip


def method_of(stage, name: str):
    if name == "gacd":
        stage.bank.features_MD = stage.bank.features_MD.float()  # no rounding of gradients
    method = stage.method(name)
    if name == "gacd":  # its own attack, transport, couples the images of a rank
        method.objective = "cosine"
    method.hold()  # ranks expect gradients of all that trains
    method.train()
    return method


def trained(stage, folder: Path, fabric: Fabric):
    from dataclasses import replace

    from gacd.training.loop import fit

    plan = replace(stage.plan, **SINGLE)
    return fit(fabric, stage.method("pgd-at"), stage.splits, plan, out=folder, name="stage")


ATTACKS = ("fgsm", "pgd3x2", "cw2", "transfer", "noise", "autoattack")


def evaluated(model, source, **more):
    from gacd.attacks.threat import ThreatModel
    from gacd.data.load import load_splits
    from gacd.evaluation.robust import evaluate

    test = load_splits("digits", test_limit=60, seed=0).test
    return evaluate(
        model, test, attacks=ATTACKS, threat=ThreatModel(eps=0.03), source=source, batch_size=8,
        autoattack_limit=30, show_progress=False, **more,
    )  # fmt: skip


def networks():
    from gacd.data.load import load_splits
    from gacd.linear import fit_head
    from gacd.models import create_model

    splits = load_splits("digits", train_limit=300, seed=0)
    found = []
    for seed in (0, 1):
        found.append(create_model("digits-cnn-4", num_classes=10, channels=1, seed=seed))
        fit_head(found[-1], splits, None)
    return found


def main(out: Path) -> None:
    from gacd.evaluation import robust
    from gacd.ranks import Ranks
    from gacd.storage import save_tensors
    from gacd.training import loop

    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    rank = fabric.global_rank
    said: dict[str, object] = {}

    # Evaluation, with the noise that attacks have.
    model, source = networks()
    original, calls = robust._Run.attack, []
    robust._Run.attack = lambda self, attack, *a: (
        calls.append(attack.name) or original(self, attack, *a)
    )
    pyautoattack.AutoAttack = load(HERE.parent / "evaluation" / "conftest.py", "e").QuickAutoAttack
    ranks = Ranks(rank, fabric.world_size, fabric.barrier)
    found = evaluated(model, source, cache=out / "cache", ranks=ranks)
    found.save(out / f"outcomes-{rank}.safetensors")
    said["attacked"] = {name: calls.count(name) for name in calls}

    # Each rank's BatchNorm has seen images of its own when the network is validated.
    stage = load(HERE / "conftest.py", "t").Stage()
    validate = loop.validate

    def noted(fabric, kept, *more, **settings):
        buffers = {k: v for k, v in kept.named_buffers() if v.is_floating_point()}
        save_tensors(out / f"buffers-{rank}.safetensors", buffers, {})
        return validate(fabric, kept, *more, **settings)

    loop.validate = noted
    trained(stage, out / "buffers", fabric)
    loop.validate = validate

    deterministic()
    for name in ("natural", "pgd-at", "ard", "gacd"):
        method = method_of(stage, name)
        parameters = [p for p in method.parameters() if p.requires_grad]
        module, _ = fabric.setup(method, SGD(parameters, 0.1))
        reduced: list[int] = []

        def hook(state, bucket, reduced=reduced):
            reduced.append(bucket.buffer().numel())
            tensor = bucket.buffer().div_(2)
            work = torch.distributed.all_reduce(tensor, async_op=True)
            return work.get_future().then(lambda done: done.value()[0])

        module._forward_module.register_comm_hook(None, hook)
        loss = module(first_batch(stage, rank, 2), torch.Generator().manual_seed(0))
        said[f"{name} reduced by the attack"] = sum(reduced)
        fabric.backward(loss.total)
        said[f"{name} reduced"] = sum(reduced)
        said[f"{name} parameters"] = sum(p.numel() for p in parameters)
        grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
        save_tensors(out / f"{name}-{rank}.safetensors", grads, {})

    trained(stage, out / "whole", fabric)

    # Ctrl-C reaches the first rank alone, in its second step.
    generator, steps = loop.keyed_generator, []

    def interrupted(device, *key):
        if len(key) == 5:
            steps.append(key[2:4])
            if rank == 0 and len(steps) == 2:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)  # as launchers do
        return generator(device, *key)

    loop.keyed_generator, loop._GUARD_EVERY = interrupted, 3
    try:
        trained(stage, out / "stopped", fabric)
    except KeyboardInterrupt:
        said["steps"] = steps
    (out / f"said-{rank}.json").write_text(json.dumps(said))
    fabric.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
