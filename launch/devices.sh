# shellcheck shell=bash
# Sourced by local.sh and ladder.sh: the virtual environment, the devices of this machine, and how training starts on
# them. Reads VENV, RANKS, OMP_NUM_THREADS, DS_ACCELERATOR and CUDA_VISIBLE_DEVICES; sets the array train_launcher, which
# is empty for one rank: that is the recipe alone.

venv="${VENV:-.venv}"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$venv/bin/python" ]; then
    PATH="$(cd "$venv/bin" && pwd):$PATH"
    export PATH
fi

gpus=0
if command -v nvidia-smi >/dev/null 2>&1; then
    gpus="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
    if [ "${CUDA_VISIBLE_DEVICES-unset}" = -1 ]; then
        gpus=0
    elif [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '[^[:space:]]' || true)"
    fi
fi
if [ "$gpus" -gt 0 ]; then
    ranks="${RANKS:-$gpus}"
else
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # nproc counts no more than these say
    ranks="${RANKS:-$((cores < 2 ? cores : 2))}"
    # One thread a rank: more of them fight over the cores, and DeepSpeed need not look for other devices.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
# The launcher forgets CUDA_VISIBLE_DEVICES when it is given a number, so name the devices then.
gpu_choice=(--num_gpus "$ranks")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpu_choice=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}" PYTHONUNBUFFERED=1
train_launcher=()
if [ "$ranks" != 1 ]; then # the launcher takes seconds to start, twice
    # shellcheck disable=SC2034 # for those who source this
    train_launcher=(python -m deepspeed.launcher.runner "${gpu_choice[@]}" --log_level warning)
fi
