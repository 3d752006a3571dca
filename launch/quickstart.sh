#!/usr/bin/env bash
# Sets up .venv, trains a PEER language model on the text that ships with the package, and shows what it
# learned. On 2 CPU ranks, or on every GPU of the machine. Run again, it goes on for as many steps more.
#
#   launch/quickstart.sh [section.key=value ...]     e.g. train.micro_batch_size=4
#
# STEPS (300): how many steps to train per call.   RUN (runs/quickstart): the run's folder, instead of
# checkpoint.dir and logging.dir.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
source launch/environment.sh
setup_environment "[train]"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # torchrun would say so at length
STEPS="${STEPS:-300}"
RUN="${RUN:-runs/quickstart}"
ranks="$(python -c 'import torch; print(torch.cuda.device_count() or 2)')"
[ -e data/tinyshakespeare.json ] || peer-dist prepare --output data/tinyshakespeare --force

# shellcheck disable=SC2010  # names that training made, none at first
newest="$(ls "$RUN/checkpoints" 2>/dev/null | grep -E '^step-[0-9]+$' | sort | tail -n 1 || true)"
newest="${newest:-step-0}"
done_steps=$((10#${newest#step-}))
torchrun --standalone --nproc-per-node "$ranks" -m peer_dist train --config configs/quickstart.yaml \
    parallel.expert="$ranks" train.global_batch_size=$((8 * ranks)) train.steps=$((done_steps + STEPS)) \
    checkpoint.dir="$RUN/checkpoints" logging.dir="$RUN/logs" "$@"

say "a sample"
peer-dist generate --checkpoint "$RUN/checkpoints" --prompt "ROMEO:" --tokens 300
