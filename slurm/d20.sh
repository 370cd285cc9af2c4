#!/usr/bin/env bash
# The run this method was designed for: depth 20 (561M parameters), 21,400 steps of 524,288 tokens of FineWeb-Edu.
#
#   sbatch slurm/d20.sh                                  one node with 8 GPUs
#   sbatch --nodes=2 slurm/d20.sh                        the same over two nodes
#   sbatch -p PARTITION -A ACCOUNT slurm/d20.sh --preset d20-2026
#
# Further arguments go to svdtrain. Before the first run: docs/CLUSTER.md.
#SBATCH --job-name=svdtrain-d20
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR2@180
set -uo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/_env.sh" || exit 2
run_svdtrain --preset d20 --save-every 500 "$@"
