#!/usr/bin/env bash
# Somebody with a laptop and a directory of repositories wants a small model of their code. No GPU.
#   benchmarks/walks/laptop.sh DIRECTORY      makes DIRECTORY/src from installed packages and works in DIRECTORY
set -euo pipefail
source "$(dirname "$0")/walk.sh"
python3 "$here/make_repositories.py" src

fails 1 codeparrot-ds corpus collect scr -o data/raw
fails 1 codeparrot-ds corpus collect src -o src
run codeparrot-ds corpus collect src -o data/raw
run codeparrot-ds corpus clean data/raw -o data/checked
run codeparrot-ds corpus clean data/raw --secrets redact -o data/corpus
run codeparrot-ds tokenizer train data/corpus --vocab-size 4096 --max-seq-len 256 -o data/tokenizer
run codeparrot-ds shards build data/corpus --tokenizer data/tokenizer --valid-fraction 0.02 -o data/shards
run codeparrot-ds init mine --recipe quickstart
run sed -i 's/^name: .*/name: mine/; s/ steps: .*/ steps: 200/; s/every_steps: 200/every_steps: 100/' mine/recipe.yaml
fails 1 codeparrot-ds launch mine/recipe.yaml
run sed -i 's#shards: .*#shards: data/shards#' mine/recipe.yaml
fails 1 codeparrot-ds launch mine/recipe.yaml
run sed -i 's/vocab_size: .*/vocab_size: 4096/' mine/recipe.yaml
run env DS_ACCELERATOR=cpu codeparrot-ds plan mine/recipe.yaml
fails 1 env DS_ACCELERATOR=cpu codeparrot-ds plan mine/recipe.yaml --set model.n_layer=48 --set model.n_head=25 --set model.n_embd=1600
python3 "$here/run.py" --expect 75 --interrupt-at 'step 50 of' -- codeparrot-ds launch mine/recipe.yaml
run codeparrot-ds status runs/mine
fails 1 codeparrot-ds complete runs/mine 'def main():'
run codeparrot-ds launch mine/recipe.yaml
run codeparrot-ds convert runs/mine runs/mine/hf
run codeparrot-ds complete runs/mine --num 1 'def main():'
run mv runs/mine moved
run codeparrot-ds complete moved --num 1 'for i in'
fails 1 codeparrot-ds launch moved/recipe.yaml --set model.n_layer=6
run codeparrot-ds launch mine/recipe.yaml --set name=larger --set model.n_layer=6 --set schedule.steps=50
