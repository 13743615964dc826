#!/usr/bin/env bash
# Queues the steps of a pipeline that are missing, each after the one before it. --help says how; launch/submit.py does it.
set -uo pipefail

root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
venv="${VENV:-$root/.venv}"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$venv/bin/python" ]; then
    VIRTUAL_ENV="$(cd "$venv" && pwd)"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" # the jobs use it as well
fi
exec python "$root/launch/submit.py" "$@"
