#!/usr/bin/env bash
# Fill a directory with every wheel that `launch/quickstart.sh --offline-wheels DIR` needs on a machine like this one.
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:?usage: launch/wheelhouse.sh DIR}

# setuptools builds this package itself; pip wants it as a wheel too.
python3 -m pip wheel --wheel-dir "$directory" --constraint constraints.txt torch
python3 -m pip wheel --wheel-dir "$directory" --constraint constraints.txt setuptools '.[test]'
rm -f "$directory"/codeparrot_ds-*.whl
