#!/usr/bin/env bash
# ImageNet on several machines, all their GPUs, without a scheduler. Needs HF_TOKEN in the environment (or
# `hf auth login`) of each machine. Start it with the same line on every one of them, HEAD being one of them:
#
#     NODES=2 HEAD=node1 PORT=29500 uv run bash launch/torchrun_nodes.sh
#
# After a kill the same lines go on from the newest snapshot in RUN_DIR. By hand, on every machine:
#
#     uv run torchrun --nnodes 2 --nproc_per_node gpu --rdzv_backend c10d --rdzv_endpoint node1:29500 \
#         --rdzv_id imagenet1k main.py --resume_from runs/imagenet1k
#
# RUN_DIR must be on a filesystem that all machines share: the first rank writes it, and every rank looks there for
# the snapshot to go on from. CACHE_DIR (room for 150 GB) may be on it too; on a disk of its own, a machine streams for
# itself what it has not read in an earlier epoch. GPUS (how many, if not all) may be set; flags given are passed to
# main.py.
set -euo pipefail
: "${NODES:?set NODES to the number of machines, the same on each}"
: "${HEAD:?set HEAD to the name or address of one of the machines, the same on each}"
: "${PORT:?set PORT to a free TCP port of HEAD, the same on each}"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# When a rank dies, every torchrun ends its ranks, waits until all machines are back and starts them again, three times
# at most; --resume_from auto lets them go on. So when one machine was lost, giving its line again within ten minutes
# (torchrun's join timeout) is enough; when HEAD was lost, where they meet, give all lines again.
# --streams 16 because the ranks must divide it: two machines with eight GPUs have 16.
# Without TORCH_DISABLE_SHARE_RDZV_TCP_STORE the ranks may meet addresses from before the restart (pytorch issue 135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
exec torchrun --nnodes "$NODES" --nproc_per_node "${GPUS:-gpu}" --max_restarts 3 \
    --rdzv_backend c10d --rdzv_endpoint "$HEAD:$PORT" --rdzv_id imagenet1k \
    main.py --dataset imagenet1k --scheduler onecycle --amp --batch_size 1024 --streams 16 --snapshot_steps 500 \
    --cache_dir "${CACHE_DIR:-data/cache}" --run_dir "${RUN_DIR:-runs/imagenet1k}" --resume_from auto "$@"
