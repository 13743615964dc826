#!/usr/bin/env bash
# The eight steps in order on this machine: training with DeepSpeed ranks, the others with Ray actors in one private
# cluster that serves all of them (cluster.sh).
set -uo pipefail

# In braces, so that bash has read all of it before it begins: the file may change during a long run.
{
usage() {
    cat <<'TEXT'
usage: bash launch/local.sh [CONFIG.toml] [key=value ...]

Runs prepare, paraphrase, sft, sample, judge, rank, align and eval. A step that is complete is skipped; after an
interruption the same command resumes. Without a config: configs/tiny.toml. One private Ray cluster
serves all steps, unless generation.ray_address or RAY_ADDRESS names another.

  RANKS=N             training processes (default: one per visible GPU; without GPUs one per core, 2 at most)
  OMP_NUM_THREADS=N   threads per process (default without GPUs: 1)
  VENV=FOLDER         virtual environment to use when none is active (default: .venv)

Exit status: 0 done, 2 invalid input or settings (the message is above), 1 anything else.
TEXT
}

for word in "$@"; do
    case "$word" in -h | --help) usage; exit 0 ;; esac
done

launch="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/devices.sh
. "$launch/devices.sh"

fail() {
    echo "local.sh: the step $1 failed (exit status $2); fix the error and run the same command again" >&2
    exit "$2"
}

# shellcheck source=launch/cluster.sh
. "$launch/cluster.sh"

# Checks the whole config before anything starts. Steps that come from another run (run.inputs) are left out; a private
# cluster holds the workers, 0 when no step is left that needs one.
plan="$(python "$launch/remaining.py" local "$@")" || exit $?
{ read -r steps; read -r workers; } <<<"$plan"

started=$SECONDS
[ "$workers" -eq 0 ] || begin_cluster "$workers"
for step in $steps; do
    echo "== $step"
    case "$step" in
    sft | align)
        launcher=(python)
        if [ "${#train_launcher[@]}" -gt 0 ]; then
            port="$(python -c 'from coalign.process import free_port; print(free_port())')"
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
