#!/usr/bin/env bash
# What:      text-video retrieval on frozen features:  eval_retrieval.sh MSRVTT_ROOT MSVD_ROOT CHECKPOINT
# Hardware:  one NVIDIA GPU, or a CPU with patience: about 12,000 clips through each encoder.
# Time:      not measured by us at full size.
# Leaves:    runs/retrieval: summary.json, table.md (both datasets, both directions), gallery.png, features.
# Again:     safe; stored features are used again.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_retrieval "$@"
