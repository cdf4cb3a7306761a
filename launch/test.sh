#!/usr/bin/env bash
# Set up what the tests need and run them, two files at a time. Arguments go to pytest: ./launch/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" launch/bootstrap.py --test
unset PYTHONDONTWRITEBYTECODE # set in many containers; hundreds of processes would compile this package again
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder "$@"
