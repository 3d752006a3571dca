#!/usr/bin/env bash
# Runs a command of peer-dist under torchrun: one process per GPU of this node, or RANKS_PER_NODE of them.
#
#   launch/torchrun.sh train --config configs/quickstart.yaml [section.key=value ...]
#
# Several nodes: the same command on each, with
#   NNODES (1)              how many there are, or how few and how many may be: 1:2 goes on when nodes leave or come
#   RDZV_ENDPOINT           host:port of any one of them, where they all meet; its host must resolve on every node
#   RDZV_ID (peer_dist)     tells runs apart that meet at one endpoint
# Elastic:
#   MAX_RESTARTS (0)        how often to start all ranks again, from the newest checkpoint, after one has failed
# Others:
#   RANKS_PER_NODE          (a rank per GPU, 2 without GPUs)
#   PYTHON (python)         of an environment that has peer_dist
set -euo pipefail
PYTHON="${PYTHON:-python}"
NNODES="${NNODES:-1}"
ranks="${RANKS_PER_NODE:-$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 2)')}"

if [ "$NNODES" = 1 ]; then
    RDZV_ENDPOINT="${RDZV_ENDPOINT:-localhost:0}" # a free port
elif [ -z "${RDZV_ENDPOINT:-}" ]; then
    echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=host:port, the same on every node" >&2
    exit 2
else
    echo "waiting for $NNODES nodes at $RDZV_ENDPOINT" >&2 # torchrun says nothing until all have come
fi
# Ranks that start again must not meet in the store of those before them: stale addresses are in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun would say so at length; the ranks share the cores

exec "$PYTHON" -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$ranks" \
    --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-peer_dist}" \
    --max-restarts "${MAX_RESTARTS:-0}" -m peer_dist "$@"
