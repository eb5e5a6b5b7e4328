#!/usr/bin/env bash
# The paper's data as rows: downloads (1.7 GB), converts, compares, describes. Finished steps are skipped.
# usage: bash scripts/prepare_data.sh [--dry-run] [--out DIR]      DIR is `data` if not given
# cost:  no GPU; minutes on 2 cores once downloaded, under 1 GB of memory for each conversion
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,4s/^# //p' scripts/prepare_data.sh; }

out=data dry_run=
while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --out) out=${2:?--out needs a directory} && shift ;;
    -h | --help) usage && exit ;;
    *) echo "error: unknown option $1" >&2 && usage >&2 && exit 2 ;;
    esac
    shift
done

step() { # a description (empty: as before), then the words of a command
    if [[ -n $1 ]]; then printf '\n# %s\n' "$1"; fi
    shift
    printf '%q ' "$@" && echo
    if [[ -z $dry_run ]]; then "$@"; fi
}

if [[ -n $dry_run ]]; then
    "${PYTHON:-python3}" -m data_prep.sources
    echo "Disk: about 8 GB in all (estimated): the downloads, their copy in the cache of datasets, the rows."
    echo "Free: $(df -Ph . | awk 'NR == 2 {print $4}') here. Nothing is downloaded or written by a dry run."
else
    . scripts/setup.sh
fi

step "The authors' reward set and preference set" \
    python -m data_prep.ultrafeedback --released reward --out "$out/released-reward"
step "" \
    python -m data_prep.ultrafeedback --released preference --out "$out/released-preference"
step "UltraFeedback itself, the same prompts in the same split: the paper's K = 4 rows" \
    python -m data_prep.ultrafeedback --out "$out/ultrafeedback" --truthfulqa keep --split-like "$out/released-reward"
step "The paper's preference baselines: DPO, DPO x 3, DPO x 6" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/pairs-best-vs-random" --strategy best-vs-random
step "" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/pairs-best-vs-rest" --strategy best-vs-rest
step "" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/pairs-all" --strategy all-pairs
step "The authors' own choice of pairs, rebuilt" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/pairs-released" --strategy released
step "The ablation on K (K = 4 is the whole set)" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/ultrafeedback-K2" --responses 2
step "" \
    python -m data_prep.pairs "$out/ultrafeedback/train.jsonl" --out "$out/ultrafeedback-K3" --responses 3
step "UltraInteract pairs" \
    python -m data_prep.ultrainteract --out "$out/ultrainteract"
step "How far the rebuilt sets agree with the released ones" \
    python -m data_prep.compare "$out/ultrafeedback/train.jsonl" "$out/released-reward/train.jsonl"
step "" \
    python -m data_prep.compare "$out/pairs-released/rows.jsonl" "$out/released-preference/train.jsonl"
step "Label entropy of the released test split: 0.2326 on the authors' InfoNCA card" \
    python -m data_prep.describe "$out/released-reward/test.jsonl" --out "$out/released-reward-test-description"
