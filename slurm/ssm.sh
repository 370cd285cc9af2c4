#!/usr/bin/env bash
# The state-space experiments on one GPU; arguments go to `python -m ssm_blocks.experiments`.
#
#   sbatch slurm/ssm.sh s5 --seeds 3
#   sbatch -p PARTITION -A ACCOUNT slurm/ssm.sh all --parallel 12
#
# Rows are kept in SVDTRAIN_RUN_DIR (results/ssm): a job that was cut off goes on when submitted again.
#SBATCH --job-name=ssm
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=16
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
source "${SLURM_SUBMIT_DIR:-.}/slurm/_env.sh" || exit 2
[ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a Slurm job; submit with: sbatch slurm/$(basename "$0")"
cd "$SLURM_SUBMIT_DIR" && [ -d ssm_blocks ] || fail "submit from the root of the repository: cd THERE && sbatch slurm/..."
[ "$#" -gt 0 ] || fail "name the experiments, for example: sbatch slurm/ssm.sh s5 --seeds 3"
python="${SVDTRAIN_PYTHON:-.venv/bin/python}"
command -v "$python" >/dev/null || python=python3
exec srun "$python" -m ssm_blocks.experiments "$@" --out "${SVDTRAIN_RUN_DIR:-results/ssm}"
