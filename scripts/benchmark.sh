#!/usr/bin/env bash
# Speed and memory of the engine against the released code's computation and TRL, to results/benchmark/.
#   bash scripts/benchmark.sh [--quick] [--out DIR] [--device cuda]
# Roughly 20 minutes of one core; --quick 7 minutes. An interrupted command continues after its last finished part.
set -euo pipefail
extra_requirements="requirements-test.txt"
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::FutureWarning
exec python -m benchmarks.measure "$@"
