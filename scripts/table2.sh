#!/usr/bin/env bash
# Instruction following, the paper's Table 2: MT-Bench, AlpacaEval 1, and wins against DPO, for policies trained before.
#   bash scripts/table2.sh --scale tiny [--seeds N] [--quick] [--runs DIR] [--jobs N]      CPU, no paid judge
#   bash scripts/table2.sh --scale mistral-7b --dry-run                                    commands, calls, money, hours
#   bash scripts/table2.sh --scale mistral-7b --model-revision COMMIT [--judge-url URL --judge-model NAME ...]
# Finished stages are skipped by content, so an interrupted command continues.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec python scripts/table2.py "$@"
