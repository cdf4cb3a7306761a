#!/usr/bin/env bash
# From a clone to a trained and converted model, on this machine's own Python source. Run it again to resume.
# Options (--fresh, --offline-wheels DIR, --torch-index URL): launch/bootstrap.py --help
set -euo pipefail

run() { local line; printf -v line '%q ' "$@"; printf '\n$ %s\n' "${line% }"; "$@"; }

"${PYTHON:-python3}" "$(dirname "$0")/bootstrap.py" "$@"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
data=runs/quickstart-data
model=runs/quickstart/hf

run codeparrot-ds corpus collect --installed-python --max-file-size 32kB --sample 30MB -o $data/raw
run codeparrot-ds corpus clean $data/raw -o $data/corpus
run codeparrot-ds tokenizer train $data/corpus --vocab-size 8192 --max-seq-len 256 -o $data/tokenizer
run codeparrot-ds shards build $data/corpus --tokenizer $data/tokenizer --valid-fraction 0.02 -o $data/shards
run codeparrot-ds shards verify $data/shards --deep
run codeparrot-ds launch launch/recipes/quickstart.yaml
run codeparrot-ds convert runs/quickstart $model
run codeparrot-ds complete $model --num 1 \
  $'# the area of a rectangle\ndef area(width, height):' \
  $'import numpy as np\n\n# the mean of a list of values\ndef mean(values):'
run codeparrot-ds report runs/quickstart --model $model --tokenizer $data/tokenizer \
  --seconds $SECONDS --summary runs/quickstart/summary.json

cat <<END

What to do next:
  complete your own prompt     codeparrot-ds complete $model 'def main():'
  watch the curves             tensorboard --logdir runs/quickstart/tensorboard
  train CodeParrot itself      launch/recipes/codeparrot-small.yaml, launch/recipes/codeparrot-xl.yaml
  train on your own code       codeparrot-ds corpus collect DIRECTORY -o data/corpus
(first: export PATH=$PWD/.venv/bin:\$PATH)
END
