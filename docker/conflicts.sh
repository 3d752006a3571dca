#!/usr/bin/env bash
# Fails, with one message, if what pip installed into a virtual environment does not fit what the environment sees of
# the system, or the other way round. Conflicts that a base image has with itself are its own and are not told.
#
#   docker/conflicts.sh [PYTHON]
set -euo pipefail
python="${1:-python3}"
ours="$("$python" -m pip list --local --format=freeze --disable-pip-version-check)"
# exits with 1 when it has something to say
told="$("$python" -m pip check --disable-pip-version-check)" || [ $? -eq 1 ]
conflicts="$(
    awk '
        function plain(name) { name = tolower(name); gsub(/[-_.]+/, "-", name); return name }
        NR == FNR { split($0, parts, "=="); ours[plain(parts[1])]; next }
        # "NAME VERSION has requirement NEED, but you have OTHER VERSION.", "NAME VERSION requires ..."
        plain($1) in ours || (/, but you have / && plain($(NF - 1)) in ours)
    ' <(echo "$ours") <(echo "$told")
)"
[ -z "$conflicts" ] || {
    echo "what pip installed for peer_dist does not fit what the image has, which stays as it is:"
    echo "$conflicts"
    echo "change these packages' versions in docker/constraints.txt, or take another BASE"
    exit 1
} >&2
