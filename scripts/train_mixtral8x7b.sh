#!/usr/bin/env bash
# Table 3 on Mixtral-8x7B: DPO and NCA on UltraInteract, full fine-tuning. Finished runs are skipped.
# usage: bash scripts/train_mixtral8x7b.sh [--dry-run] [--gpus N] [--runs DIR] --model DIR [--model-revision COMMIT]
# On several nodes submit train/launch/slurm.sbatch, once a run; the recipe's header has the commands. GPUs: 8 with
# 139 GiB each here. A dry run prints each run's plan; without --model it is that of mistralai/Mixtral-8x7B-v0.1.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,5s/^# //p' scripts/train_mixtral8x7b.sh; }

dry_run='' gpus=8 runs=runs model=()
while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --gpus) gpus=${2:?--gpus needs a number} && shift ;;
    --runs) runs=${2:?--runs needs a directory} && shift ;;
    --model | --model-revision) model+=("$1" "${2:?$1 needs a value}") && shift ;;
    -h | --help) usage && exit ;;
    *) echo "error: unknown word $1" >&2 && usage >&2 && exit 2 ;;
    esac
    shift
done
if ((!${#model[@]})); then
    [[ -n $dry_run ]] || { echo "error: name the SFT checkpoint to begin with: --model DIR" >&2 && exit 2; }
    model=(--model mistralai/Mixtral-8x7B-v0.1)
fi
if [[ -z $dry_run ]]; then . scripts/setup.sh; fi

for method in dpo nca_pair; do
    name=mixtral-ultrainteract-${method%_pair}
    options=(--recipe train/recipes/mixtral-8x7b/ultrainteract.yaml "${model[@]}" --reference-cache "$runs/reference"
        --out "$runs/$name")
    if [[ -n $dry_run ]]; then
        printf '\n# %s\n' "$name"
        WORLD_SIZE=$gpus "${PYTHON:-python3}" -m "train.$method" "${options[@]}" --dry-run
    else
        accelerate launch --config_file train/launch/fsdp.yaml --num_processes "$gpus" \
            -m "train.$method" "${options[@]}"
    fi
done
