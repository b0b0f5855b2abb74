#!/usr/bin/env bash
# Make .venv with the pinned versions; done again only when what it is made from changed.
# Usage: source scripts/setup.sh [extra]      (extra: test, wandb, deepspeed, ...)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extra="${1:-}"
python="${PYTHON:-python3}"
stamp=".venv/installed${extra:+-$extra}"
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $python is not Python 3.11 or newer; set PYTHON=/path/to/python3.11" >&2
    exit 2
fi
wanted="$(cat setup.cfg constraints.txt | cksum) $("$python" --version)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing into .venv (once)" >&2
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # torch first and by exact version, so that nothing else pulls another build of it
    .venv/bin/pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt \
        --editable ".${extra:+[$extra]}"
    echo "$wanted" > "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
