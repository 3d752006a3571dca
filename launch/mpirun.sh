#!/usr/bin/env bash
# Runs a command of peer-dist under the mpirun of Open MPI or of MPICH: RANKS processes, which meet through MPI and
# work over nccl or gloo.
#
#   RANKS=4 launch/mpirun.sh train --config configs/quickstart.yaml [section.key=value ...]
#
# RANKS (2)           processes in all; start one per GPU
# HOSTS               node1:2,node2:2: the nodes and how many processes each takes; otherwise mpirun's own choice,
#                     which under a batch system is the nodes of the job
# MPIRUN (mpirun)     which one; it must be of the MPI that mpi4py loads in PYTHON (MPI4PY_LIBMPI names another)
# MPIRUN_ARGUMENTS    more of them, for one: --mca oob_tcp_if_include eth0
# PYTHON (python)     of an environment that has peer_dist[train,mpi], or mpi4py and another MPI
#
# Exported variables of NCCL, gloo, torch, CUDA, Triton and OpenMP reach the ranks on all nodes.
set -euo pipefail
MPIRUN="${MPIRUN:-mpirun}"
command -v "$MPIRUN" >/dev/null || {
    echo "error: there is no $MPIRUN; install an MPI (pip install 'peer_dist[mpi]' brings one) or set MPIRUN" >&2
    exit 2
}

prefixes="NCCL|GLOO|TORCH|PYTORCH|CUDA|CUBLAS|TRITON|OMP"
arguments=(-n "${RANKS:-2}")
version="$("$MPIRUN" --version 2>&1 || true)"
if [[ "$version" == *"Open MPI"* ]]; then
    # A rank's threads need more than the one core that Open MPI would bind it to.
    arguments+=(--oversubscribe --bind-to none)
    [ "$(id -u)" != 0 ] || arguments+=(--allow-run-as-root) # containers are often root
    [ -z "${HOSTS:-}" ] || arguments+=(--host "$HOSTS")
    # daemons on other nodes pass on only what is named, and all ranks need the same settings
    while read -r name; do
        arguments+=(-x "$name")
    done < <(compgen -e | grep -E "^(($prefixes)_.+|PYTHONPATH|LD_LIBRARY_PATH|MPI4PY_LIBMPI|CC)\$")
else
    [ -z "${HOSTS:-}" ] || arguments+=(-hosts "$HOSTS")
fi
read -ra more <<<"${MPIRUN_ARGUMENTS:-}"

exec "$MPIRUN" "${arguments[@]}" "${more[@]+"${more[@]}"}" "${PYTHON:-python}" -m peer_dist "$@"
