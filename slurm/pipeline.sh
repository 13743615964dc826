#!/usr/bin/env bash
# Queues the missing steps of a pipeline, each after the one before it, by launch/submit.py. --help explains the options.
set -uo pipefail

root="$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)"
venv="${VENV:-$root/.venv}"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$venv/bin/python" ]; then
    VIRTUAL_ENV="$(cd "$venv" && pwd)"
    export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" # the jobs use it as well
fi
exec python "$root/launch/submit.py" "$@"
