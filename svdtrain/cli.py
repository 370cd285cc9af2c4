"""The `svdtrain` command: flags to configuration, errors to one line, exit codes.

Exit codes: 0 finished, 1 stopped because training broke (non-finite three times, or the ranks' weights differ), 2 the
user has to change something, 3 another rank was lost, 85 preempted by a signal with everything saved (start it again
with --resume auto), 130 interrupted by Ctrl-C.
"""

import dataclasses
import difflib
import json
import logging
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import tyro

from svdtrain.config import PRESETS, RunConfig, defaults_for_depth, merge_settings
from svdtrain.config.flags import read_flags
from svdtrain.interrupts import INTERRUPTED, exit_code, leave_lost_rank, nothing_to_save_yet, resume_command
from svdtrain.runlog import newest_run
from svdtrain.trainer.errors import RankLostError

if TYPE_CHECKING:
    from rich.console import Console

RUNS = Path("runs")
DEFAULT_DEPTH = 4


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where the run lives and how it starts."""

    run_dir: str = ""
    """Run directory; default runs/d<depth>-<date>-<time>."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest checkpoint of --run-dir (default: the newest run), or start if there is none."""
    preset: str = ""
    """Named starting point: d4, d12, d20, d20-2026. --config and flags go on top."""
    config: str = ""
    """JSON file of settings (such as another run's config.json). Flags go on top."""
    log_level: Literal["warning", "info", "debug"] = "warning"
    """debug: parameter counts and split error before and after every change of a matrix."""


GROUPS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(RunConfig)}

DESCRIPTION = """Train a GPT on real text while adaptive SVD watches and switches its matrices.

The least you can type: `svdtrain --depth 4 --device cpu`. `--prepare-only` tokenises the text into the cache and stops.
Rarer settings are not listed here; they are flags and keys of --config all the same: see svdtrain/config/."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What the command line said."""

    run: RunOptions
    config: RunConfig


def _flags_class(*, hide_advanced: bool) -> Any:
    """One dataclass of all groups for tyro to read; settings marked `advanced` are left out of --help."""
    groups = {name: _without_advanced(group) if hide_advanced else group for name, group in GROUPS.items()}
    return dataclasses.make_dataclass("Flags", [("run", RunOptions), *groups.items()], frozen=True, kw_only=True)


