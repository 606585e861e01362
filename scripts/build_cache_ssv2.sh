#!/usr/bin/env bash
# What:      run the frozen teacher once over SSv2 and keep its projected tokens:  build_cache_ssv2.sh DATA_ROOT CACHE_DIR [LIMIT]
# Hardware:  one or more NVIDIA GPUs with 16 GB; a CPU works (2 cores: 36 s of teacher per clip, 10 s with --teacher-dtype bfloat16).
#            Jobs of an array scheduler share one CACHE_DIR by --shard 0/8, --shard 1/8, ...; it may be a URL such as s3://bucket/cache.
# Time:      0.4 EFLOP of teacher for all 168,913 training clips; on a GPU not measured.
# Leaves:    CACHE_DIR, 1.2 MB per clip: 1.2 GB with LIMIT 1000, 203 GB for the whole training set.
# Again:     safe after any stop; finished shards are kept, the others are built. A larger LIMIT, or 0, extends the cache.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_build_cache --teacher MCG-NJU/videomae-huge-finetuned-kinetics --dim 384 "$@"
