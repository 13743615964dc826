# shellcheck shell=bash
# One private Ray cluster for every command of a script, and an end of it however the script ends. To be sourced:
#
#     . "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"
#     begin_cluster 2                       # at least so many CPUs; returns at once, Ray starts meanwhile
#     await_cluster || exit $?              # when the first command needs it; exports RAY_ADDRESS and a fresh token
#     run_command python launch/sample.py CONFIG.toml || exit $?
#     ...                                   # the cluster ends with the script; end_cluster ends it earlier
#
# A process of its own holds the cluster (python -m coalign.clusters.private_ray): it listens on 127.0.0.1 alone. When its input
# ends, because the script ends or was killed, it ends every process of the cluster and removes its folder. The token is
# only in the environment. Commands see RAY_ADDRESS and start no cluster of their own; launch/local.sh inside such a
# script neither. run_command runs one command so that Ctrl-C, SIGTERM and SIGHUP reach it at once and end the script;
# steps of coalign also end when the script was killed by SIGKILL (they watch COALIGN_SCRIPT).
#
# Sets traps on EXIT, INT, TERM and HUP: a script with something of its own to do at its end does it in a function
# at_end, which is called first.

export COALIGN_SCRIPT=$$
cluster_holder="" command_running=""

begin_cluster() {
    # Ray's own name for the choice of 127.0.0.1 over an address that others can reach.
    export RAY_AUTH_MODE=token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 RAY_AUTH_TOKEN
    RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    unset RAY_AUTH_TOKEN_PATH
    coproc CLUSTER { exec python -P -m coalign.clusters.private_ray "$1"; }
    cluster_holder=$CLUSTER_PID
    exec {cluster_output}<&"${CLUSTER[0]}" # bash closes its own end when the holder has gone
}

await_cluster() {
    [ -n "$cluster_holder" ] && [ -z "${RAY_ADDRESS:-}" ] || return 0
    local line="" code
    IFS= read -r -t 240 -u "$cluster_output" line
    exec {cluster_output}<&-
    case "$line" in
    *[0-9]:[0-9]*) export RAY_ADDRESS="$line"; return 0 ;;
    error:*) echo "$line" >&2; code=2 ;;
    *) echo "error: the private Ray cluster did not start; set generation.workers=0 to do without Ray" >&2; code=1 ;;
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
    # In the background, since bash answers a signal only after a command in the foreground has ended; there bash would
    # let it ignore Ctrl-C.
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
        if [ "$1" = INT ]; then # which a terminal sends to the command too
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
