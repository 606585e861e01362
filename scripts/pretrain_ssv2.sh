#!/usr/bin/env bash
# What:      pretrain the student on cached targets:  pretrain_ssv2.sh DATA_ROOT CACHE_DIR
# Hardware:  one or more NVIDIA GPUs with 16 GB.
# Time:      4 epochs; not measured by us at full size.
# Leaves:    checkpoints/checkpoint_step0.pt (the random start), later checkpoints, checkpoints/metrics.jsonl.
# Again:     safe; it goes on from the newest checkpoint in checkpoints/ (another run: --out FOLDER).
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_pretrain --epochs 4 --out checkpoints --resume auto "$@"
