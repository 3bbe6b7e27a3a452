#!/usr/bin/env bash
# The GPU half of the benchmarks, on a machine that has torch and transformers only:
#   bash bench/gpu.sh [folder for the results, default bench/results]
# core.py first checks the packed gradient against the padded one on the device, and stops if it is
# another. Not run on a GPU yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
python bench/core.py --geometry qwen2.5-0.5b --dtype bfloat16 --out "$out/core_gpu_0.5b.json"
python bench/core.py --geometry qwen2.5-1.5b --dtype bfloat16 --pairs 128 --out "$out/core_gpu_1.5b.json"
PYTHONPATH=. python bench/kernels.py --out "$out/kernels_gpu.json"
