"""A million images that stay on disk: is memory flat, and does the loader keep up with a consumer?

    python benchmarks/streaming.py --folder DIR [--images 1000000] [--workers 1] [--seconds 60]

DIR gets shards of 10,000 JPEGs. All but the first are links to it: the
loader indexes and reads each as a file of its own, and the disk holds one. Measured are:

    memory    resident set (proportional, of this process and its workers) while images stream
    loader    images per second that the loader gives when nothing else is done
    consumer  images per second of PGD-10 adversarial training of wrn-10-2, on images in memory,
              and on streamed ones; their ratio says whether it waits
    bank      growth over draws of k = 16,384 rows of a mapped anchor bank of that many rows
"""

import argparse
import io
import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import forever  # type: ignore[import-not-found]  # beside this file
from PIL import Image

from gacd.anchors import AnchorBank, Fingerprint
from gacd.attacks.threat import ThreatModel
from gacd.data.load import load_splits
from gacd.evaluation.record import environment
from gacd.methods import TrainingAttack, create_method
from gacd.models import create_model
from gacd.randomness import keyed_generator
from gacd.shapes import Batch
from gacd.storage import write_json

SHARD = 10_000
CLASSES = 1000


def write_shards(folder: Path, images: int) -> float:
    """`images` samples in train/ and one shard in test/; returns the seconds it took."""
    start = time.perf_counter()
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(512):  # photographs are smooth: so is the noise
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=90)
        jpegs.append(buffer.getvalue())
    shard = folder / "shard.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as archive:
        for row in range(SHARD):
            for end, data in (("cls", str(row % CLASSES).encode()), ("jpg", jpegs[row % 512])):
                info = tarfile.TarInfo(f"{row:08}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    for part, count in (("test", SHARD), ("train", images)):
        (folder / part).mkdir(exist_ok=True)
        for old in (folder / part).glob("*.tar"):
            old.unlink()
        for number in range(count // SHARD):
            path = folder / part / f"{number:05}.tar"
            path.hardlink_to(shard)
    return time.perf_counter() - start


def resident() -> float:
    """MB of this process and its children; pages that several share count once."""
    total = 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in ("self", *children):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
    return total / 1024


class Consumer:
    """PGD-10 adversarial training in bf16."""

    def __init__(self) -> None:
        attack = TrainingAttack(threat=ThreatModel(eps=8 / 255), steps=10, step_size=2 / 255)
        student = create_model("wrn-10-2", num_classes=CLASSES, seed=0)
        self.method = create_method("pgd-at", student, attack).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.method.parameters(), 0.01)
        self.count = 0

    def __call__(self, batch: Batch) -> None:
        """One step."""
        self.count += 1
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.method(batch, keyed_generator("cpu", 1, self.count)).total
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def rates(
    sources: dict[str, Iterator[Batch]], consumer: Consumer, batch: int, seconds: float
) -> dict[str, float]:
    """Images per second of the consumer on every source, in turns of one batch."""
    spent = dict.fromkeys(sources, 0.0)
    for source in sources.values():
        consumer(next(source))
    turns, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds or turns < 4:
        turns += 1
        for name, source in sources.items():
            before = time.perf_counter()
            consumer(next(source))
            spent[name] += time.perf_counter() - before
    return {name: round(batch * turns / total, 1) for name, total in spent.items()}


def mapped_bank(folder: Path, rows: int, draws: int) -> dict[str, Any]:
    path = folder / f"anchors-{rows}.safetensors"
    if not path.is_file():
        AnchorBank(
            torch.zeros(rows, 512, dtype=torch.bfloat16),
            torch.arange(rows) % CLASSES,
            torch.ones(rows),
            Fingerprint("teacher", "data", "none"),
        ).save(path)
    bank = AnchorBank.load(path)
    before, start = anonymous(), time.perf_counter()
    for draw in range(draws):
        bank.rows(bank.draw(16_384, keyed_generator("cpu", draw)))
    seconds = (time.perf_counter() - start) / draws
    grown = anonymous() - before
    return {"MB on disk": round(path.stat().st_size / 2**20), "ms a draw": round(1e3 * seconds, 1),
            "MB grown": round(grown, 1)}  # fmt: skip


def anonymous() -> float:
    """MB that belong to this process alone: pages of a mapped file can be dropped at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60, help="of each measurement")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    written = write_shards(options.folder, options.images)
    start = time.perf_counter()
    train = load_splits(
        "webdataset", root=options.folder, stream=True, workers=options.workers,
        val_fraction=0.001, test_limit=2000, seed=0,
    ).train  # fmt: skip
    indexed = time.perf_counter() - start

    # The loader alone, and what is resident on the way.
    source, memory, seen = forever(train, options.batch), [], 0
    next(source)
    start = mark = time.perf_counter()
    while time.perf_counter() - start < options.seconds:
        next(source)
        seen += options.batch
        if time.perf_counter() - mark > options.seconds / 12:
            memory.append(round(resident(), 1))
            mark = time.perf_counter()
    loader = seen / (time.perf_counter() - start)
    source.close()

    held = train.subset(torch.arange(2048)).load()  # type: ignore[attr-defined]
    sources = {name: forever(data, options.batch) for name, data in
               (("in memory", held), ("streamed", train))}  # fmt: skip
    consumer = rates(sources, Consumer(), options.batch, options.seconds)
    record = {
        "streamed / in memory": round(consumer["streamed"] / consumer["in memory"], 3),
        "loader / consumer": round(loader / consumer["in memory"], 1),
        "consumer images/s": consumer,
        "loader images/s": round(loader, 1),
        "images": len(train),
        "images streamed": seen,
        "MB resident": memory,
        "MB resident, last / first": round(memory[-1] / memory[0], 3),
        "MB if decoded": round(len(train) * 3 * 32 * 32 / 2**20),
        "seconds to write": round(written, 1),
        "seconds to index": round(indexed, 1),
        "bank": mapped_bank(options.folder, options.images, 20),
        "workers": options.workers,
        "batch": options.batch,
        "environment": environment(),
        "load": round(os.getloadavg()[0], 1),
    }
    print(json.dumps(record, indent=1))
    if options.out:
        write_json(options.out, record)


if __name__ == "__main__":
    main()
