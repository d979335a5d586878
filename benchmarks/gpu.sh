#!/usr/bin/env bash
# What needs a GPU, the most valuable first. Every part goes on where it stopped and is skipped once
# done, so call it again until it ends with 0; 75 means that time was up and there is more to do.
#
#   DATA=~/cifar10 OUT=runs/gpu benchmarks/gpu.sh [PART...]
#
#   correct     the tests that matter on CUDA, and the quickstart there
#   throughput  objective, transport, training (eager and compiled), scaling
#   speedrun    teacher and GACD student against the clock, then AutoAttack
#   table3, table1, ablation   the paper's cells at full scale, one seed
#
# DATA holds CIFAR-10 as class folders (train/CLASS/*, test/CLASS/*). LIMIT is the time of one call in
# seconds (570); PYTHON names the interpreter; PEER is a checkout of AdversariallyRobustDistillation.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-570}))
export PYTHONPATH=src:benchmarks PYTHONUNBUFFERED=1
mkdir -p "$out/done"

# Within the time that is left. An interrupt lets a run write its checkpoint; a step that has none
# (a benchmark) begins anew in the next call.
timed() {
  local left=$((deadline - SECONDS)) code=0
  if ((left < 20)); then exit 75; fi
  timeout --foreground --signal=INT --kill-after=60 "$((left - 15))" "$@" || code=$?
  if ((code == 124 || code == 137)); then exit 75; fi
  return "$code"
}
gacd() { timed "$python" -m gacd.cli "$@"; }
on_cifar() {
  gacd "$@" --data.name folder --data.root "${DATA:?say where CIFAR-10 lies: DATA=...}" \
    --data.title "CIFAR-10 (JPEG)"
}

# once NAME COMMAND...: unless it was done before.
once() {
  local name=$1
  shift
  if [[ -e $out/done/$name ]]; then return; fi
  echo "== $name"
  "$@"
  touch "$out/done/$name"
}

# A benchmark's record appears whole or not at all.
record() {
  local name=$1
  shift
  timed "$python" "benchmarks/$1.py" "${@:2}" --out "$out/$name.part.json"
  mv "$out/$name.part.json" "$out/$name.json"
}

objective() {
  timed "$python" benchmarks/objective.py --json >"$out/objective.txt"
  tail -n 1 "$out/objective.txt" >"$out/objective.json"
}

scaling() {
  timed "$python" benchmarks/scaling.py --out "$out/scaling"
}

study() { on_cifar study run "$1" --scale full --seeds 0 --out "$out/study"; }

correct() {
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
  once tests timed "$python" -m pytest -q -p no:cacheprovider tests/losses tests/attacks \
    tests/models/test_frozen.py tests/test_anchors.py
  once tests-on-cuda timed "$python" -m pytest -q -p no:cacheprovider tests/training -k on_a_gpu
  once quickstart gacd quickstart --out "$out/quickstart" --fabric.accelerator gpu \
    --fabric.threads null
}

throughput() {
  once training record training training ${PEER:+--peer "$PEER"}
  once training-compiled record training-compiled training --compile
  once objective objective
  once transport record transport transport
  once scaling scaling
}

speedrun() { once speedrun on_cifar speedrun --out "$out/speedrun"; }

if (($# == 0)); then set -- correct throughput speedrun table3 table1 ablation; fi
for part in "$@"; do
  case $part in
    correct | throughput | speedrun) "$part" ;;
    table3 | table1 | ablation) study "$part" ;;
    *)
      echo "gpu.sh: no part '$part'; see the head of this file" >&2
      exit 2
      ;;
  esac
done
