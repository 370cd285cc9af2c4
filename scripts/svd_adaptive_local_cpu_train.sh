#!/usr/bin/env bash
# Terminal 1 of 2: train a small GPT with adaptive SVD on this machine's CPU. Terminal 2: bash scripts/svd_monitor.sh
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/svd_adaptive_local_cpu_train.sh [--dry-run] [--yes] [flags of svdtrain]

Trains on the CPU with settings that fit this machine, on the Python standard library's own sources unless --data says
otherwise. Every flag of svdtrain works and is stronger than what is chosen here (svdtrain --help lists them).

  --dry-run   check everything, estimate the time, start nothing
  --yes       do not ask, even if it will take more than an hour

What is chosen here: depth 4 (depth 2 below 4 GiB of free memory), 400 steps, an analysis every 20 steps, a checkpoint
every 100, runs/local-<date>-<time>. Meanwhile, in a second terminal:  bash scripts/svd_monitor.sh
TEXT
}

dry_run=0 yes=0
flags=()
for argument in "$@"; do
    case "$argument" in
        -h | --help) usage; exit 0 ;;
        --dry-run) dry_run=1 ;;
        --yes) yes=1 ;;
        *) flags+=("$argument") ;;
    esac
done
source "$(dirname "$0")/_setup.sh"

fail() { echo "svd_adaptive_local_cpu_train: $*" >&2; exit 2; }

# Value of --name VALUE or --name=VALUE among the flags, else the default.
value_of() {
    local name="$1" found="$2" i
    for ((i = 0; i < ${#flags[@]}; i++)); do
        [ "${flags[i]}" = "$name" ] && found="${flags[i + 1]:-}"
        case "${flags[i]}" in "$name="*) found="${flags[i]#*=}" ;; esac
    done
    echo "$found"
}

for name in --depth --num-iterations --total-batch-size; do
    case "$(value_of "$name" 1)" in '' | *[!0-9]*) fail "$name takes a whole number, got '$(value_of "$name" 1)'" ;; esac
done

# An environment that is active already is used as it is; else .venv is made.
if python3 -c 'import torch, tyro, rich' 2>/dev/null; then
    python=python3
else
    setup_environment
    python=.venv/bin/python
fi

free_kib=$(awk '/MemAvailable/ {print $2}' /proc/meminfo 2>/dev/null || true)
free_gib=$((${free_kib:-8388608} / 1048576))
default_depth=4
[ "$free_gib" -lt 4 ] && default_depth=2
[ "$free_gib" -lt 1 ] && fail "only $free_gib GiB of memory are free; depth 2 needs about 1"
disk_mib=$(df -Pm . | awk 'NR == 2 {print $4}')
[ "$disk_mib" -lt 1024 ] && fail "only $disk_mib MiB of disk are free here; checkpoints need about 1024"

depth=$(value_of --depth "$default_depth")
steps=$(value_of --num-iterations 400)
batch=$(value_of --total-batch-size 2048)
run=$(value_of --run-dir "runs/local-$(date +%Y%m%d-%H%M%S)")
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')

# Multiplications a second of this machine, from half a second of products of matrices as training has them: on one
# core and the best of many, because other programs get in between.
seconds=$("$python" - "$depth" "$steps" "$batch" "$cores" <<'PY'
import sys, time
import torch
from svdtrain.config import scaling_parameters

depth, steps, batch, cores = map(int, sys.argv[1:])
torch.set_num_threads(1)
a, b = torch.randn(512, 64 * depth), torch.randn(64 * depth, 256 * depth)
best, began = float("inf"), time.perf_counter()
while time.perf_counter() - began < 0.5:
    start = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - start)
flops = cores * 2 * a.shape[0] * a.shape[1] * b.shape[1] / best
# 6 operations a parameter and token; whole steps reach a quarter (depth 4) to a tenth (depth 2) of a bare product.
print(int(steps * batch * 6 * scaling_parameters(depth, 4096) / (flops / 6)))
PY
)
human() { [ "$1" -ge 3600 ] && echo "$(($1 / 3600)) h $(($1 % 3600 / 60)) min" || echo "$(($1 / 60)) min $(($1 % 60)) s"; }

echo "machine: $cores cores, $free_gib GiB of memory free, $disk_mib MiB of disk free"
echo "run:     depth $depth, $steps steps of $batch tokens, in $run"
echo "time:    about $(human "$seconds") (a guess within a factor of two; the progress line soon knows better)"
echo "watch:   bash scripts/svd_monitor.sh $run        (in a second terminal)"
[ "$dry_run" = 1 ] && exit 0
if [ "$seconds" -gt 3600 ] && [ "$yes" = 0 ] && [ -t 0 ]; then
    read -r -p "start? [y/N] " answer
    case "$answer" in y* | Y*) ;; *) exit 0 ;; esac
fi

# The user's flags come last and win.
exec "$python" -m svdtrain.cli --device cpu --depth "$depth" --num-iterations "$steps" --total-batch-size "$batch" \
    --svd-interval 20 --save-every 100 --run-dir "$run" ${flags[@]+"${flags[@]}"}
