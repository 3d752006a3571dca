# shellcheck shell=bash
# Sourced by the scripts beside it: makes .venv with all that is needed, and puts it first on the PATH.
#
#   setup_environment EXTRAS    e.g. "[train]" or "[dev]"
#
# An environment that is already there is left alone unless setup.py has changed since. A machine whose own
# Python has a torch for its GPU (a container of NVIDIA's, say) keeps that torch.

say() {
    if [ -t 2 ]; then printf '\033[1m%s\033[0m\n' "$*" >&2; else printf '%s\n' "$*" >&2; fi
}

setup_environment() {
    local extras="$1" venv="$ROOT/.venv" stamp python
    stamp="$venv/.peer_dist$extras"
    if [ ! -x "$venv/bin/python" ]; then
        python="${PYTHON:-python3}"
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || {
            say "error: $python is missing or older than Python 3.10; set PYTHON to a newer one"
            exit 2
        }
        say "setting up $venv"
        local site=()
        "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null && site=(--system-site-packages)
        "$python" -m venv "${site[@]+"${site[@]}"}" "$venv" || {
            say "error: the venv module of $python does not work (on Debian: apt-get install python3-venv)"
            exit 2
        }
    fi
    if [ ! -e "$stamp" ] || [ "$ROOT/setup.py" -nt "$stamp" ]; then
        say "installing peer_dist$extras"
        # torch first and by itself: a plain range would take the newest build there is
        "$venv/bin/python" -c 'import torch' 2>/dev/null ||
            "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "torch==2.13.0"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$ROOT$extras"
        touch "$stamp"
    fi
    PATH="$venv/bin:$PATH"
    export PATH
}
