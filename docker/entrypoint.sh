#!/usr/bin/env bash
# What the images start:
#
#   docker run IMAGE prepare --output data/shakespeare          a command of peer-dist
#   docker run -e RANKS_PER_NODE=8 IMAGE train --config ...     the same under torchrun, 8 ranks in this container
#   docker run IMAGE tensorboard --logdir runs                  any other program
#
# RANKS_PER_NODE ("gpu": one per GPU) starts the commands that run on ranks, train, evaluate, generate and doctor, by
# torchrun; without it (under srun or mpirun, say) a container is one rank. Over several containers, and for restarts:
# NNODES, RDZV_ENDPOINT=HOST:PORT (HOST is one of them), RDZV_ID and MAX_RESTARTS, as of launch/torchrun.sh, which the
# images have as peer-dist-torchrun.
set -euo pipefail

[ $# -gt 0 ] || set -- --help
if [[ $1 != -* ]] && command -v -- "$1" >/dev/null; then
    exec "$@"
fi
case $1 in
    train | evaluate | generate | doctor)
        if [ -n "${RANKS_PER_NODE:-}" ]; then
            PYTHON=python3 exec peer-dist-torchrun "$@"
        fi
        ;;
esac
exec peer-dist "$@"
