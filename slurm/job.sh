# shellcheck shell=bash
# Sourced by the job scripts in this folder: what a job does before and after its step.
#
#     begin_job STEP [CONFIG.toml] [key=value ...]   # environment, temporary folder, preflight on every node
#     run COMMAND...                                 # the step; a signal to stop reaches it
#     end_job                                        # exit, or requeue
#
# begin_job sets step, words, job, attempt, nodes, ranks, python, port and address. Exit status 2 of a step means a user
# error: the job fails. The job is requeued when it was told to stop (USR1 before the time limit, TERM when it is
# preempted) and when one of its nodes no longer answers. Ctrl-C, in an allocation of salloc, stops it for good.
set -uo pipefail

fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

stopping="" work="" code=0 ray="" made="" mistake=""

begin_job() {
    [ $# -gt 0 ] || fail "no step was named; usage: slurm/$(basename "$0") STEP [CONFIG.toml] [key=value ...]" 2
    step="$1" words=("${@:2}") job="$SLURM_JOB_ID" attempt="${SLURM_RESTART_COUNT:-0}"
    export COALIGN_TMP="/tmp/coalign-job$job.$attempt" # on every node, where each process makes its own part
    trap 'stop USR1' USR1
    trap 'stop TERM' TERM
    trap 'stop INT' INT HUP
    trap leave EXIT
    check_step
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    count_ranks
    # The shell of salloc may run on the login node. Continue on the first node, where Ray's driver must run.
    [ -n "${SLURMD_NODENAME:-}" ] || COALIGN_HOP="$job $ranks" exec srun --interactive --quit-on-interrupt \
        --preserve-env --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" bash "$0" "$@"
    echo "== $step, job $job on ${nodes[*]}$([ "$attempt" = 0 ] || echo ", requeued $attempt times")"

    [ -n "${COALIGN_ROOT:-}" ] || read_settings
    [ -z "${COALIGN_MODULES:-}" ] || load_modules
    choose_python

    # Since Slurm 22.05 srun no longer takes the job's CPUs per task. Ranks fill one node after another. A job that was
    # submitted with --export=NONE would pass no variables on.
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" SLURM_DISTRIBUTION=block SLURM_EXPORT_ENV=ALL
    export COALIGN_NODES="${nodes[*]}" COALIGN_START_SECONDS="${COALIGN_START_SECONDS:-300}"
    export COALIGN_RANKS_PER_NODE="$ranks"
    # A node that was cut off may still run the step that this attempt takes over.
    [ "$attempt" = 0 ] || export COALIGN_LOCK_WAIT_SECONDS="$COALIGN_START_SECONDS"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
    export RAY_USAGE_STATS_ENABLED=0 RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0
    unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT RAY_ADDRESS # inherited from the shell that submitted this job
    unset TMPDIR # else srun's tasks would make this folder on every node
    make_folders
    preflight
}

# Each script runs only its own kind of step: as ranks, a step that generates would write the same files several times.
# The lists are those of coalign.steps; a test compares them.
check_step() {
    local own generating="paraphrase sample judge eval"
    case "$(basename "${COALIGN_JOB_SCRIPT:-$0}")" in
    deepspeed.sbatch) own="sft align" ;;
    ray.sbatch) own="$generating" ;;
    *) own="prepare rank $generating" ;;
    esac
    case " $own " in *" $step "*) ;; *) fail "this script runs one of: $own; for another step use the script that \
docs/running.md names, or slurm/pipeline.sh --only $step" 2 ;; esac
}

count_ranks() {
    ranks="${SLURM_NTASKS_PER_NODE:-${SLURM_TASKS_PER_NODE%%[!0-9]*}}"
    case "${COALIGN_HOP:-}" in "$job "*) ranks="${COALIGN_HOP#* }" ;; esac # srun's own variables count this one task
}

