#!/usr/bin/env bash
# The paper's experiment in miniature, from nothing to results/tiny/: no GPU, no download of data or weights.
#   bash scripts/reproduce.sh [--seeds N] [--quick] [--runs DIR] [--out DIR] [--jobs N]
# Finished stages are skipped by content, so an interrupted command continues and a second one ends in seconds.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1
exec python scripts/reproduce.py "$@"
