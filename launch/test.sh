#!/usr/bin/env bash
# Install the test dependencies and run the tests, three files in parallel on two cores, because many tests wait.
# Arguments go to pytest, e.g. -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."

"${PYTHON:-python3}" launch/bootstrap.py --test
unset PYTHONDONTWRITEBYTECODE # set in many containers; hundreds of processes would recompile this package
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1
exec python -m pytest -n "${TEST_WORKERS:-3}" --dist loadfile --no-loadscope-reorder "$@"
