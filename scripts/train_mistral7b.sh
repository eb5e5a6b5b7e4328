#!/usr/bin/env bash
# The paper's runs on Mistral-7B, one after another; finished ones are skipped, an interrupted one continues.
# usage: bash scripts/train_mistral7b.sh [--dry-run] [--gpus N] [--runs DIR] --model-revision COMMIT PART...
#        --model DIR takes a copy of the model on this machine instead of the Hub's. GPUs: one, if not said otherwise
# parts: table2   NCA, InfoNCA, DPO x 3 (K = 4 rewards); DPO, NCA, KTO, IPO, DPO x 6 (pairs); figures 2 and 5 use them
#        figure4  K = 2 and 3
#        figure6  the grids of alpha and beta (figure 4, right, uses the grid of rewards)
#        table3   DPO and NCA on UltraInteract, full fine-tuning; 8 GPUs
#        cards    the authors' released runs, quirks included; 4 GPUs for rewards, 2 for pairs
# A dry run prints each run's plan: steps, GPU memory, disk, hours. Rows: bash scripts/prepare_data.sh --out data
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() { sed -n '2,10s/^# //p' scripts/train_mistral7b.sh; }

dry_run='' gpus='' runs=runs model=() parts=()
while (($#)); do
    case $1 in
    --dry-run) dry_run=1 ;;
    --gpus) gpus=${2:?--gpus needs a number} && shift ;;
    --runs) runs=${2:?--runs needs a directory} && shift ;;
    --model | --model-revision) model+=("$1" "${2:?$1 needs a value}") && shift ;;
    table2 | figure4 | figure6 | table3 | cards) parts+=("$1") ;;
    -h | --help) usage && exit ;;
    *) echo "error: unknown word $1" >&2 && usage >&2 && exit 2 ;;
    esac
    shift
done
((${#parts[@]})) || { echo "error: name a part" >&2 && usage >&2 && exit 2; }
[[ -n $dry_run || ${#model[@]} -gt 0 ]] ||
    { echo "error: the model's commit is needed: --model-revision COMMIT (or --model DIR)" >&2 && exit 2; }
if [[ -z $dry_run ]]; then . scripts/setup.sh; fi

run() { # name of the run, method, recipe, overrides
    local name=$1 method=$2 recipe=train/recipes/mistral-7b/$3.yaml launch=(python -m) processes=${gpus:-$usual}
    shift 3
    local options=(--recipe "$recipe" "${model[@]}" "$@" --reference-cache "$runs/reference" --out "$runs/$name")
    if [[ -n $dry_run ]]; then
        printf '\n# %s\n' "$name"
        WORLD_SIZE=$processes "${PYTHON:-python3}" -m "train.$method" "${options[@]}" --dry-run
        return
    fi
    if ((processes > 1)); then
        launch=(accelerate launch --config_file "train/launch/$kind.yaml" --num_processes "$processes" -m)
    fi
    "${launch[@]}" "train.$method" "${options[@]}"
}

table2() {
    run nca nca reward
    run infonca infonca reward
    run dpo-x3 dpo reward
    run dpo dpo preference
    run nca-pair nca_pair preference
    run kto kto preference
    run ipo ipo preference
    run dpo-x6 dpo preference --rows data/pairs-all/rows.jsonl
}

figure4() {
    for k in 2 3; do
        for method in nca infonca; do
            run "$method-K$k" "$method" reward --rows "data/ultrafeedback-K$k/rows.jsonl"
        done
    done
}

figure6() { # the paper's grids are not known; KL is measured before the first step and after the last, the 1,936th
    local kl=(--evaluate-every 1936 --kl-prompts 256)
    for beta in 0.003 0.01 0.03 0.1; do
        for method in nca infonca; do
            for alpha in 0.01 0.1 1; do
                run "$method-alpha$alpha-beta$beta" "$method" reward --alpha "$alpha" --beta "$beta" "${kl[@]}"
            done
        done
        run "dpo-beta$beta" dpo preference --beta "$beta" "${kl[@]}"
        run "nca-pair-beta$beta" nca_pair preference --beta "$beta" "${kl[@]}"
    done
}

table3() {
    usual=8 kind=fsdp
    run ultrainteract-dpo dpo ultrainteract
    run ultrainteract-nca nca_pair ultrainteract
}

cards() {
    usual=4
    run released-nca nca released-reward
    usual=2
    run released-nca-pair nca_pair released-preference
    run released-dpo dpo released-preference
}

for part in "${parts[@]}"; do
    usual=1 kind=ddp
    "$part"
done