# Exports the table [slurm]. pipeline.sh passes it on; a job made by sbatch or salloc reads it from the config here.
read_settings() {
    local venv="${VIRTUAL_ENV:-${VENV:-$root/.venv}}" found name value
    found="$(PATH="$venv/bin:$PATH" python "$root/launch/submit.py" --settings "${words[@]}")"
    case $? in
    0) ;;
    2) exit 2 ;; # it has printed why
    *) fail "the table [slurm] can't be read on ${nodes[0]}; activate the environment first, or use slurm/pipeline.sh" 2 ;;
    esac
    while IFS="=" read -r name value; do export "$name=$value"; done <<<"$found"
}

# Where the submitting shell had no `module`, the system's files define it. All of this reads unset variables.
load_modules() {
    local place name
    set +u
    for place in "$LMOD_PKG/init/bash" "$MODULESHOME/init/bash" /etc/profile.d/{lmod,z00_lmod,modules}.sh; do
        type module >/dev/null 2>&1 && break
        # shellcheck source=/dev/null
        [ ! -r "$place" ] || . "$place"
    done
    type module >/dev/null 2>&1 || fail "${nodes[0]} has no command \`module\`, which slurm.modules needs" 2
    for name in $COALIGN_MODULES; do module load "$name" || fail "the module $name can't be loaded" 2; done
    set -u
}

# Sets python, a command: inside slurm.container its own or that of slurm.venv; else that of a virtual environment.
choose_python() {
    local venv="${COALIGN_VENV:-}"
    if [ -n "${COALIGN_CONTAINER:-}" ]; then
        read -ra python <<<"$COALIGN_CONTAINER"
        python+=("${venv:+$venv/bin/}python")
        return
    fi
    python=(python)
    [ -n "$venv" ] || [ -n "${VIRTUAL_ENV:-}" ] || venv="${VENV:-$root/.venv}"
    if [ -x "$venv/bin/python" ]; then
        export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
    elif [ -n "${COALIGN_VENV:-}" ]; then
        fail "${nodes[0]} sees no $venv/bin/python; set slurm.venv to an environment that every node sees" 2
    fi
}

make_folders() {
    local folder
    for folder in /tmp/coalign-job*.batch; do # of scripts that were killed
        [ -O "$folder" ] && [ ! -d "/proc/$(cat "$folder/holder" 2>/dev/null)" ] && rm -rf "$folder"
    done
    mkdir -p logs || fail "no folder logs/ can be made in $PWD"
    mkdir -m 700 "$COALIGN_TMP.batch" || fail "no temporary folder; does another step run in this allocation?"
    made=yes
    echo $$ >"$COALIGN_TMP.batch/holder"
}

preflight() {
    local found run
    # Not by srun, which may not reach a node. Such a start must count too, or the job would be requeued for ever.
    timeout --kill-after=10 "$COALIGN_START_SECONDS" \
        "${python[@]}" "$root/launch/preflight.py" --count "$step" "${words[@]}" >/dev/null || exit
    each_node=(srun --nodes="${#nodes[@]}" --ntasks="${#nodes[@]}" --ntasks-per-node=1 --kill-on-bad-exit=1)
    found="$(timeout --kill-after=10 "$COALIGN_START_SECONDS" "${each_node[@]}" \
        "${python[@]}" "$root/launch/preflight.py" "$step" "${words[@]}")"
    code=$?
    [ "$code" -ne 124 ] || echo "error: the nodes were not checked within $COALIGN_START_SECONDS s (slurm.start_seconds)" >&2
    [[ $'\n'"$found"$'\n' != *$'\nmistake\n'* ]] || mistake=yes # srun may report how it ended the others
    [ -z "$stopping" ] || code=1
    [ "$code" -eq 0 ] || end_job
    # shellcheck disable=SC2034 # for those who source this
    read -r port address run <<<"$(tail -n 1 <<<"$found")"
    rm -f "$run/.seen-$job-$attempt"
}

stop() {
    stopping="$1"
    echo "== $step, job $job is told to stop by $1"
    [ -z "$work" ] || pass_on "$1"
}

# Asks the step to stop. srun passes USR1 on to its tasks, but on TERM it would kill them; Slurm sends them TERM itself.
pass_on() {
    if [ "$work_is_srun" = yes ]; then
        [ "$1" = TERM ] || kill -USR1 "$work" 2>/dev/null
    else
        kill -TERM "$work" 2>/dev/null
    fi
}

