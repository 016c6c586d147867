#!/usr/bin/env bash
# A GPU's day in one call: everything that only a GPU can show, within 9 minutes (scripts/gpu_check.py).
#
#     scripts/gpu_check.sh --json gpu.json
#     scripts/gpu_check.sh --tiny --json gpu.json    # without a GPU: tiny sizes, Triton's interpreter
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
