#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# From nothing to a trained vision-language model: environment, data and a warm-started tiny model, GRPO, summary.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
    cat <<'TEXT'
usage: bash scripts/quickstart.sh [--seed N] [--engine hf|vllm] [key=value ...]
  --seed N     data order, model and sampling (default 0)
  --engine E   what generates the rollouts: hf (default), Hugging Face generate; or vllm, which is installed first
  key=value    overrides of examples/quickstart.yaml, such as trainer.max_steps=10
TEXT
}

fail() {
    echo "$1" >&2
    usage >&2
    exit 2
}

seed=0
engine=hf
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        --seed | --engine)
            [ $# -ge 2 ] || fail "$1 needs a value"
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help)
            usage
            exit
            ;;
        -*) fail "unknown argument $1" ;;
        *=*) overrides+=("$1") ;;
        *) fail "unknown argument $1" ;;
    esac
    shift
done
[[ $seed =~ ^[0-9]+$ ]] || fail "--seed $seed is not a number"
[[ $engine =~ ^(hf|vllm)$ ]] || fail "--engine $engine is not known; choose hf or vllm"

source scripts/environment.sh
data="data/quickstart/seed_$seed"
run="checkpoints/quickstart/seed_$seed"
for override in "${overrides[@]}"; do
    case $override in trainer.save_checkpoint_path=*) run=${override#*=} ;; esac
done

prepare_environment "$engine"
environment_done=$SECONDS

recipe=$(cat scripts/make_digits.py scripts/picture_task.py scripts/warm_start.py scripts/tiny_qwen.py | sha256sum)
if [ "$(cat "$data/recipe.sha256" 2>/dev/null)" != "$recipe" ]; then
    "$python" scripts/make_digits.py --output "$data" --seed "$seed"
    echo "$recipe" >"$data/recipe.sha256"
fi
data_done=$SECONDS

# A run from the warm start takes a folder of its own: the run before it is kept under another name.
if compgen -G "$run/global_step_*" >/dev/null && [[ "${overrides[*]}" != *find_last_checkpoint=[tT]* ]]; then
    number=1
    while [ -e "$run.$number" ]; do number=$((number + 1)); done
    mv "$run" "$run.$number"
    echo "the run before this one is now in $run.$number" >&2
fi

"$python" -m verl.trainer.main config=examples/quickstart.yaml \
    data.train_files="$data/train.parquet" data.val_files="$data/test.parquet" data.seed="$seed" \
    worker.actor.model.model_path="$data/model" worker.rollout.name="$engine" worker.rollout.seed="$seed" \
    trainer.experiment_name="digits_$(basename "$run")" trainer.save_checkpoint_path="$run" "${overrides[@]}"
training_done=$SECONDS

"$python" scripts/report_quickstart.py "$run"
echo "time: environment $environment_done s, data and warm start $((data_done - environment_done)) s," \
    "training $((training_done - data_done)) s, summary $((SECONDS - training_done)) s"
