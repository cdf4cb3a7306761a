#!/usr/bin/env bash
# Somebody who has datasets of Megatron-LM's preprocess_data.py trains on them as they are.
#   benchmarks/walks/megatron.sh DIRECTORY MEGATRON      a checkout of Megatron-LM whose imports work (torch, triton)
set -euo pipefail
megatron=$(realpath "${2:?usage: $0 DIRECTORY MEGATRON}")
source "$(dirname "$0")/walk.sh"
python3 "$here/make_json_gz.py" raw --files 1 --megabytes 30
gunzip -c raw/file-000000000000.json.gz > code.jsonl
head -n 500 code.jsonl > more.jsonl
tail -n 200 code.jsonl > held-out.jsonl
ln -s "$megatron" Megatron-LM
# Megatron-LM imports typing.override, new in Python 3.12; nothing else in it needs 3.12.
mkdir compatible
printf 'import typing\nfrom typing_extensions import override\ntyping.override = override\n' > compatible/sitecustomize.py
export PYTHONPATH="$PWD/compatible${PYTHONPATH:+:$PYTHONPATH}"

run codeparrot-ds tokenizer train code.jsonl --vocab-size 4096 -o tokenizer
run codeparrot-ds tokenizer train more.jsonl --vocab-size 4096 -o other-tokenizer
run codeparrot-ds tokenizer train code.jsonl --vocab-size 70000 -o large-tokenizer
run python3 Megatron-LM/tools/preprocess_data.py --input code.jsonl --output-prefix code --json-keys content --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --append-eod --workers 1
run python3 Megatron-LM/tools/preprocess_data.py --input held-out.jsonl --output-prefix held-out --json-keys content --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --append-eod --workers 1
run python3 Megatron-LM/tools/preprocess_data.py --input more.jsonl --output-prefix without-end --json-keys content --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --workers 1
run python3 Megatron-LM/tools/preprocess_data.py --input more.jsonl --output-prefix large --json-keys content --tokenizer-type HuggingFaceTokenizer --tokenizer-model large-tokenizer --append-eod --workers 1

fails 1 codeparrot-ds shards adopt code --tokenizer tokenizer
fails 1 codeparrot-ds shards adopt code_content_document --tokenizer other-tokenizer
fails 1 codeparrot-ds shards adopt large_content_document --tokenizer tokenizer -o large
fails 1 codeparrot-ds shards adopt without-end_content_document --tokenizer tokenizer
run codeparrot-ds shards adopt without-end_content_document --tokenizer tokenizer --append-eos -o with-end
run codeparrot-ds shards adopt large_content_document --tokenizer large-tokenizer -o large
run codeparrot-ds shards adopt code_content_document --valid-prefix held-out_content_document --tokenizer tokenizer
fails 1 codeparrot-ds shards adopt large_content_document --tokenizer large-tokenizer
run codeparrot-ds shards verify . --deep
run codeparrot-ds shards inspect . --sequence 0 --seq-len 48
run codeparrot-ds init mine --recipe quickstart
run sed -i 's/^name: .*/name: mine/; s#shards: .*#shards: .#; s/vocab_size: .*/vocab_size: 4096/; s/ steps: .*/ steps: 25/; s/warmup_steps: .*/warmup_steps: 5/' mine/recipe.yaml
run codeparrot-ds shards inspect mine/recipe.yaml --step 0 --rank 1 --world-size 8
run codeparrot-ds launch mine/recipe.yaml
run codeparrot-ds launch mine/recipe.yaml --set name=large --set data.shards=large --set model.vocab_size=70000 --set schedule.steps=5 --set schedule.warmup_steps=1
run codeparrot-ds convert runs/mine runs/mine/hf
run codeparrot-ds complete runs/mine --num 1 'def main():'
