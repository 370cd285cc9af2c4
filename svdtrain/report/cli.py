"""The `svd-report` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from svdtrain.monitor.reader import NoRun, find_run

DESCRIPTION = """One self-contained HTML page about one run, or comparing several: ranks, principal shares and lifts
with their chance level, clobbering events, modes, loss and bits per byte at equal tokens and equal time, throughput
and analysis cost, alerts, configuration. The page needs no network and runs no script."""


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(
        prog="svd-report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run directories (default: the newest of runs/)")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run's directory)")
    parser.add_argument("--csv", metavar="DIR", help="also write each figure's numbers there")
    parser.add_argument("--png", metavar="DIR", help="also write each figure as PNG there")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Write what was asked for."""
    from svdtrain.report.load import distinct_names, load_run
    from svdtrain.report.page import all_figures, build_page

    runs = [load_run(find_run(given)) for given in arguments.runs or [None]]
    distinct_names(runs)
    out = Path(arguments.out) if arguments.out else runs[0].path / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(build_page(runs), encoding="utf-8")
    print(f"{out} ({out.stat().st_size / 2**20:.1f} MiB)")
    if arguments.csv:
        from svdtrain.report.export import write_csv

        print(f"{write_csv(all_figures(runs), Path(arguments.csv))} CSV files in {arguments.csv}")
    if arguments.png:
        from svdtrain.report.export import write_png

        print(f"{write_png(all_figures(runs), Path(arguments.png))} PNG files in {arguments.png}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script. 0: written; 2: the user has to change something."""
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except (NoRun, OSError) as error:
        print(f"svd-report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