run() {
    if [ "$1" = srun ]; then
        work_is_srun=yes
        "$@" &
    else
        work_is_srun=no
        COALIGN_SCRIPT=$$ TMPDIR="$COALIGN_TMP.batch" "$@" & # it ends when this script is killed
    fi
    work=$!
    [ -z "$stopping" ] || pass_on "$stopping" # it was told to stop before the step had started
    while kill -0 "$work" 2>/dev/null; do # a signal interrupts wait
        wait -n "$work" ${ray:+"$ray"}
        if [ -n "$ray" ] && ! kill -0 "$ray" 2>/dev/null; then
            ray=""
            [ -n "$stopping" ] || is_preempted ||
                echo "error: Ray has ended on a node, see logs/ray-$job-*.log; the step is stopped" >&2
            kill -TERM "$work" 2>/dev/null
        fi
    done
    wait "$work"
    code=$?
    work=""
    [ ! -e "$COALIGN_TMP.batch/mistake" ] || mistake=yes
}

# Prints the nodes of this job on which nothing can be started.
lost_nodes() {
    local node
    for node in "${nodes[@]}"; do
        (timeout --kill-after=5 30 srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist="$node" true \
            >/dev/null 2>&1 || echo "$node") &
    done
    wait
}

# Whether Slurm wants the nodes for another job. When the grace time begins it signals the job's steps, not this script.
# No pipe to grep -q: it may end scontrol by SIGPIPE, which pipefail would take for "no".
is_preempted() { [[ "$(scontrol show job "$job")" =~ [^a-zA-Z]PreemptTime=[0-9] ]]; }

requeue_job() {
    end_ray
    # A job that somebody has cancelled must not come back. One that Slurm has requeued already needs no help, and may be
    # running again by the time this script knows.
    [[ "$(scontrol show job "$job") " =~ Restarts=${attempt}[[:space:]] ]] || exit 1
    case "$(squeue --noheader --jobs="$job" --format="%T %r")" in
    RUNNING*) ;;
    *TimeLimit) fail "the time limit came before $step had saved its work; raise slurm.warn_seconds and submit again" ;;
    *) exit 1 ;;
    esac
    [[ "$(scontrol show job "$job")" =~ Requeue=1 ]] ||
        fail "$1; the job may not be requeued (--no-requeue): submit the step again and it continues"
    echo "== $step, job $job is requeued: $1"
    scontrol requeue "$job"
    # Slurm ends this script, and often scontrol too; only status 1, from scontrol itself, means a refusal.
    [ $? -ne 1 ] || fail "Slurm does not requeue job $job; submit the step again and it continues"
    exit 0
}

end_job() {
    local lost
    case "$code" in
    0) exit 0 ;;
    2) exit 2 ;;
    esac
    [ "$stopping" != INT ] || exit 130
    [ -n "$stopping" ] || ! is_preempted || stopping="TERM, since it is preempted"
    [ -z "$stopping" ] || requeue_job "told to stop by $stopping"
    lost="$(lost_nodes | sort | paste -sd' ')"
    [ -z "$lost" ] || requeue_job "no answer from $lost"
    [ -z "$mistake" ] || exit 2 # only now: a lost node makes the others report errors that are none
    echo "error: the step $step failed (exit status $code)" >&2
    exit "$code"
}

# srun passes USR2 on to tasks that have started; TERM would kill slurm_ray_node before it has cleaned up.
end_ray() {
    [ -n "$ray" ] || return 0
    local tries
    for tries in {1..200}; do
        [ $((tries % 10)) -ne 1 ] || kill -USR2 "$ray" 2>/dev/null
        kill -0 "$ray" 2>/dev/null || break
        sleep 0.1
    done
    kill -TERM "$ray" 2>/dev/null
    wait "$ray"
    ray=""
}

leave() {
    trap '' USR1 TERM INT HUP
    end_ray
    [ -z "$made" ] || rm -rf "$COALIGN_TMP.batch"
}
