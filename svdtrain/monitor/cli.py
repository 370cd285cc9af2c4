"""The `svd-monitor` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from svdtrain.monitor.reader import NoRun, find_run, list_runs
from svdtrain.monitor.session import EXIT_CRITICAL, EXIT_OK, EXIT_UNKNOWN, EXIT_WARNING, Session

DESCRIPTION = """Watch a run of svdtrain, live or once. Needs nothing but its run directory; the run may be on
another machine that shares the file system. Without a terminal it prints plain lines."""
EPILOG = """exit codes: 0 ok, 1 a warning is up, 2 something critical is up, 3 unknown or stale (nothing can be said)

examples:
  svd-monitor                                    the newest run under runs/, live
  svd-monitor runs/ --list                       which runs there are
  svd-monitor --layers attn.c_q --metric rank    one kind of matrix, another metric
  svd-monitor --once --fail-on critical || mail -s "look at the run" me
  svd-monitor --json | jq .eta_s
  svd-monitor --explain switch_now               what an alert means and what to do"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit code 3: code 2 already means that the run is in a critical state."""
        print(f"svd-monitor: error: {message}", file=sys.stderr)
        raise SystemExit(EXIT_UNKNOWN)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = _Parser(
        prog="svd-monitor", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "run",
        nargs="?",
        help="run directory, a directory of runs, or wandb:ENTITY/PROJECT/ID (default: the newest of runs/)",
    )
    add("--once", action="store_true", help="print the state once and leave")
    add("--follow", action="store_true", help="plain lines, one an interval, until the run ends")
    add("--json", action="store_true", help="the state as one JSON object (with --follow: one a line)")
    add("--list", action="store_true", help="list the runs of a directory, newest first")
    add("--interval", type=float, default=2.0, metavar="S", help="seconds between two looks (default 2)")
    add(
        "--layers",
        default="",
        metavar="PART",
        help="only layers whose name has this part, or matches this pattern; commas",
    )
    add("--metric", default="", help="metric of the heatmap, or a part of its name, or r/g; key m changes it")
    add("--since", default="", metavar="WHEN", help="show from this step (500) or from this time ago (30m, 2h, 1d)")
    add(
        "--fail-on", choices=("warning", "critical", "never"), default=None,
        help="which alerts give a non-zero exit code (default: warning); --follow then ends at the first of them",
    )  # fmt: skip
    add("--ascii", action="store_true", help="plain characters only (also where the terminal's encoding needs it)")
    add("--no-color", action="store_true", help="no colours (also: NO_COLOR set)")
    add("--explain", metavar="RULE", help="what this alert means, when it fires, what to do; `all` for the list")
    return parser


def explain(name: str) -> int:
    """Print the text of an alert, or of all."""
    from svdtrain.monitor.rules import RULES
    from svdtrain.monitor.written import WRITTEN

    texts = {**RULES, **WRITTEN}
    if name == "all":
        print("\n\n".join(text.explain() for text in texts.values()))
        return EXIT_OK
    if name not in texts:
        print(f"svd-monitor: no rule {name!r}; there are: {', '.join(texts)}", file=sys.stderr)
        return EXIT_UNKNOWN
    print(texts[name].explain())
    return EXIT_OK


def open_session(given: str | None) -> Session:
    """The run that is meant. Raises NoRun."""
    if given and given.startswith("wandb:"):
        from svdtrain.monitor.wandb_source import WandbSource

        source = WandbSource(given.removeprefix("wandb:"))
        return Session(Path(given), source)
    return Session(find_run(given))


def exit_code(session: Session, fail_on: str | None) -> int:
    """The session's code, as far as --fail-on lets it through."""
    code = session.exit_code
    if (fail_on == "never" and code in (EXIT_WARNING, EXIT_CRITICAL)) or (
        fail_on == "critical" and code == EXIT_WARNING
    ):
        return EXIT_OK
    return code


def list_all(given: str | None) -> int:
    """One line a run, newest first."""
    directory = Path(given or "runs")
    runs = list_runs(directory) if directory.is_dir() else []
    if not runs:
        raise NoRun(f"{directory}: no run in it")
    for path in runs:
        session = Session(path)
        session.poll()
        view = session.view
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime((path / "metrics.jsonl").stat().st_mtime))
        steps = f"step {view.step:>7,}/{view.num_iterations:<7,}"
        print(f"{path.name:<32} {session.state.value:<10} {steps} last written {age}")
    return EXIT_OK


def follow(session: Session, arguments: argparse.Namespace) -> int:
    """Lines until the run ends, or until an alert that --fail-on names."""
    from svdtrain.monitor.render import event_line
    from svdtrain.monitor.session import is_bad_enough, status_record
    from svdtrain.monitor.state import ENDED

    told_step = -1
    while True:
        session.poll()
        session.view.analyses.materialise(8)
        if session.view.step != told_step or session.state in ENDED:
            told_step = session.view.step
            print(json.dumps(status_record(session)) if arguments.json else event_line(session), flush=True)
        for event in session.new_events if not arguments.json else ():
            print(f"{event.level} {event.rule}: {event.message}", flush=True)
        failing = arguments.fail_on in ("warning", "critical") and is_bad_enough(session, arguments.fail_on)
        if session.state in ENDED or failing or (session.source.gone and session.age_s == float("inf")):
            return exit_code(session, arguments.fail_on)
        time.sleep(arguments.interval)


def once(session: Session, arguments: argparse.Namespace) -> int:
    """The state, once."""
    from svdtrain.monitor.live import display_of, make_console
    from svdtrain.monitor.render import plain
    from svdtrain.monitor.session import parse_since, status_record

    session.poll()
    if session.view.num_records == 0:
        raise NoRun(f"{session.path}: no record that this program can read")
    parse_since(arguments.since, session.view, time.time())  # a wrong value is said also where nothing uses it
    if arguments.json:
        print(json.dumps(status_record(session)))
        return exit_code(session, arguments.fail_on)
    console = make_console(arguments)
    if console.is_terminal:
        from svdtrain.monitor.live import print_screen

        print_screen(session, console, arguments)
    else:
        print("\n".join(plain(session, display_of(arguments, console))))
    return exit_code(session, arguments.fail_on)


def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say."""
    if arguments.explain:
        return explain(arguments.explain)
    if arguments.interval <= 0:
        raise ValueError("--interval must be positive")
    if arguments.list:
        return list_all(arguments.run)
    session = open_session(arguments.run)
    if arguments.follow:
        return follow(session, arguments)
    if arguments.once or arguments.json or not sys.stdout.isatty():
        return once(session, arguments)
    from svdtrain.monitor.live import live

    live(session, arguments)
    return exit_code(session, arguments.fail_on)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except (NoRun, ValueError) as error:
        print(f"svd-monitor: {error}", file=sys.stderr)
        return EXIT_UNKNOWN
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `svd-monitor | head`; without this Python complains once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
