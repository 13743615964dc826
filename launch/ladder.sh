#!/usr/bin/env bash
# The experiment: every arm of the design with every seed, shared steps once, one table and one figure.
# launch/ladder.py plans the steps and runs them; this file finds the devices for it and holds one Ray cluster.
set -uo pipefail

# In braces, so that bash has read all of it before it begins: the file may change during a long run.
{
launch="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/devices.sh
. "$launch/devices.sh"
python -c 'import coalign' 2>/dev/null || {
    echo "error: coalign can't be imported; set up the environment first: make setup" >&2
    exit 1
}
export TRAIN_LAUNCHER=""
[ "${#train_launcher[@]}" -eq 0 ] || printf -v TRAIN_LAUNCHER '%q ' "${train_launcher[@]}"
# The workers of a private cluster, 0 when none is needed; ladder.py reports invalid words.
workers="$(python "$launch/remaining.py" ladder "$@")" || workers=0
# shellcheck source=launch/cluster.sh
. "$launch/cluster.sh"
if [ "$workers" -gt 0 ]; then
    begin_cluster "$workers"
    await_cluster || exit $?
fi
run_command python "$launch/ladder.py" "$@"
exit $?
}
