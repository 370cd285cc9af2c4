"""Hand a command line of the experiments to submitit: on a Slurm cluster, or in a process of this machine."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CLUSTERS = ("slurm", "local", "debug")
ON_SLURM: dict[str, Any] = {
    "timeout_min": 60,
    "gpus_per_node": 1,
    "cpus_per_task": 16,
    "slurm_additional_parameters": {"requeue": True},
    "slurm_setup": ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],  # srun no longer takes it from sbatch
}
"""As slurm/ssm.sh asks for; where submitit starts processes itself, they see the machine anyway."""
MAX_TIMEOUTS = 100  # each goes on behind the last row, so nothing is lost but what was under way


@dataclass(frozen=True, kw_only=True)
class ExperimentJob:
    """`python -m ssm_blocks.experiments ARGUMENTS` for submitit to call. Picklable."""

    arguments: tuple[str, ...]

    def __call__(self) -> int:
        """Returns 0. Raises RuntimeError where the command fails, so that the job counts as failed."""
        command = [sys.executable, "-m", "ssm_blocks.experiments", *self.arguments]
        code = subprocess.run(command, cwd=ROOT).returncode
        if code:
            raise RuntimeError(f"the experiments ended with exit code {code}; the output says why")
        return code

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """submitit asks at a time limit what to run next: the same, as finished runs are not repeated."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def submit(arguments: list[str], cluster: str, resources: str, folder: Path) -> int:
    """Exit code: 0 submitted (slurm) or finished (local, debug), 1 if the job failed. folder: of submitit's output.

    resources: `name=value,...` in submitit's names. Raises ValueError where the user has to change something.
    """
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("sbatch is not here: submit from a login node, or use --submit local")
    import submitit

    parameters = {**(ON_SLURM if cluster == "slurm" else {}), **parse_resources(resources)}
    limit = {"slurm_max_num_timeout": MAX_TIMEOUTS} if cluster == "slurm" else {}
    executor = submitit.AutoExecutor(folder, cluster=cluster, **limit)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats there what the error below says
            executor.update_parameters(name="ssm", **parameters)
            job = executor.submit(ExperimentJob(arguments=tuple(arguments)))
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ValueError(f"{cluster} does not take the job: {lines[-1] if lines else repr(error)}") from error
    print(f"job {job.job_id}, output in {folder}", flush=True)
    return 0 if cluster == "slurm" else _outcome(job)


def parse_resources(text: str) -> dict[str, int | str]:
    """`timeout_min=60,slurm_partition=gpu` as a dict. Raises ValueError for anything else."""
    found: dict[str, int | str] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if not name or not value:
            raise ValueError(f"--resources {part!r}: write NAME=VALUE,NAME=VALUE with submitit's names")
        found[name] = int(value) if value.isdecimal() else value
    return found


def _outcome(job: Any) -> int:
    try:
        job.results()
    except Exception as error:
        print(f"error: the job failed: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
        return 1
    return 0
