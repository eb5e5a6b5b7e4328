#!/usr/bin/env bash
# The best response and 1, 2 or 3 others (NCA, InfoNCA): the paper's Figure 4, left.
#   bash scripts/figure4.sh --scale tiny [--seeds N] [--quick] [--runs DIR] [--out DIR] [--jobs N]   CPU, offline
#   bash scripts/figure4.sh --scale tiny|mistral-7b --dry-run                             stages and what they take
#   bash scripts/figure4.sh --scale mistral-7b --model-revision COMMIT [--runs DIR] [--out DIR]
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/figures.py figure4 "$@"
