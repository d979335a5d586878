#!/usr/bin/env bash
# The next most valuable work for a GPU, in order; each part is resumable and skips itself when done.
#
#   DATA=~/cifar10 OUT=runs benchmarks/gpu.sh
#
# DATA holds CIFAR-10 as class folders (train/CLASS/*, test/CLASS/*). PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
data=${DATA:?say where CIFAR-10 lies as class folders: DATA=...}
out=${OUT:-runs}
export PYTHONPATH=src PYTHONUNBUFFERED=1
gacd() { "$python" -m gacd.cli "$@"; }

echo "== 1. correctness on CUDA: the objective, the attacks, one small run"
"$python" - <<'PY'
import torch

assert torch.cuda.is_available(), "no CUDA device"
print(torch.__version__, torch.cuda.get_device_name(0))
PY
"$python" -m pytest -q -p no:cacheprovider tests/losses tests/attacks tests/test_anchors.py 2>&1 | tail -n 5
gacd quickstart --out "$out/quickstart-cuda" --fabric.accelerator gpu --fabric.threads null

echo "== 2. throughput: the objective, the transport attack"
"$python" benchmarks/objective.py --json | tail -n 1 >"$out/objective-cuda.json"
"$python" benchmarks/transport.py | tee "$out/transport-cuda.txt"

echo "== 3. the paper's first column: teacher, then the methods of Table 1, one row at a time"
for method in gacd gacd+aft ard pgd-at kd natural; do
  gacd distill --config cifar10-full --out "$out/cifar10-full" --methods "$method" \
    --data.name folder --data.root "$data" --data.title "CIFAR-10 (JPEG)"
done
