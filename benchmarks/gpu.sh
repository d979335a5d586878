#!/usr/bin/env bash
# What needs a GPU, the most valuable first. Every part goes on where it stopped and is skipped once
# done, so call it again until it ends with 0. It ends with 75 when time was up and there is more to
# do, and with 1 when some part failed; the parts after it have been run all the same, and it is not
# tried again unless its part is named.
#
#   DATA=~/cifar10-jpeg RESULTS=runs/gpu benchmarks/gpu.sh [PART...]
#
#   tests       those that need CUDA
#   rehearsal   the speedrun, an epoch a stage
#   speedrun    teacher and GACD student against the clock, then AutoAttack on 1,000 images
#   throughput  training (compiled and eager), objective, transport
#   others      the speedrun's teacher and other methods, at about the same FLOPs, attacked alike
#   table1, ablation, table3   the paper's cells at full scale, one seed: hours
#   autoattack  the speedrun's student under AutoAttack on every test image
#   scaling     what a step costs as things grow
#
# DATA holds CIFAR-10 as class folders (train/CLASS/*, test/CLASS/*). LIMIT is the time of one call in
# seconds (570); PYTHON names the interpreter; PEER is a checkout of AdversariallyRobustDistillation,
# CRD one of RepDistiller.
set -euo pipefail
for name in DATA RESULTS PEER CRD; do
  [[ -z ${!name:-} ]] || printf -v "$name" %s "$(realpath -m -- "${!name}")"
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${RESULTS:-runs/gpu}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${LIMIT:-570}))
failed=0
named=$#
if ((named == 0)); then
  set -- tests rehearsal speedrun throughput others table1 ablation table3 autoattack scaling
fi
for part in "$@"; do
  case $part in
    tests | throughput | scaling) ;;
    rehearsal | speedrun | others | autoattack | table1 | ablation | table3)
      : "${DATA:?say where CIFAR-10 lies, as class folders: DATA=...}"
      ;;
    *)
      echo "gpu.sh: no part '$part'; see the head of this file" >&2
      exit 2
      ;;
  esac
done
export PYTHONPATH=src:benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
trap 'exit 130' INT # what was interrupted has not failed
mkdir -p "$out/done"

# Within the time that is left. An interrupt lets a run write its checkpoint; a step that has none
# (a benchmark) begins anew in the next call.
timed() {
  local left=$((deadline - SECONDS)) code=0
  if ((left < 60)); then exit 75; fi
  timeout --foreground --signal=INT --kill-after=25 "$((left - 30))" "$@" || code=$?
  # 137 earlier: killed by somebody else, for want of memory perhaps.
  if ((code == 124 || (code == 137 && SECONDS >= deadline - 30))); then exit 75; fi
  return "$code"
}
gacd() { timed "$python" -m gacd.cli "$@"; }
on_cifar() {
  gacd "$@" --data.name folder --data.root "$DATA" --data.title "CIFAR-10 (JPEG)"
}

# once NAME COMMAND...: unless it was done before, or failed and is not asked for by name. One that
# fails does not hold up the others.
once() {
  local name=$1
  shift
  if [[ -e $out/done/$name ]]; then return; fi
  if [[ -e $out/done/$name.failed ]] && ((named == 0)); then
    failed=1
    return
  fi
  echo "== $name"
  if "$@"; then
    touch "$out/done/$name"
    rm -f "$out/done/$name.failed"
  else
    touch "$out/done/$name.failed"
    echo "gpu.sh: $name failed" >&2
    failed=1
  fi
}

# A benchmark's record appears whole or not at all.
record() {
  local name=$1
  shift
  timed "$python" "benchmarks/$1.py" "${@:2}" --out "$out/$name.part.json" &&
    mv "$out/$name.part.json" "$out/$name.json"
}

objective() {
  timed "$python" benchmarks/objective.py --device cuda --json ${CRD:+--peer "$CRD"} \
    >"$out/objective.part.txt" &&
    mv "$out/objective.part.txt" "$out/objective.txt" && cat "$out/objective.txt"
}

# Without CIFAR-100, whose files are others.
study() {
  on_cifar study run "$1" --scale full --seeds 0 --second_data null --out "$out/study"
}

tests() {
  "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
  # Warnings are no errors here: torch gives one of its own about the mode that these tests use.
  once tests timed "$python" -m pytest -q -W default -p no:cacheprovider \
    tests/training/test_waiting.py tests/test_on_a_gpu.py -k on_a_gpu
}

rehearsal() {
  # The same networks, batch and precision: what it compiles, the speedrun finds in the cache.
  once rehearsal on_cifar speedrun --out "$out/rehearsal" --teacher.training.epochs 1 \
    --distillation.epochs 1 --finetune.epochs 1 --evaluation.attacks '[natural, pgd20]'
}

throughput() {
  once training-compiled record training-compiled training --batch 256 --compile
  once training record training training --batch 256 ${PEER:+--peer "$PEER"}
  once objective objective
  once transport record transport transport --device cuda
}

# The clock: from the first command to the finished student, all calls and breaks included.
clocked() {
  [[ -e $out/speedrun.started ]] || date +%s >"$out/speedrun.started"
  on_cifar speedrun --out "$out/speedrun" --evaluation.autoattack_limit 1000 || return
  local ended
  ended=$(stat -c %Y "$out/speedrun/gacd+aft/model.safetensors")
  echo "$((ended - $(<"$out/speedrun.started"))) seconds to the student" | tee "$out/speedrun.clock"
}
speedrun() { once speedrun clocked; }

others() {
  once others on_cifar speedrun --out "$out/speedrun" --evaluation.autoattack_limit 1000 \
    --methods gacd+aft pgd-at ard rslad
}

autoattack() {
  once autoattack on_cifar evaluate --checkpoint "$out/speedrun/gacd+aft/model.safetensors" \
    --attacks natural pgd20 autoattack --evaluation.batch_size 1000 --out "$out/autoattack"
}

scaling() {
  once scaling timed "$python" benchmarks/scaling.py --out "$out/scaling"
}

for part in "$@"; do
  case $part in
    table1 | ablation | table3) once "$part" study "$part" ;;
    *) "$part" ;;
  esac
done
exit "$failed"
