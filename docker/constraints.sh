#!/usr/bin/env bash
# Prints the constraints for installing peer_dist into an environment: what the environment has stays at the
# version that it has (an image's own torch, its CUDA extensions, the numpy they were built against), the rest comes
# in the versions that were tried.
#
#   docker/constraints.sh [PYTHON] > constraints.txt && pip install --constraint constraints.txt .
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
"${1:-python3}" -m pip list --format=freeze --disable-pip-version-check |
    awk -F '==' '
        function plain(name) { name = tolower(name); gsub(/[-_.]+/, "-", name); return name }
        /^#/ || NF < 2 || $1 ~ /^(pip|setuptools|wheel|peer[-_]dist)$/ { next }
        !(plain($1) in seen) { seen[plain($1)]; print }
    ' - "$here/constraints.txt"
