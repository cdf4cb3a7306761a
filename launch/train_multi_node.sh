#!/usr/bin/env bash
# Train on the hosts of a hostfile: check them first, restart after a crash.
#   launch/train_multi_node.sh launch/recipes/codeparrot-xl.yaml hosts --spare-hosts 1 --min-hosts 2
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 RECIPE HOSTFILE [options of codeparrot-ds launch]" >&2
    exit 2
fi
recipe=$1 hostfile=$2
shift 2
[ -d .venv ] && export PATH="$PWD/.venv/bin:$PATH"
exec codeparrot-ds launch "$recipe" --hostfile "$hostfile" "$@"
