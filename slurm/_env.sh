# Sourced by the batch scripts: `run_svdtrain FLAGS...` trains, saves before the time limit, and requeues the job.
#
# Set these before sbatch where the defaults do not fit:
#   SVDTRAIN_RUN_DIR   run directory, shared by all nodes     (runs/<job name>-<job id>)
#   SVDTRAIN_PYTHON    Python with svdtrain's dependencies    (.venv/bin/python, else python3)
#   SVDTRAIN_CACHE     tokenised text, shared by all nodes    (~/.cache/svdtrain)
#   WANDB_MODE, HF_HUB_OFFLINE, HF_DATASETS_OFFLINE           (offline: compute nodes often have no internet)

export WANDB_MODE="${WANDB_MODE:-offline}"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"
export HF_DATASETS_OFFLINE="${HF_DATASETS_OFFLINE:-1}"
export PYTHONUNBUFFERED=1
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun no longer takes it from sbatch
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}"
fi

PREEMPTED=85       # svdtrain: everything is saved
KILLED_BY_USR2=140 # the signal came while Python was still starting: there was nothing to save

fail() {
    echo "$(basename "$0"): error: $*" >&2
    exit 2
}

run_svdtrain() {
    local python run code=0 restart="${SLURM_RESTART_COUNT:-0}"
    [ -n "${SLURM_JOB_ID:-}" ] || fail "not inside a Slurm job; submit with: sbatch slurm/$(basename "$0")"
    cd "$SLURM_SUBMIT_DIR" || fail "cannot enter $SLURM_SUBMIT_DIR"
    [ -d svdtrain ] || fail "submit from the root of the repository: cd THERE && sbatch slurm/..."
    python="${SVDTRAIN_PYTHON:-.venv/bin/python}"
    command -v "$python" >/dev/null || python=python3
    run="${SVDTRAIN_RUN_DIR:-runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}"
    mkdir -p "$run" || fail "cannot write $run; set SVDTRAIN_RUN_DIR to a directory that all nodes share"

    MASTER_ADDR=127.0.0.1 # on one node: works even where nodes cannot resolve their own names
    if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
        MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
    fi
    export MASTER_ADDR MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"

    # The first start copies the code; a requeue runs that copy, whatever the checkout looks like by then.
    "$python" -m svdtrain.launch.progress "$run" "$restart" || exit "$?"
    "$python" -m svdtrain.launch.snapshot "$run" "$@" >/dev/null || fail "cannot copy the code into $run"
    srun --kill-on-bad-exit=1 "$python" "$run/code/train.py" "$@" --run-dir "$run" --resume auto || code=$?

    if [ "$code" -eq "$PREEMPTED" ] || [ "$code" -eq "$KILLED_BY_USR2" ]; then
        echo "preempted (restart $restart); requeueing job $SLURM_JOB_ID"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$code"
}
