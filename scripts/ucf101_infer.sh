#!/usr/bin/env bash
# What:      linear probe on frozen features, then inference on the test list:  ucf101_infer.sh UCF_ROOT CHECKPOINT
# Hardware:  one NVIDIA GPU, or a CPU with patience: 13,320 clips through each encoder.
# Time:      not measured by us at full size.
# Leaves:    runs/ucf101: summary.json, table.md, predictions.csv (one row per test video), confusion.png, features.
# Again:     safe; stored features are used again.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_ucf101 "$@"
