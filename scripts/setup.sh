#!/usr/bin/env bash
# Make .venv with the pinned versions; done again only when what it is made from changed.
# Usage: source scripts/setup.sh [extra]      (extra: test, wandb, deepspeed, ...)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
find_python() {
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-python3} is not Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 2
}

make_venv() { # Debian splits venv from Python; virtualenv does the same without it
    "$python" -m venv .venv 2>/dev/null && return
    rm -rf .venv
    "$python" -m pip install --quiet --disable-pip-version-check --target .virtualenv virtualenv
    PYTHONPATH=.virtualenv "$python" -m virtualenv --quiet .venv
    rm -rf .virtualenv
}

stamp=".venv/installed${extra:+-$extra}"
python="$(find_python)"
wanted="$(cat setup.cfg constraints.txt | cksum) $("$python" --version)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (once)" >&2
    [ -x .venv/bin/python ] || make_venv
    # torch first and by exact version, so that nothing else pulls another build of it
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        --editable ".${extra:+[$extra]}"
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
