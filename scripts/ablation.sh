#!/usr/bin/env bash
# Continual pretraining with LayerSkip, part by part, over three seeds, from a model trained without it; a table at the end.
# Usage: bash scripts/ablation.sh      (about two hours on two cores; what is finished is not done again)
set -euo pipefail
source "$(dirname "$0")/setup.sh" ""
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

python -m train recipes/quickstart/plain.yaml
dropout='layer_dropout: {p_max: 0.1, over_depth: exp, over_time: constant}'
exits() { echo "early_exit: {e_scale: $1, weights: sum, curriculum: $2}"; }
rotational='rotational, every: 4'
named='early_exit: {exits: [2, 4, 8, 12], weights: [0.5, 0.04, 0.03, 0.03]}'
runs=()
run() { # NAME PARTS OF THE OBJECTIVE
    for seed in 0 1 2; do
        directory="runs/ablation/$1-$seed"
        python -m train recipes/quickstart/continual.yaml "output_dir=$directory" "seed=$seed" "objective={kind: layerskip, $2}"
        # the exit and the number of drafts that the run itself found best
        [ -f "$directory/report/report.json" ] || python -m eval benchmark --run "$directory" --output_dir "$directory/report" \
            --strategies self_speculative --sample False --num_samples 16 --max_steps 96
        runs+=("$directory")
    done
}
run none ""
run dropout "$dropout"
run exit-loss "$(exits 0.2 "$rotational")"
run both "$dropout, $(exits 0.2 "$rotational")"
run gradual "$dropout, $(exits 0.2 gradual)"
run e_scale-0.1 "$dropout, $(exits 0.1 "$rotational")"
run e_scale-0.5 "$dropout, $(exits 0.5 "$rotational")"
run e_scale-1.0 "$dropout, $(exits 1.0 "$rotational")"
run named-exits "$dropout, $named"
python -m eval compare "${runs[@]}" --exits 2,4,8,12 | tee runs/ablation/table.md
