# shellcheck shell=bash
# Sourced by local.sh and ladder.sh: the virtual environment, the devices of this machine, and how training starts on
# them. Reads VENV, RANKS, OMP_NUM_THREADS, DS_ACCELERATOR and CUDA_VISIBLE_DEVICES. Sets the array train_launcher, the
# command that starts the ranks; for one rank it is empty, and the recipe runs by itself.

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
    cores="$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" # these limit what nproc reports
    ranks="${RANKS:-$((cores < 2 ? cores : 2))}"
    # One thread per rank, since more compete for the cores. DeepSpeed need not look for other devices.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
fi
# Given a number of GPUs, the launcher ignores CUDA_VISIBLE_DEVICES. So name the devices where it is set.
gpu_choice=(--num_gpus "$ranks")
if [ "$gpus" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
    gpu_choice=(--include "localhost:$(cut -d, -f "1-$ranks" <<<"$CUDA_VISIBLE_DEVICES")")
fi
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM:-false}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="${RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO:-0}" PYTHONUNBUFFERED=1
train_launcher=()
if [ "$ranks" != 1 ]; then # one rank needs no launcher, which takes seconds per step
    # shellcheck disable=SC2034 # for those who source this
    train_launcher=(python -m deepspeed.launcher.runner "${gpu_choice[@]}" --log_level warning)
fi
