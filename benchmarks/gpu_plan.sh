#!/bin/bash
# What is to be measured on a GPU, in the order of its worth, each part with a time of its own: about 9 minutes in all.
#
#     OUT=figures bash benchmarks/gpu_plan.sh
#
# Lines go to files in $OUT as they come, so that a plan that is cut off has told what it found. PYTHON is the interpreter.

set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-figures}" NO_ALBUMENTATIONS_UPDATE=1
mkdir -p "$OUT"
python="${PYTHON:-python}"

part() { # seconds, name, command
    local seconds=$1 name=$2 begun=$SECONDS
    shift 2
    timeout "$seconds" "$@" > "$OUT/$name.txt" 2>&1
    echo "$name: status $?, $((SECONDS - begun)) s" | tee -a "$OUT/plan.txt"
}

nvidia-smi > "$OUT/card.txt" 2>&1
part 90 tests "$python" -m pytest -q -p no:cacheprovider -n 0 tests/test_gpu.py
part 405 sweep "$python" benchmarks/gpu_sweep.py --budget 390
part 60 augment "$python" benchmarks/augment.py
