#!/usr/bin/env bash
# The owner of 1,000 .json.gz files with CodeParrot's fields, 2.1 GB of text, two of them damaged.
#   benchmarks/walks/json_gz.sh DIRECTORY      makes DIRECTORY/raw from installed Python files
set -euo pipefail
source "$(dirname "$0")/walk.sh"
python3 "$here/make_json_gz.py" raw
# An upload that was cut off, and a line that is not JSON.
truncate -s 300000 raw/file-000000000003.json.gz
echo 'not JSON' | gzip >> raw/file-000000000700.json.gz

run du -sh raw
fails 1 codeparrot-ds corpus clean raw -o corpus --text-field text --workers 2
fails 1 codeparrot-ds corpus clean raw -o corpus --workers 2
run codeparrot-ds corpus clean raw -o corpus --on-bad-document skip --workers 2
run codeparrot-ds corpus stats corpus --examples 1
run codeparrot-ds tokenizer train corpus --documents 20000 --vocab-size 32768 -o tokenizer --workers 2
python3 "$here/run.py" --expect -9 --kill-at 'encoding: ' -- codeparrot-ds shards build corpus --tokenizer tokenizer -o shards --workers 2
run codeparrot-ds shards build corpus --tokenizer tokenizer -o shards --workers 2
run codeparrot-ds shards verify shards --deep
run codeparrot-ds shards inspect shards --sequence 100000 --seq-len 64
run codeparrot-ds shards build 'raw/file-000000000[07]0?.json.gz' --tokenizer tokenizer -o raw-shards --on-bad-document skip --workers 2
run cat raw-shards/quarantine.jsonl
run du -sh corpus tokenizer shards
