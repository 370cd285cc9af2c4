"""The ranks of a run: who we are, and agreement on decisions. All no-ops for one process.

Ranks come from torchrun (RANK, WORLD_SIZE ...) or straight from srun (SLURM_PROCID ...), one task per device. Every
collective has a time limit, and its failure is a RankLostError: a run with a dead rank ends, it does not hang.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from svdtrain.trainer.errors import RankLostError
from svdtrain.trainer.lifeline import Lifeline

T = TypeVar("T")

COLLECTIVE_TIMEOUT_S = float(os.environ.get("SVDTRAIN_COLLECTIVE_TIMEOUT_S", "600"))
PREPARATION_TIMEOUT_S = 24 * 3600.0  # rank 0 may tokenise a large corpus while the others wait
FIRST_PORT, NUM_PORTS = 20000, 20000


@dataclass(frozen=True)
class World:
    """This process among the others.

    `control_group` is a CPU (gloo) group for bookkeeping in the main thread, `save_group` another one for the thread
    that writes checkpoints: two threads must not interleave their messages in one group.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control_group: Any = None
    save_group: Any = None
    store: Any = None
    lifeline: Lifeline | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def let_go(self) -> None:
        """This rank is about to leave with an error of its own: the loss of others is no news any more."""
        if self.lifeline is not None:
            self.lifeline.let_go()


def init_world(device_type: str, on_loss: Callable[[str], Any] | None = None) -> World:
    """Join the process group that torchrun or srun announced in the environment; a world of one without it.

    `on_loss` is called in another thread, with a message, when another rank's process is gone: see Lifeline. Raises
    RankLostError where the ranks do not all meet in time, ValueError for an incomplete environment.
    """
    announce_slurm_step()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    store: Any = None
    with collective(f"meeting of {size} ranks at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"):
        if not dist.is_initialized():
            backend = "nccl" if device_type == "cuda" else "gloo"
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        control_group = dist.new_group(backend="gloo", timeout=timeout)
        save_group = dist.new_group(backend="gloo", timeout=timeout)
        lifeline = Lifeline(dist.get_rank(), dist.get_world_size(), on_loss) if on_loss else None
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return World(dist.get_rank(), dist.get_world_size(), local_rank, control_group, save_group, store, lifeline)


def announce_slurm_step() -> None:
    """Under `srun` with several tasks: translate Slurm's variables into torch's, unless torchrun set those already.

    Only SLURM_STEP_NUM_TASKS counts: the batch script itself has SLURM_NTASKS too, and is one process all the same.
    """
    environ = os.environ
    size = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "WORLD_SIZE" in environ or "SLURM_PROCID" not in environ:
        return
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    job = int(environ.get("SLURM_JOB_ID", "0"))
    environ["WORLD_SIZE"], environ["RANK"] = str(size), environ["SLURM_PROCID"]
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    several = environ.get("SLURM_STEP_NUM_NODES") != "1"
    environ.setdefault("MASTER_ADDR", (several and first_host(nodes)) or "127.0.0.1")
    environ.setdefault("MASTER_PORT", str(FIRST_PORT + job % NUM_PORTS))  # two jobs on one node do not collide


def first_host(nodes: str) -> str:
    """First host of a Slurm node list: "gpu[03-05,9],b1" -> "gpu03"."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else ""


def close_world(world: World) -> None:
    """Leave the process group."""
    if world.lifeline is not None:
        world.lifeline.close()
    if world.size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def collective(what: str) -> Iterator[None]:
    """Turns the errors of a broken process group into one line."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:  # DistError, of NCCL and of the store, is a RuntimeError
        first_line = next(iter(str(error).splitlines()), "")[:200]
        raise RankLostError(f"{what} failed: another rank died, hangs or never came ({first_line})") from error


def agree_any(flags: Sequence[bool], world: World, *, group: Any = None) -> list[bool]:
    """For each flag, whether any rank raised it: one small all-reduce on the CPU."""
    return [bool(vote) for vote in agree_max([float(flag) for flag in flags], world, group=group)]


def agree_max(values: Sequence[float], world: World, *, group: Any = None) -> list[float]:
    """For each value the largest over ranks: one small all-reduce on the CPU, in the control group by default."""
    if world.size == 1:
        return list(values)
    votes = torch.tensor(values, dtype=torch.float64)
    with collective("agreement of the ranks"):
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group or world.control_group)
    return votes.tolist()


def from_main(value: int, world: World) -> int:
    """Rank 0's integer on every rank."""
    return int(agree_max([float(value) if world.is_main else -math.inf], world)[0])


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Sum of a small float64 CPU tensor over ranks; the input itself for one process."""
    if world.size > 1:
        with collective("sum over ranks"):
            dist.all_reduce(values, group=world.control_group)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        with collective("waiting for all ranks"):
            dist.barrier(group=world.control_group)


def main_first(work: Callable[[], T], world: World) -> T:
    """Rank 0 does the work alone (it may take hours), then the others do it and find most of it done.

    They wait on the store, not in a collective, whose time limit is for messages that take milliseconds. Where rank 0
    fails the others raise RankLostError at once.
    """
    if world.size == 1 or world.store is None:
        return work()
    if world.is_main:
        try:
            result = work()
        except BaseException:
            world.store.set("main_first", "failed")
            raise
        world.store.set("main_first", "done")
        return result
    with collective("waiting for rank 0 to prepare"):
        world.store.wait(["main_first"], timedelta(seconds=PREPARATION_TIMEOUT_S))
        if world.store.get("main_first") == b"failed":
            raise RuntimeError("rank 0 failed; its message says why")
    return work()


def check_shared_directory(path: Path, world: World) -> None:
    """Raise ValueError on every rank unless all of them see rank 0's `path`: checkpoints need a shared file system."""
    if world.size == 1:
        return
    failed, probe = False, path / f".shared-{os.environ.get('MASTER_PORT', '')}"
    if world.is_main:
        probe.write_text(uuid.uuid4().hex)
    barrier(world)
    if not probe.exists():
        failed = True
    anywhere = agree_any([failed], world)[0]
    if world.is_main:
        probe.unlink(missing_ok=True)
    if anywhere:
        raise ValueError(
            f"--run-dir {path} is not the same directory on every rank ({'not here' if failed else 'not elsewhere'}); "
            "choose one on a file system that all nodes share"
        )
