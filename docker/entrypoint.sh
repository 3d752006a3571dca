#!/usr/bin/env bash
# What the images start:
#
#   docker run IMAGE prepare --output data/shakespeare          a command of peer-dist
#   docker run -e RANKS_PER_NODE=8 IMAGE train --config ...     the same under torchrun, 8 ranks in this container
#   docker run IMAGE tensorboard --logdir runs                  any other program
#
# RANKS_PER_NODE ("gpu": one per GPU) starts the commands that run on ranks, train, evaluate, generate and doctor, by
# torchrun; without it (under srun or mpirun, say) a container is one rank. Over several containers, and for restarts:
# NNODES, RDZV_ENDPOINT=HOST:PORT (HOST is one of them), RDZV_ID and MAX_RESTARTS, as of launch/torchrun.sh.
set -euo pipefail

[ $# -gt 0 ] || set -- --help
if [[ $1 != -* ]] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
case $1 in
    train | evaluate | generate | doctor)
        if [ -n "${RANKS_PER_NODE:-}" ]; then
            if [ "${NNODES:-1}" = 1 ]; then
                RDZV_ENDPOINT="${RDZV_ENDPOINT:-localhost:0}" # a free port
            elif [ -z "${RDZV_ENDPOINT:-}" ]; then
                echo "error: NNODES=$NNODES needs RDZV_ENDPOINT=HOST:PORT, where HOST is one of the containers" >&2
                exit 2
            fi
            # Ranks that start again must not meet in the store of those before them: stale addresses are in it.
            export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # torchrun would say so at length; the ranks share the cores
            exec python3 -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "$RANKS_PER_NODE" \
                --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-peer_dist}" \
                --max-restarts "${MAX_RESTARTS:-0}" -m peer_dist "$@"
        fi
        ;;
esac
exec peer-dist "$@"
