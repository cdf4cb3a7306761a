#!/usr/bin/env bash
# Download into DIR every wheel that `launch/quickstart.sh --offline-wheels DIR` needs on a similar machine. With
# --beside-torch, download only the wheels missing on a GPU machine that has Python 3.x, PyTorch for CUDA, transformers,
# accelerate, pyarrow, tensorboard and typer (12 wheels, 12 MB).
set -euo pipefail
usage="usage: launch/wheelhouse.sh DIR [--beside-torch 3.12 | pip options, such as --index-url URL for torch]"
directory=$(realpath -m "${1:?$usage}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" -m venv .venv-wheelhouse
trap 'rm -rf .venv-wheelhouse' EXIT
pip=(.venv-wheelhouse/bin/pip --quiet)
if [ "${2:-}" = --beside-torch ]; then
  version=${3:?$usage}
  platforms=()
  for glibc in 2_39 2_34 2_31 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  # DeepSpeed publishes no wheels; its operators are compiled on the target machine.
  DS_BUILD_OPS=0 "${pip[@]}" wheel --wheel-dir "$directory" --no-deps "$(grep '^deepspeed==' constraints.txt)"
  # Omitted: datasets with dill and multiprocess, needed only for Hub documents, which require a network.
  lacks='annotated-types|backports.zstd|fastokens|ffbpe|hjson|isal|msgspec|pydantic|pydantic_core|typing-inspection|typing_extensions'
  mapfile -t packages < <(grep -E "^($lacks)==" constraints.txt)
  "${pip[@]}" download --dest "$directory" --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "${packages[@]}"
  exit
fi
wheel=("${pip[@]}" wheel --wheel-dir "$directory" --constraint constraints.txt)
"${wheel[@]}" "${@:2}" torch
# This package is installed from the tree; its own wheel is removed below, but building it requires setuptools.
"${wheel[@]}" --find-links "$directory" setuptools '.[test]'
rm -f "$directory"/codeparrot_ds-*.whl
