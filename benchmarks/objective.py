"""Time and memory of the objective, forward and backward, beside CRD's way, in one run.

    python benchmarks/objective.py [--peer DIR] [--json] [--threads N] [--batches 64 256]

M = 50,000 anchors, k = 16,384, d = 128, D_t = D_s = 512. Rows:

    exact          all anchors, both projections live, Z each image's own (the default)
    exact_fixed_z  the same with one constant Z (first-batch, running)
    exact_frozen   all anchors, projected once beforehand
    sampled        k anchors drawn, gathered and projected
    gather         CRD's way in plain tensors: k negatives of each image's own, gathered
    peer           CRD's own criterion, from a checkout of RepDistiller; its indices come ready
    products       the matrix products of `exact` alone (on slow bf16, its widening, too)

Contestants take turns within each repeat and the median is reported, so that whatever else the
machine does falls on all alike; with `--threads 1` it is processor time, to which other work adds
little, otherwise time on the wall, for which the machine should be idle. Memory is the process's
(or the device's) peak above its level before the step.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gacd.evaluation.record import environment
from gacd.losses.contrastive import gacd_loss, project_anchors
from gacd.losses.fused import product_dtype

M, K, E, D, CLASSES, T = 50_000, 16_384, 128, 512, 10, 0.1
Step = Callable[[], None]


def steps(batch: int, device: torch.device, peer: Path | None) -> dict[str, Step]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    bank_MD = normal(M, D).relu().bfloat16()
    labels_M = torch.randint(CLASSES, (M,), generator=generator, device=device)
    weights_M = torch.rand(M, generator=generator, device=device)
    index_B = torch.randperm(M, generator=generator, device=device)[:batch]
    features_BD = normal(batch, D).relu().requires_grad_()
    student, teacher = nn.Linear(D, E).to(device), nn.Linear(D, E).to(device)
    frozen_ME = project_anchors(bank_MD, teacher.weight, teacher.bias)
    candidates_BJ = torch.randint(M, (batch, K + 1), generator=generator, device=device)
    fixed_z = torch.tensor(torch.tensor(M * 1.5).log().item(), device=device)

    def embed(head: nn.Linear, features: Tensor) -> Tensor:
        return F.normalize(head(features), dim=1)

    def ours(
        rows: Tensor | None = None, *, frozen: bool = False, log_z: Tensor | None = None
    ) -> None:
        anchors = frozen_ME if frozen else bank_MD
        labels, weights = labels_M, weights_M
        if rows is not None:
            anchors, labels, weights = anchors.index_select(0, rows), labels[rows], weights[rows]
        positive_BE = frozen_ME[index_B] if frozen else embed(teacher, bank_MD[index_B].float())
        loss_B = gacd_loss(
            embed(student, features_BD),
            positive_BE,
            anchors,
            labels_B=labels_M[index_B],
            anchor_labels_M=labels,
            weights_B=weights_M[index_B],
            anchor_weights_M=weights,
            index_B=index_B,
            anchor_index_M=rows,
            projection_weight_ED=None if frozen else teacher.weight,
            projection_bias_E=None if frozen else teacher.bias,
            temperature=T,
            negatives=K,
            dataset_size=M,
            log_z=log_z,
        )
        loss_B.mean().backward()

    def sampled() -> None:
        ours(torch.randint(M, (K,), generator=generator, device=device))

    memory_ME = frozen_ME.float()

    def gather() -> None:
        rows_BJE = memory_ME[candidates_BJ]
        scores_BJ = torch.bmm(rows_BJE, embed(student, features_BD)[:, :, None])[:, :, 0] / T
        logits_BJ = scores_BJ - fixed_z - torch.tensor(K / M).log()
        loss_B = F.softplus(-logits_BJ[:, 0]) + F.softplus(logits_BJ[:, 1:]).sum(1)
        loss_B.mean().backward()

    dtype = product_dtype(bank_MD)
    s_BE, slope_MB = normal(batch, E).to(dtype), normal(8192, batch).to(dtype)
    weight_ED, z_ME = teacher.weight.detach().to(dtype), frozen_ME.to(dtype)

    def products() -> None:
        for rows_cD, z_cE in zip(bank_MD.split(8192), z_ME.split(8192), strict=True):
            slope_cB = slope_MB[: len(rows_cD)]
            rows_cD = rows_cD.to(dtype)
            rows_cD @ weight_ED.T
            z_cE @ s_BE.T
            slope_cB.T @ z_cE
            (slope_cB @ s_BE).T @ rows_cD

    contestants: dict[str, Step] = {
        "exact": ours,
        "exact_fixed_z": lambda: ours(log_z=fixed_z),
        "exact_frozen": lambda: ours(frozen=True),
        "sampled": sampled,
        "gather": gather,
        "products": products,
    }
    if peer is not None:
        contestants["peer"] = _peer_step(peer, features_BD, bank_MD, index_B, candidates_BJ)
    return contestants


def _peer_step(
    peer: Path, features_BD: Tensor, bank_MD: Tensor, index_B: Tensor, candidates_BJ: Tensor
) -> Step:
    if str(peer) not in sys.path:
        sys.path.insert(0, str(peer))
    device = features_BD.device
    if device.type == "cpu":  # its constructor asks for a GPU, its arithmetic does not
        importlib.import_module("crd.memory").AliasMethod.cuda = lambda self: None
    options = SimpleNamespace(s_dim=D, t_dim=D, feat_dim=E, nce_k=K, nce_t=T, nce_m=0.5, n_data=M)
    criterion = importlib.import_module("crd.criterion").CRDLoss(options).to(device)
    teacher_BD = bank_MD[index_B].float()

    def step() -> None:
        criterion(features_BD, teacher_BD, index_B, candidates_BJ).sum().backward()

    return step


def measure(contestants: dict[str, Step], device: torch.device, repeats: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    for step in contestants.values():
        step()  # warm up, and set the peer's constants
    peaks = {name: peak_bytes(step, device) for name, step in contestants.items()}
    for _ in range(repeats):
        for name, step in contestants.items():
            start = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    rows: dict[str, Any] = {
        name: {
            "ms": round(1e3 * statistics.median(times), 3),
            "ms_min": round(1e3 * min(times), 3),
            "peak_bytes": peaks[name],
        }
        for name, times in seconds.items()
    }
    if device.type == "cuda":
        for name, step in contestants.items():
            rows[name]["device_ms"] = round(statistics.median(queued(step) for _ in range(15)), 3)
    return rows


def queued(step: Step) -> float:
    """Milliseconds on the device, which sleeps until the whole step has been launched."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(50_000_000)  # cycles: some 25 ms  # type: ignore[no-untyped-call]
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def peak_bytes(step: Step, device: torch.device) -> int | None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def table(results: dict[str, Any]) -> str:
    names = "ms (median) | ms (least) | times faster than peer | extra MB | device ms"
    lines = [f"| device | B | | {names} |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for device, batches in results.items():
        for batch, rows in batches.items():
            peer = rows.get("peer", {}).get("ms")
            for name, row in rows.items():
                faster = f"{peer / row['ms']:.1f}" if peer else ""
                peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
                lines.append(
                    f"| {device} | {batch[1:]} | {name} | {row['ms']:.1f} | {row['ms_min']:.1f} "
                    f"| {faster} | {peak} | {row.get('device_ms', '')} |"
                )
    return "\n".join(lines)


def devices(asked: str | None) -> list[torch.device]:
    """The device asked for, or all that there are."""
    there = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in ([asked] if asked else there)]


def machine() -> dict[str, Any]:
    """What the figures depend on; `load` above the number of cores means others were running."""
    load = round(os.getloadavg()[0], 1) if sys.platform != "win32" else None
    return {**environment(), "load": load}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer", type=Path, help="a checkout of RepDistiller")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: all there are")
    parser.add_argument("--repeats", type=int, default=9, help="on a GPU 20 times as many")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--threads", type=int, help="of the CPU; all cores if not given")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {}
    for device in devices(arguments.device):
        repeats = arguments.repeats * (20 if device.type == "cuda" else 1)  # clocks rise slowly
        results[device.type] = {
            f"B{batch}": measure(steps(batch, device, arguments.peer), device, repeats)
            for batch in arguments.batches
        }
    print(table(results))
    if arguments.json:
        print(json.dumps(results | {"machine": machine()}))


if __name__ == "__main__":
    main()
