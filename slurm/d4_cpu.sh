#!/usr/bin/env bash
# Depth 4 on the CPU, on text that is already there: tries out a cluster in minutes. Further arguments go to svdtrain.
#SBATCH --job-name=svdtrain-d4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@60
set -uo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/_env.sh" || exit 2
run_svdtrain --preset d4 --device cpu --save-every 50 "$@"
