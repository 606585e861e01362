#!/usr/bin/env bash
# What:      pretrain the student on cached targets:  pretrain_ssv2.sh DATA_ROOT CACHE_DIR
# Hardware:  one or more NVIDIA GPUs with 16 GB; --batch-size counts the clips of a step over all of them and has to be a multiple of their number.
# Time:      4 epochs; not measured by us at full size.
# Leaves:    checkpoints/checkpoint_step0.pt (the random start), the newest three checkpoints (0.5 GB each; --keep-last), metrics.jsonl, curves.png.
# Again:     safe; it goes on from the newest checkpoint in checkpoints/, on any number of GPUs (another run: --out FOLDER).
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_pretrain --epochs 4 --out checkpoints --save-steps 1000 --resume auto "$@"
