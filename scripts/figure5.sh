#!/usr/bin/env bash
# Likelihood over training on pairs and on K = 4 rewards (DPO, InfoNCA, NCA): the paper's Figure 5.
#   bash scripts/figure5.sh --scale tiny [--seeds N] [--quick] [--runs DIR] [--out DIR] [--jobs N]   CPU, offline
#   bash scripts/figure5.sh --scale tiny|mistral-7b --dry-run                             stages and what they take
#   bash scripts/figure5.sh --scale mistral-7b --model-revision COMMIT [--runs DIR] [--out DIR]
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/figures.py figure5 "$@"
