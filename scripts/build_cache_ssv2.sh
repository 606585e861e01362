#!/usr/bin/env bash
# What:      run the frozen teacher once over SSv2 and keep its projected tokens:  build_cache_ssv2.sh DATA_ROOT CACHE_DIR [LIMIT]
# Hardware:  one or more NVIDIA GPUs with 16 GB; a CPU works (about 10 s per clip).
# Time:      0.4 EFLOP of teacher for all 168,913 training clips: hours on one GPU, less on several.
# Leaves:    CACHE_DIR, 1.2 MB per clip: 1.2 GB with LIMIT 1000, 203 GB for the whole training set.
# Again:     safe; finished shards are kept, the others are built.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_build_cache --teacher MCG-NJU/videomae-huge-finetuned-kinetics --dim 384 "$@"
