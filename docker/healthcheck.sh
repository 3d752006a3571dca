#!/usr/bin/env bash
# Whether a container is well: with METRICS=runs/.../logs/metrics.jsonl, the run has written there within STALE_SECONDS
# (1800; it writes every step); before its first line, or without METRICS, the command answers.
set -euo pipefail
if [ -n "${METRICS:-}" ] && [ -e "$METRICS" ]; then
    age=$(($(date +%s) - $(stat -c %Y "$METRICS")))
    [ "$age" -le "${STALE_SECONDS:-1800}" ] || {
        echo "$METRICS was last written $age s ago"
        exit 1
    }
    echo "$METRICS was written $age s ago"
else
    peer-dist --version
fi
