#!/usr/bin/env bash
# What:      probes on frozen features, then inference on the test list:  ucf101_infer.sh UCF_ROOT CHECKPOINT
#            All three splits and their mean: --split all. The action of one video: --video clip.avi.
# Hardware:  one NVIDIA GPU, or a CPU with patience: 13,320 clips through each encoder.
# Time:      not measured by us at full size.
# Leaves:    runs/ucf101: summary.json, table.md, predictions.csv (one row per test video), per_class.csv, confusion.png, confused.png,
#            probe.safetensors (what --video reads), features.
# Again:     safe; stored features are used again.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_ucf101 "$@"
