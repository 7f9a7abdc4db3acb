#!/bin/bash
# What is to be measured on a GPU, each part with a time of its own:
#
#     OUT=figures bash benchmarks/gpu_plan.sh tests sweep feed                        # about 9 minutes
#     OUT=figures bash benchmarks/gpu_plan.sh cifar cifar_compiled accuracy start alone augment   # about 7 minutes
#
# Lines go to $OUT/plan.txt as they come, so that a plan that is cut off has told what it found. PYTHON is the interpreter,
# FASHION the folder of Fashion-MNIST's four files.

set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-figures}" NO_ALBUMENTATIONS_UPDATE=1 PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}"
mkdir -p "$OUT"
python="${PYTHON:-python}"
runs="$(mktemp -d)"

part() { # seconds, name, command
    local seconds=$1 name=$2 begun=$SECONDS
    shift 2
    echo "== $name: $*" >> "$OUT/plan.txt"
    timeout "$seconds" "$@" >> "$OUT/plan.txt" 2>&1
    echo "== $name: status $?, $((SECONDS - begun)) s" | tee -a "$OUT/plan.txt"
}

tests() { # beside them the sweep's first variants are compiled, for the cache
    for variant in "compiled, bf16" "timm: compiled, bf16" "compiled, bf16, 160 pixels"; do
        OUT="$(mktemp -d)" timeout 110 "$python" benchmarks/gpu_sweep.py --budget 105 --steps 1 --rounds 1 \
            --only "$variant" >> "$OUT/compiled_beside.txt" 2>&1 &
    done
    part 120 tests "$python" -m pytest -q -p no:cacheprovider -n 0 --tb=short tests/test_gpu.py
    wait
}

sweep() {
    part 235 sweep "$python" benchmarks/gpu_sweep.py --budget 230 --profile "eager, bf16" "compiled, bf16"
}

feed() {
    part 190 feed "$python" benchmarks/train.py --compile --images 9216 --rounds 3 --workers 16 4 \
        --sources "local files" "a cache of JPEGs" "a cache of planes"
}

cifar() {
    part 45 cifar "$python" benchmarks/train.py --cifar --rounds 3
}

cifar_compiled() {
    part 60 cifar-compiled "$python" benchmarks/train.py --cifar --rounds 3 --compile
}

accuracy() {
    part 100 accuracy "$python" main.py --dataset fashion_mnist --data_dir "${FASHION:-/usr/share/fashion-mnist}" \
        --model resnet18 --epochs 16 --batch_size 512 --lr 0.1 --scheduler onecycle --weight_decay 5e-4 \
        --random_erasing 0.5 --amp --run_dir "$runs/accuracy"
}

start() { # the second time from Inductor's cache
    for number in 1 2; do
        part 60 "start-$number" "$python" main.py --dataset imagenet1k --dummy_data --max_samples 1024 --epochs 1 \
            --batch_size 256 --amp --compile --run_dir "$runs/start-$number"
    done
}

alone() {
    part 60 alone "$python" benchmarks/train.py --alone --images 6144 --rounds 1 --workers 1 2 4 8 16
}

augment() {
    part 45 augment "$python" benchmarks/augment.py
}

(nvidia-smi; lscpu; free -g) > "$OUT/card.txt" 2>&1
for name in "$@"; do
    "$name"
done
