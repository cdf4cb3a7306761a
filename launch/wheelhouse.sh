#!/usr/bin/env bash
# Fill DIR with every wheel that `launch/quickstart.sh --offline-wheels DIR` needs on a machine like this one.
set -euo pipefail
directory=$(realpath -m "${1:?usage: launch/wheelhouse.sh DIR [pip options, such as --index-url URL for torch]}")
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" -m venv .venv-wheelhouse
trap 'rm -rf .venv-wheelhouse' EXIT
wheel=(.venv-wheelhouse/bin/pip wheel --quiet --wheel-dir "$directory" --constraint constraints.txt)
"${wheel[@]}" "${@:2}" torch
# setuptools builds this package itself, which is installed from the tree and so leaves no wheel here.
"${wheel[@]}" --find-links "$directory" setuptools '.[test]'
rm -f "$directory"/codeparrot_ds-*.whl
