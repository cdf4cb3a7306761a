#!/usr/bin/env bash
# From a clone to a trained and converted model, on this machine's own Python source. Run it again to resume.
# Options (--fresh, --offline-wheels DIR, --torch-index URL): launch/bootstrap.py --help
set -euo pipefail

times=() # microseconds and name of each part
timed() { local part=$1 start=${EPOCHREALTIME/[^0-9]/}; "${@:2}"; times+=("$((${EPOCHREALTIME/[^0-9]/} - start)) $part"); }
run() { local line; printf -v line '%q ' "${@:2}"; printf '\n$ %s\n' "${line% }"; timed "$@"; }

timed install "${PYTHON:-python3}" "$(dirname "$0")/bootstrap.py" "$@"
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
data=runs/quickstart-data
model=runs/quickstart/hf

run collect codeparrot-ds corpus collect --installed-python --max-file-size 32kB --sample 30MB -o $data/raw
run clean codeparrot-ds corpus clean $data/raw -o $data/corpus
run tokenizer codeparrot-ds tokenizer train $data/corpus --vocab-size 8192 --max-seq-len 256 -o $data/tokenizer
run shards codeparrot-ds shards build $data/corpus --tokenizer $data/tokenizer --valid-fraction 0.02 -o $data/shards
run verify codeparrot-ds shards verify $data/shards --deep
run train codeparrot-ds launch launch/recipes/quickstart.yaml
run convert codeparrot-ds convert runs/quickstart $model
run complete codeparrot-ds complete $model --num 3 --temperature 0.7 --top-p 0.9 --max-new-tokens 48 \
  $'# the area of a rectangle\ndef area(width, height):' $'class Point:\n    def __init__(self, x, y):'
run report codeparrot-ds report runs/quickstart --seconds $SECONDS \
  --summary runs/quickstart/summary.json -o runs/quickstart/report.html

printf '%s\n' "${times[@]}" | LC_ALL=C awk '{ time[NR] = $1 / 1e6; part[NR] = $2; sum += $1 / 1e6 }
  END { print "\n seconds  share"; for (i = 1; i <= NR; i++) printf "%8.1f  %4.0f%%  %s\n", time[i], 100 * time[i] / sum, part[i] }'
cat <<END

What to do next:
  complete your own prompt     codeparrot-ds complete $model 'def main():'
  see the curves               runs/quickstart/report.html, in a browser
  train CodeParrot itself      launch/recipes/codeparrot-small.yaml, launch/recipes/codeparrot-xl.yaml
  train on your own code       codeparrot-ds corpus collect DIRECTORY -o data/corpus
(first: export PATH=$PWD/.venv/bin:\$PATH)
END
