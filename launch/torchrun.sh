#!/usr/bin/env bash
# ImageNet on one machine, all its GPUs. Needs HF_TOKEN in the environment (or `hf auth login`). Start it with
#
#     uv run bash launch/torchrun.sh
#
# After a kill the same line goes on from the newest snapshot in RUN_DIR. By hand:
#
#     uv run torchrun --standalone --nproc_per_node gpu main.py --resume_from runs/imagenet1k
#
# RUN_DIR, CACHE_DIR (room for 150 GB) and GPUS (how many, if not all) may be set; flags given are passed to main.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# When a rank dies, torchrun ends the others and starts all of them again, three times at most, and --resume_from auto
# lets them go on. torchrun does not look at their exit status, so bad arguments or missing data are tried four times
# too; its own is 1 whatever theirs was. Ctrl-C and SIGTERM it passes on, and starts nothing again.
# Without TORCH_ELASTIC_SHUTDOWN_TIMEOUT it kills ranks that still write a snapshot 30 seconds later.
# The number of ranks may change from one start to the next, as long as it divides --streams: 1, 2, 4, 8 or 16.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
exec torchrun --standalone --nproc_per_node "${GPUS:-gpu}" --max_restarts 3 \
    main.py --dataset imagenet1k --scheduler onecycle --amp --batch_size 1024 --streams 16 --snapshot_steps 500 \
    --cache_dir "${CACHE_DIR:-data/cache}" --run_dir "${RUN_DIR:-runs/imagenet1k}" --resume_from auto "$@"
