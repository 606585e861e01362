#!/usr/bin/env bash
# What:      text-video retrieval on frozen features:  eval_retrieval.sh MSRVTT_ROOT MSVD_ROOT CHECKPOINT [--msrvtt-split 7k|full] [--rows all]
# Hardware:  one NVIDIA GPU, or a CPU with patience: about 12,000 clips through each encoder.
# Time:      the features are not measured by us at full size; heads, closed forms and scores take half a minute of one CPU core per row (MSR-VTT 9k).
# Leaves:    runs/retrieval: summary.json, table.md (both datasets, both directions, baselines), gallery.png, features,
#            shared_recordings.csv if test and training clips were cut from one recording.
# Again:     safe; stored features are used again.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_retrieval "$@"
