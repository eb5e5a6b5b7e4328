#!/usr/bin/env bash
# Reasoning, the paper's Table 3: math through lm-eval and code through evalplus, for policies trained before.
#   bash scripts/table3.sh --scale tiny [--seeds N] [--runs DIR] [--jobs N]           CPU, offline
#   bash scripts/table3.sh --scale mistral-7b|mixtral-8x7b --dry-run                  commands, items, tokens, hours
#   bash scripts/table3.sh --scale mistral-7b --policy NAME=DIR ... --data DIR        the paper's benchmarks
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/table3.py "$@"
