#!/usr/bin/env bash
# What:      the whole flow on the built-in toy data: videos, cache, pretraining, UCF-101, retrieval, report.
# Hardware:  2 CPU cores, 2 GB of memory; no network. A GPU is left alone, so that the figures are those of a CPU.
# Time:      7 minutes a seed, of which one is for data and cache (measured on 2 cores).
# Leaves:    runs/demo/summary.json and runs/demo/report.html; 1 GB in all under runs/demo.
# Again:     safe; finished stages are kept.
set -euo pipefail
CUDA_VISIBLE_DEVICES="" exec "$(dirname "${BASH_SOURCE[0]}")/launch.sh" stjepa_demo "$@"
