"""python -m ssm_blocks.experiments NAME [NAME ...]: run experiments; finished runs are kept and not repeated."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ssm_blocks.experiments import catalogue, submit


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 1 if a run failed, 2 for a wrong command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(arguments)
        return _run(options, _command(options))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


class _Parser(argparse.ArgumentParser):
    """One line for a wrong word, as for everything else that is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m ssm_blocks.experiments", description=__doc__)
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(catalogue.NAMES)}, or all")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--seeds", type=int, help="seeds 0 to N - 1 (3; quick: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (all of them), cuda:1, ...")
    parser.add_argument("--out", type=Path, default=Path("runs/ssm"), help="directory of the rows (runs/ssm)")
    parser.add_argument("--data", default="", help="images of scifar: a directory of parquet files, datasets, ...")
    parser.add_argument("--arms", default="", metavar="A,B", help="only these arms")
    parser.add_argument("--parallel", type=int, default=1, metavar="N", help="runs at once, each a process (1)")
    parser.add_argument(
        "--submit", choices=submit.CLUSTERS, help="hand all of it to submitit instead of running it here"
    )
    parser.add_argument("--resources", default="", metavar="NAME=VALUE,...", help="of the job, in submitit's names")
    parser.add_argument("--list", action="store_true", help="show the arms and stop")
    return parser


def _run(options: argparse.Namespace, command: str) -> int:
    names: list[str] = list(catalogue.NAMES) if "all" in options.names else list(dict.fromkeys(options.names))
    for name in names:
        catalogue.experiment(name)  # before anything slow
    if options.list:
        return _list(names)
    seeds = (1 if options.quick else 3) if options.seeds is None else options.seeds
    if seeds < 1 or options.parallel < 1:
        raise ValueError("--seeds and --parallel are at least 1")
    if options.submit:
        return submit.submit(_job(options), options.submit, options.resources, options.out / "submitit")
    if options.data:
        os.environ["SSM_CIFAR10"] = options.data  # also for the processes that run at once
    from ssm_blocks.experiments import runner

    jobs, skipped = runner.plan(
        names,
        seeds=seeds,
        quick=options.quick,
        device=_device(options.device),
        out=options.out,
        command=command,
        parallel=options.parallel,
        arms={arm for arm in options.arms.split(",") if arm},
    )
    for name in {job.experiment for job in jobs}:
        found = catalogue.experiment(name)
        found.check(found.complete_settings(options.quick))
    print(f"{len(jobs)} runs, {skipped} already done; rows in {options.out}", flush=True)
    failed = runner.run_all(jobs, options.parallel, options.out, _reporter(len(jobs)))
    return 1 if failed else 0


def _list(names: list[str]) -> int:
    for name in names:
        found = catalogue.experiment(name)
        print(f"{name} ({found.proposal}): {found.question}")
        for arm in found.arms():
            print(f"    {arm.name}{f'  [{arm.group}]' if arm.group else ''}")
    return 0


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name}: auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no CUDA device here; use --device cpu")
    return str(device)


def _command(options: argparse.Namespace) -> str:
    """What to type for the same rows; where they are written, and where data lie, is the reader's own business."""
    words = ["python", "-m", "ssm_blocks.experiments", *options.names]
    if options.quick:
        words.append("--quick")
    for flag, default in (("seeds", None), ("device", "auto"), ("parallel", 1), ("arms", "")):
        value = getattr(options, flag)
        if value != default:
            words += [f"--{flag}", str(value)]
    return shlex.join([*words, *(["--data", "DIR"] if options.data else [])])


def _job(options: argparse.Namespace) -> list[str]:
    """The command line for a job, which may start in another directory."""
    data = str(Path(options.data).resolve()) if Path(options.data).is_dir() and options.data else options.data
    words = [*options.names, "--device", options.device, "--out", str(options.out.resolve()), "--data", data]
    words += ["--arms", options.arms, "--parallel", str(options.parallel), *(["--quick"] if options.quick else [])]
    return words + ([] if options.seeds is None else ["--seeds", str(options.seeds)])


def _reporter(total: int) -> Callable[[str], None]:
    """Prints a line per finished run; in a terminal, with rich installed, above a progress bar."""
    if sys.stderr.isatty() and total:
        try:
            from rich.progress import Progress
        except ImportError:
            return lambda line: print(line, flush=True)
        progress = Progress(transient=True)
        task = progress.add_task("runs", total=total)
        progress.start()

        def report(line: str) -> None:
            progress.console.print(line, highlight=False, markup=False)
            progress.advance(task)
            if progress.finished:
                progress.stop()

        return report
    return lambda line: print(line, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
