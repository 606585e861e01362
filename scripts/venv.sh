#!/usr/bin/env bash
# Make .venv and install the project with everything a notebook or a test needs; `make` runs this when requirements change.
# Hardware: any; 6 GB of disk on a machine whose torch is the CUDA build, 2 GB otherwise. Time: 1-10 minutes, mostly download.
# Leaves .venv and its stamp .venv/.installed. Safe to run again. PYTHON=python3.12 scripts/venv.sh chooses the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "stjepa: $*" >&2; exit 1; }
suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
version() { "$1" -V 2>/dev/null || echo "not there"; }

if [ ! -x .venv/bin/python ]; then
    python=""
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        if suits "$name"; then python=$name; break; fi
    done
    [ -n "$python" ] || die "Python 3.11, 3.12 or 3.13 is needed, and ${PYTHON:-python3} is $(version "${PYTHON:-python3}"); name one with make PYTHON=/path/to/python3.12"
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then "$python" -m venv .venv
    elif command -v uv >/dev/null; then uv venv --quiet --python "$python" .venv
    else die "$python has no venv or ensurepip module (on Debian and Ubuntu: apt install python3-venv), and uv is not installed"; fi
fi
suits .venv/bin/python || die "the Python of .venv is $(version .venv/bin/python), and 3.11, 3.12 or 3.13 is needed; remove .venv and run this again"

quiet=-qq; if [ -t 1 ]; then quiet=; fi
echo "installing into .venv: minutes the first time"
if .venv/bin/python -m pip --version >/dev/null 2>&1; then .venv/bin/python -m pip install $quiet -r requirements.txt
elif command -v uv >/dev/null; then uv pip install --quiet --python .venv/bin/python -r requirements.txt
else
    .venv/bin/python -m ensurepip >/dev/null 2>&1 || die ".venv has neither pip nor ensurepip, and uv is not installed; remove .venv and run this again"
    .venv/bin/python -m pip install $quiet -r requirements.txt
fi
touch .venv/.installed
