#!/usr/bin/env bash
# Score against KL over alpha and beta, on pairs and rewards: the paper's Figure 6, and Figure 4, right.
#   bash scripts/figure6.sh --scale tiny [--seeds N] [--quick] [--runs DIR] [--out DIR] [--jobs N]   CPU, offline
#   bash scripts/figure6.sh --scale tiny|mistral-7b --dry-run                             stages and what they take
#   bash scripts/figure6.sh --scale mistral-7b --model-revision COMMIT [--runs DIR] [--out DIR]
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/figures.py figure6 "$@"
