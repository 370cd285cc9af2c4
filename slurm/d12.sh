#!/usr/bin/env bash
# Depth 12 on one node with 8 GPUs: about an hour. Further arguments go to svdtrain.
#SBATCH --job-name=svdtrain-d12
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@180
set -uo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/_env.sh" || exit 2
run_svdtrain --preset d12 --save-every 500 "$@"
