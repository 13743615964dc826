#!/usr/bin/env bash
# One rank of a training step, started by srun on its node: sets its rank, makes and removes its temporary folder.
set -uo pipefail

export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="$COALIGN_RANKS_PER_NODE" TMPDIR="$COALIGN_TMP.rank$SLURM_PROCID"

# Folders of ranks that were killed, by a time limit or a crash.
for folder in /tmp/coalign-job*.rank*; do
    [ -O "$folder" ] && [ ! -d "/proc/$(cat "$folder/holder" 2>/dev/null)" ] && rm -rf "$folder"
done
mkdir -m 700 "$TMPDIR" && echo $$ >"$TMPDIR/holder" || exit 1
trap 'rm -rf "$TMPDIR"' EXIT

# A signal may reach this shell alone or the rank as well; twice does no harm.
"$@" &
rank=$!
trap 'kill -USR1 "$rank" 2>/dev/null' USR1
trap 'kill -TERM "$rank" 2>/dev/null' TERM
while :; do
    wait "$rank"
    code=$?
    kill -0 "$rank" 2>/dev/null && continue
    # srun may report how it ended the other ranks, so job.sh looks for this file on the first node.
    [ "$code" -ne 2 ] || touch "$COALIGN_TMP.batch/mistake" 2>/dev/null
    exit "$code"
done