def _without_advanced(group: Any) -> Any:
    hints = get_type_hints(group)
    hidden = [
        (f.name, Annotated[hints[f.name], tyro.conf.Suppress], field(default=f.default))
        for f in dataclasses.fields(group)
        if f.metadata.get("advanced")
    ]
    shown = dataclasses.make_dataclass(group.__name__, hidden, bases=(group,), frozen=True, kw_only=True)
    shown.__doc__ = group.__doc__
    return shown


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Flags on top of --config on top of --preset on top of what --depth implies.

    Raises ValueError for an unknown flag, preset or setting; SystemExit for --help and malformed values.
    """
    _reject_unknown_flags(argv)
    preset, config_path, depth = (_peek(argv, flag) for flag in ("--preset", "--config", "--depth"))
    settings = defaults_for_depth(int(depth) if depth.isdigit() and int(depth) > 0 else DEFAULT_DEPTH)
    if preset:
        if preset not in PRESETS:
            raise ValueError(f"--preset {preset!r} does not exist; choose one of {', '.join(PRESETS)}")
        settings = merge_settings(settings, PRESETS[preset])
    if config_path:
        settings = merge_settings(settings, _read_config_file(Path(config_path)))
    RunConfig.from_dict(settings)  # names an unknown setting
    flags_class = _flags_class(hide_advanced="--help" in argv or "-h" in argv)
    groups = {f.name: f.type for f in dataclasses.fields(flags_class)}
    default = flags_class(**{name: group(**settings.get(name, {})) for name, group in groups.items()})  # type: ignore[operator]
    flags = read_flags(flags_class, argv, program="svdtrain", description=DESCRIPTION, default=default)
    return Arguments(run=flags.run, config=RunConfig(**{name: getattr(flags, name) for name in GROUPS}))


def flag_names() -> list[str]:
    """Every flag of the command, `--no-` forms of switches included."""
    leaves = [leaf for group in (RunOptions, *GROUPS.values()) for leaf in dataclasses.fields(group)]  # type: ignore[arg-type]
    names = []
    for leaf in leaves:
        flag = leaf.name.replace("_", "-")
        names += [f"--{flag}", f"--no-{flag}"] if isinstance(leaf.default, bool) else [f"--{flag}"]
    return names


def _reject_unknown_flags(argv: Sequence[str]) -> None:
    known = [*flag_names(), "--help", "--tyro-print-completion", "--tyro-write-completion"]
    for token in argv:
        flag = token.split("=", 1)[0].replace("_", "-")
        if token.startswith("--") and flag not in known:
            close = difflib.get_close_matches(flag, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "svdtrain --help lists all flags"
            raise ValueError(f"unknown flag {token.split('=', 1)[0]}; {hint}")


def _peek(argv: Sequence[str], flag: str) -> str:
    """Value of a flag before the real parsing, empty if it is not given."""
    for position, token in enumerate(argv):
        if token == flag and position + 1 < len(argv):
            return argv[position + 1]
        if token.startswith(flag + "="):
            return token.split("=", 1)[1]
    return ""


def _read_config_file(path: Path) -> dict:
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(group, dict) for group in values.values()):
        raise ValueError(f"--config {path}: expected groups of settings, as in a run's config.json")
    return values


def choose_run_directory(options: RunOptions, depth: int) -> Path:
    """Directory of the run. Raises ValueError if a new run would land in an old one."""
    if options.run_dir:
        path = Path(options.run_dir)
    elif options.resume == "auto" and (newest := newest_run(RUNS)) is not None:
        return newest
    else:
        return _fresh(RUNS / f"d{depth}-{time.strftime('%Y%m%d-%H%M%S')}")
    if options.resume == "no" and (path / "metrics.jsonl").exists():
        raise ValueError(
            f"--run-dir {path} already holds a run; add --resume auto to go on, or choose another directory"
        )
    return path


def _fresh(path: Path) -> Path:
    """The path itself, or with a number behind it if two runs start in the same second."""
    candidates = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(candidate for candidate in candidates if not candidate.exists())


SETTINGS_THAT_MUST_MATCH = {
    "model": None,
    "data": ("data", "max_train_tokens"),
    "train": ("total_batch_size", "seed"),
}
"""Settings that cannot change on resume, because weights or data order would no longer fit; None: the whole group."""


def check_resumable(saved: dict | None, config: RunConfig, path: Path) -> None:
    """Raise ValueError if the run in `path` was made with settings that this one may not change."""
    if saved is None:
        return
    now = config.to_dict()
    for group, names in SETTINGS_THAT_MUST_MATCH.items():
        for name in names or now[group]:
            before = saved.get(group, {}).get(name)
            if before != now[group][name]:
                flag = "--" + name.replace("_", "-")
                raise ValueError(
                    f"cannot resume {path}: it was made with {flag} {before}, now {now[group][name]}; "
                    f"give the same value or choose another --run-dir"
                )


def changed_settings(saved: dict | None, config: RunConfig) -> str:
    """What a resume changes: `--flag before -> now`, with commas; empty for nothing."""
    return ", ".join(
        f"--{name.replace('_', '-')} {before} -> {now}"
        for group, values in config.to_dict().items()
        for name, now in values.items()
        if (before := (saved or {}).get(group, {}).get(name, now)) != now
    )


def run(arguments: Arguments, console: "Console", argv: Sequence[str] = ()) -> int:
    """Train; returns the exit code. `argv` is what the user typed, for the command that goes on after a signal."""
    config = arguments.config
    _set_log_level(arguments.run.log_level, console)
    path = choose_run_directory(arguments.run, config.model.depth)
    resuming = arguments.run.resume == "auto"

    with nothing_to_save_yet():
        from svdtrain.build import build_trainer  # torch is imported here, after everything a typing error can stop
        from svdtrain.runlog import RunDirectory
        from svdtrain.trainer.distributed import close_world

        saved = RunDirectory(path, writable=False).read_config() if resuming else None
        check_resumable(saved, config, path)
        trainer = build_trainer(config, path, console)
        if (changed := changed_settings(saved, config)) and trainer.state.world.is_main:
            console.print(f"goes on with other settings: {changed}", style="yellow", soft_wrap=True, markup=False)
        trainer.fit(resume=resuming)
    state = trainer.state
    close_world(state.world)
    if state.control.ending and trainer.saved:
        if state.world.is_main:
            command = resume_command(argv, path)
            console.print(f"saved at step {state.step}; go on with: {command}", soft_wrap=True, markup=False)
        return exit_code(state.control.ending)
    if state.control.abort:
        return 1
    if trainer.state.stop_reason.startswith("non-finite"):
        steps = trainer.store.steps()
        good = (
            trainer.store.directory(steps[-1]) if steps else "none (no checkpoint was saved before; see --save-every)"
        )
        console.print(f"training stopped: {trainer.state.stop_reason}; last good checkpoint: {good}", style="bold red")
        return 1
    return 0


def prepare_only(config: RunConfig, console: "Console") -> int:
    """Tokenise into the cache and say where it is."""
    from svdtrain.build import prepare_data
    from svdtrain.trainer.distributed import World

    data = prepare_data(config, World(), console)
    console.print(f"{data.name}: {data.train.num_tokens:,} training tokens in {data.train.directory}", soft_wrap=True)
    return 0


def _set_log_level(level: str, console: "Console") -> None:
    from rich.logging import RichHandler

    handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
    logging.basicConfig(level="WARNING", format="%(name)s: %(message)s", handlers=[handler], force=True)
    logging.getLogger("svdtrain").setLevel(level.upper())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    from rich.console import Console

    console = Console()
    warnings.showwarning = lambda message, *_args, **_kwargs: console.print(
        f"WARNING {message}", style="yellow", markup=False
    )
    try:
        given = sys.argv[1:] if argv is None else argv
        if "--dry-run" in given:  # for launchers: read the flags, print the resolved configuration, stop
            print(json.dumps(parse_arguments([t for t in given if t != "--dry-run"]).config.to_dict()))
            return 0
        if "--prepare-only" in given:  # for nodes without internet: fill the cache where there is one, train elsewhere
            return prepare_only(parse_arguments([t for t in given if t != "--prepare-only"]).config, console)
        return run(parse_arguments(given), console, given)
    except RankLostError as error:
        leave_lost_rank(str(error))
    except KeyboardInterrupt:
        console.print("interrupted before training started; nothing is lost", style="yellow")
        return INTERRUPTED
    except OSError as error:  # a directory that cannot be written, a full disk
        said = f"{error.strerror}: {error.filename}" if error.filename else error.strerror or str(error)
        print(f"svdtrain: error: {' '.join(said.split())}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"svdtrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
