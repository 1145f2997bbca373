#!/usr/bin/env bash
# From a causal language model to a block-diffusion model that is served: import, prepare, train, sample, export.
#
#     examples/from_qwen3.sh ~/Qwen3-0.6B 'corpus/*.jsonl' runs/from-qwen3 [key=value ...]
#
# The model is a folder of Hugging Face's (Qwen3, or another that `bd3 convert import` reads), the text what `bd3 prepare` reads; overrides of
# the recipe follow. Where it was stopped it goes on when the same command is given again: prepared data and a run that was begun are kept.
set -euo pipefail
model=$1 text=$2 run=$3
shift 3
context=${CONTEXT:-1024} block=${BLOCK:-16}

[ -d "$run" ] || {
    # The tokenizer comes with the model, so the data are prepared with it, and the run's recipe names both.
    bd3 prepare --source "$text" --path "$run-data" --context "$context" --tokenizer "$model/tokenizer.json" --row-special none
    bd3 convert import "$model" "$run" --data "$run-data" --block-size "$block" --set "model.context=$context" data.row_special=none "$@"
}
bd3 train "$run/recipe.yaml" "$@"
bd3 sample "$run" --length "$((context < 128 ? context : 128))"
bd3 convert export "$run" "$run-served" ${FORMAT:+--format "$FORMAT"}
