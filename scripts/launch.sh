#!/usr/bin/env bash
# Run a command of this package from the repository's .venv; under torchrun, one process per GPU, when several GPUs are visible.
# Usage: scripts/launch.sh COMMAND ARGUMENTS...   (CUDA_VISIBLE_DEVICES chooses the GPUs; the other scripts here go through this one)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"
command -v "$1" >/dev/null || { echo "$1: not installed; run: make -C $root install" >&2; exit 127; }

gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -vc -e '^-' -e '^$'
    else nvidia-smi -L 2>/dev/null | grep -c '^GPU '; fi || true
}
case " $* " in *" --help "*|*" -h "*) exec "$@" ;; esac
n=$(gpus)
if [ "$n" -gt 1 ] && [ -z "${WORLD_SIZE:-}" ]; then exec torchrun --standalone --nproc-per-node "$n" --no-python "$@"; fi
exec "$@"
