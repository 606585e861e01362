#!/usr/bin/env bash
# What:      arrow of time, frame order, speed, and what of the action score is motion:  eval_temporal.sh UCF_ROOT CHECKPOINT
# Hardware:  one NVIDIA GPU, or a CPU with patience: 13,320 clips, each decoded once and shown in seven variants to every encoder.
# Time:      not measured by us at full size; the demo's 900 clips of 64 px with seven encoders: 2 minutes on 2 CPU cores.
# Leaves:    runs/temporal: summary.json, table.md, drops_linear.png, features. SSv2's clips are short: add --strides 1,2 there.
# Again:     safe; it goes on with the block of clips it was stopped in.
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_temporal "$@"
