#!/usr/bin/env bash
# Sets up .venv with the developers' tools, checks style, imports and types, and runs the tests.
#
#   launch/test.sh [pytest's arguments]      e.g. -m slow, or tests/test_layers.py -k gradient
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
source launch/environment.sh
setup_environment "[dev]"

ruff check .
ruff format --check .
lint-imports
mypy
exec python -m pytest "$@"
