#!/usr/bin/env bash
# What the images start:
#
#   docker run IMAGE prepare --output data/shakespeare          a command of peer-dist
#   docker run -e NPROC=8 IMAGE train --config ...              the same under torchrun, with 8 ranks in this container
#   docker run IMAGE tensorboard --logdir runs                  any other program
#
# NPROC starts the commands that run on ranks (train, evaluate, generate, doctor) by torchrun; "gpu" is one per GPU.
# Over several containers: NNODES, and RENDEZVOUS=HOST:PORT, where HOST is one of them, the same in all; RUN_ID (peer)
# tells apart runs that meet at one place. Without NPROC (under srun or mpirun, say) a container is one rank.
set -euo pipefail

[ $# -gt 0 ] || set -- --help
if [[ $1 != -* ]] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
case $1 in
    train | evaluate | generate | doctor)
        if [ -n "${NPROC:-}" ]; then
            if [ "${NNODES:-1}" = 1 ]; then
                place=(--standalone)
            elif [ -n "${RENDEZVOUS:-}" ]; then
                place=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-peer}")
            else
                echo "error: NNODES=$NNODES needs RENDEZVOUS=HOST:PORT, where HOST is one of the containers" >&2
                exit 2
            fi
            export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # torchrun would say so at length; ranks share the cores
            exec python3 -m torch.distributed.run "${place[@]}" --nproc-per-node "$NPROC" -m peer_dist "$@"
        fi
        ;;
esac
exec peer-dist "$@"
