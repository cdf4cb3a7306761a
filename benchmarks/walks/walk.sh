# Sourced by the walks: an empty working directory, and functions that run a command as a user types it.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
mkdir -p "${1:?usage: $0 DIRECTORY [...]}"
cd "$1"
[ -z "$(ls -A)" ] || { echo "$1: not empty" >&2; exit 1; }
export HF_HUB_OFFLINE=1

run() { python3 "$here/run.py" -- "$@"; }
fails() { python3 "$here/run.py" --expect "$1" -- "${@:2}"; }
