#!/usr/bin/env bash
# Build shards on a Ray cluster. The tokenizer must be on a shared disk, and so must input and output unless they are URLs.
#   on the head:    ray start --head --port 6379
#   on the others:  ray start --address HEAD:6379
#   then here:      RAY_ADDRESS=HEAD:6379 launch/ray_preprocess.sh 'data/*.jsonl.gz' data/tokenizer data/shards
# Nodes may leave and join: lost tasks are rerun elsewhere. Running it again keeps finished shards.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 INPUT TOKENIZER OUTPUT [options of codeparrot-ds shards build]" >&2
    exit 2
fi
input=$1 tokenizer=$2 output=$3
shift 3
exec codeparrot-ds shards build "$input" --tokenizer "$tokenizer" --output "$output" --engine ray "$@"
