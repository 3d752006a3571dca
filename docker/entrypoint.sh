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

# NVIDIA's images start everything through a script of theirs, which looks after CUDA on older drivers; what it has to
# say goes to stderr, so that the output is the program's alone.
start() {
    local nvidia=/opt/nvidia/nvidia_entrypoint.sh
    [ -x "$nvidia" ] || exec "$@"
    exec 3>&1 "$nvidia" bash -c 'exec "$@" >&3 3>&-' bash "$@" >&2
}

[ $# -gt 0 ] || set -- --help
if [[ $1 != -* ]] && command -v -- "$1" >/dev/null; then
    start "$@"
fi
case $1 in
    train | evaluate | generate | doctor)
        if [ -n "${RANKS_PER_NODE:-}" ]; then
            export PYTHON=python3
            start peer-dist-torchrun "$@"
        fi
        ;;
esac
start peer-dist "$@"
