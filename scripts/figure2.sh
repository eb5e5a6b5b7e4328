#!/usr/bin/env bash
# Likelihood of chosen and rejected responses over training, on pairs (DPO, NCA): the paper's Figure 2.
#   bash scripts/figure2.sh --scale tiny [--seeds N] [--quick] [--runs DIR] [--out DIR] [--jobs N]   CPU, offline
#   bash scripts/figure2.sh --scale tiny|mistral-7b --dry-run                             stages and what they take
#   bash scripts/figure2.sh --scale mistral-7b --model-revision COMMIT [--runs DIR] [--out DIR]
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/figures.py figure2 "$@"
