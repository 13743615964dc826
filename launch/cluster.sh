# shellcheck shell=bash
# One private Ray cluster for all commands of a script, which ends however the script ends. To be sourced:
#
#     . "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
#     begin_cluster 2                       # with at least 2 CPUs; returns at once, Ray starts meanwhile
#     await_cluster || exit $?              # before the first command that needs it; exports RAY_ADDRESS
#     run_command python launch/sample.py CONFIG.toml || exit $?
#     ...                                   # the cluster ends with the script; end_cluster ends it earlier
#
# A process of its own holds the cluster (python -m coalign.clusters.private_ray), which listens on 127.0.0.1 alone. When
# the script ends or is killed, the holder's input ends. Then the holder ends every process of the cluster and removes its
# folder. The token is fresh and only in the environment. Commands see RAY_ADDRESS and start no cluster of their own; the
# same holds for launch/local.sh inside such a script. run_command runs one command so that Ctrl-C, SIGTERM and SIGHUP
# reach it at once and end the script. Steps of coalign also end when SIGKILL ends the script (they watch COALIGN_SCRIPT).
#
# Sets traps on EXIT, INT, TERM and HUP. A script that has something to do at its end defines a function at_end, which is
# called first.

export COALIGN_SCRIPT=$$
cluster_holder="" command_running=""

begin_cluster() {
    # Ray's own name for the choice of 127.0.0.1 over an address that other machines can reach.
    export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_TOKEN
    RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    unset RAY_AUTH_TOKEN_PATH
    coproc CLUSTER { exec python -P -m coalign.clusters.private_ray "$1"; }
    cluster_holder=$CLUSTER_PID
    exec {cluster_output}<&"${CLUSTER[0]}" # bash closes its own copy when the holder has ended
}

await_cluster() {
    [ -n "$cluster_holder" ] && [ -z "${RAY_ADDRESS:-}" ] || return 0
    local line="" code
    IFS= read -r -t 240 -u "$cluster_output" line
    exec {cluster_output}<&-
    case "$line" in
    *[0-9]:[0-9]*) export RAY_ADDRESS="$line"; return 0 ;;
    error:*) echo "$line" >&2; code=2 ;;
    *) echo "error: the private Ray cluster did not start; set generation.workers=0 to run without Ray" >&2; code=1 ;;
    esac
    end_cluster
    return "$code"
}

end_cluster() {
    [ -n "$cluster_holder" ] || return 0
    local input="${CLUSTER[1]:-}"
    [ -z "$input" ] || exec {input}>&-
    wait "$cluster_holder" 2>/dev/null
    cluster_holder=""
    unset RAY_ADDRESS RAY_AUTH_TOKEN RAY_AUTH_MODE RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER
}

run_command() {
    # In the background, since bash handles a signal only after a command in the foreground has ended. A background
    # command ignores Ctrl-C unless its traps are reset.
    (trap - INT QUIT; exec "$@") &
    command_running=$!
    wait "$command_running"
    local code=$?
    command_running=""
    return "$code"
}

stop_script() {
    trap '' INT TERM HUP
    if [ -n "$command_running" ]; then
        if [ "$1" = INT ]; then # a terminal sends it to the command too
            for _ in {1..50}; do
                kill -0 "$command_running" 2>/dev/null || break
                sleep 0.1
            done
        fi
        kill -TERM "$command_running" 2>/dev/null
        wait "$command_running" 2>/dev/null
    fi
    exit "$2"
}

leave_script() {
    local code=$?
    trap '' INT TERM HUP
    if declare -F at_end >/dev/null; then at_end; fi
    end_cluster
    exit "$code"
}
trap leave_script EXIT
trap 'stop_script INT 130' INT
trap 'stop_script TERM 143' TERM
trap 'stop_script HUP 129' HUP
