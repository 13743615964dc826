#!/usr/bin/env bash
# The eight steps in order on this machine: training with DeepSpeed ranks, the others with Ray actors in one private
# cluster that serves all of them (cluster.sh).
set -uo pipefail

# In braces, so that bash has read all of it before it begins: the file may change while a long run goes on.
{
usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [CONFIG.toml] [key=value ...]

Runs prepare, paraphrase, sft, sample, judge, rank, align and eval. A step that is complete is passed over; after an
interruption the same command goes on where it stopped. Without a config: configs/default.toml. One private Ray cluster
serves all steps, unless generation.ray_address or RAY_ADDRESS names another.

  RANKS=N             training processes (default: one a visible GPU; without GPUs as many as there are cores, 2 at most)
  OMP_NUM_THREADS=N   threads a process (default without GPUs: 1)
  VENV=FOLDER         virtual environment to use when none is active (default: .venv)

Exit code: 0 done, 2 a mistake to mend (its message is above), 1 anything else.
TEXT
}

for word in "$@"; do
    case "$word" in -h | --help) usage; exit 0 ;; esac
done

launch="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/devices.sh
. "$launch/devices.sh"

fail() {
    echo "local.sh: the step $1 failed (exit code $2); mend it and run the same command again" >&2
    exit "$2"
}

# shellcheck source=launch/cluster.sh
. "$launch/cluster.sh"

# Checks the whole config before anything starts, and leaves out the steps that come from another run (run.inputs).
# Then the workers of a private cluster, 0 when no step is left that needs one.
plan="$(python - "$@" <<'PYTHON'
import os
import sys
from pathlib import Path

try:
    from coalign.runs.step_folder import read_manifest
    from coalign.runs.run_folder import RunFolder
    from coalign.commandline import parse_command_line
    from coalign.config import STEP_TABLES
    from coalign.errors import UserError
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; set up the environment first: make setup")
try:
    config = parse_command_line("local", sys.argv[1:])
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
steps = [step for step in STEP_TABLES if step not in config.run.inputs]
folders = {step: RunFolder(config.run, []).step(step) for step in steps}
if config.eval.folder:
    folders["eval"] = Path(config.eval.folder)
left = {step for step in steps if read_manifest(folders[step]) is None}
generating = left & {"sample", "judge", "eval", *(["paraphrase"] if config.paraphrase.num_wordings else [])}
elsewhere = config.generation.ray_address or os.environ.get("RAY_ADDRESS")
print(*steps)
print(config.generation.workers if generating and not elsewhere else 0)
PYTHON
)" || exit $?
{ read -r steps; read -r workers; } <<<"$plan"

started=$SECONDS
[ "$workers" -eq 0 ] || begin_cluster "$workers"
for step in $steps; do
    echo "== $step"
    case "$step" in
    sft | align)
        launcher=(python)
        if [ "${#train_launcher[@]}" -gt 0 ]; then
            port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"
            launcher=("${train_launcher[@]}" --master_port "$port")
        fi
        run_command "${launcher[@]}" "$launch/$step.py" "$@" || fail "$step" $?
        ;;
    *)
        case "$step" in prepare | rank) ;; *) await_cluster || fail "$step" $? ;; esac
        run_command python "$launch/$step.py" "$@" || fail "$step" $?
        ;;
    esac
done
end_cluster
echo "== done in $((SECONDS - started)) s"
exit 0
}
