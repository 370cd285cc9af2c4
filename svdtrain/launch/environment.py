"""What a process needs to find its peers, and what keeps a compute node without internet quiet."""

from __future__ import annotations

import os
from collections.abc import Mapping

OFFLINE = {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Read by those libraries when they are imported, so they must stand in the environment before Python starts."""

FIRST_PORT, NUM_PORTS = 20000, 20000


def rank_environment(rank: int, size: int, local_rank: int, host: str, job_number: int) -> dict[str, str]:
    """torch.distributed's variables for one process; empty for a single one."""
    if size == 1:
        return {}
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(FIRST_PORT + job_number % NUM_PORTS),
    }


def offline_unless_set(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of OFFLINE that the user has not set otherwise."""
    return {name: value for name, value in OFFLINE.items() if name not in environment}
