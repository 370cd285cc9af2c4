"""Upload a finished run from its own log: one clean wandb run, however often the job was requeued and wherever it ran.

    python scripts/replay_wandb.py runs/d20                      # to your default entity, project svdtrain
    python scripts/replay_wandb.py runs/d20 --project p --dry-run

Steps that were repeated after a restart are uploaded once. The wandb id is the one in the run directory, with `-replay`
behind it if that run exists already (use --id to choose another).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from svdtrain.monitor.reader import read_config
from svdtrain.runlog import Record, surviving_records


def rows_of(run: Path) -> Iterator[dict[str, Any]]:
    """One row a step, all metrics of the step together, in order of steps."""
    row: dict[str, Any] = {}
    for record in sorted_by_step(surviving_records(run / "metrics.jsonl")):
        if row and record["step"] != row["step"]:
            yield row
            row = {}
        row["step"] = record["step"]
        row.update(fields_of(record))
    if row:
        yield row


def sorted_by_step(records: Iterator[Record]) -> Iterator[Record]:
    """By step; the file is in this order but for the records of one step, so a short look ahead is enough."""
    kept = [r for r in records if r["kind"] in ("train", "eval", "svd", "switch")]
    yield from sorted(kept, key=lambda r: r["step"])


def fields_of(record: Record) -> dict[str, Any]:
    """Metric name -> number, as the live mirror names them."""
    if record["kind"] == "switch":
        mode = {"to_lowrank": 1, "to_full": 0}.get(str(record.get("change")))
        fields = {f"switch/{record['layer']}/r": record.get("r_new")}
        return fields if mode is None else {**fields, f"switch/{record['layer']}/mode": mode}
    return {k: v for k, v in record.items() if "/" in k and isinstance(v, (int, float))}


def upload(run: Path, arguments: argparse.Namespace) -> int:
    """Send all rows; returns their number."""
    import wandb

    id_file = run / "wandb_id.txt"
    run_id = arguments.id or (id_file.read_text().strip() + "-replay" if id_file.exists() else None)
    target = wandb.init(
        project=arguments.project,
        entity=arguments.entity or None,
        name=run.name,
        id=run_id,
        config=read_config(run),
        mode="offline" if arguments.offline else "online",
        dir=str(run),
        settings=wandb.Settings(silent=True, console="off"),
    )
    target.define_metric("step")
    target.define_metric("*", step_metric="step")
    count = 0
    for count, row in enumerate(rows_of(run), 1):  # noqa: B007 - the number of rows is the result
        target.log(row)
    target.finish()
    return count


def main() -> int:
    """0: done; 2: the user has to change something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--project", default="svdtrain")
    parser.add_argument("--entity", default="")
    parser.add_argument("--id", default="", help="wandb run id")
    parser.add_argument("--offline", action="store_true", help="write an offline run for a later `wandb sync`")
    parser.add_argument("--dry-run", action="store_true", help="only count what would be sent")
    arguments = parser.parse_args()
    if not (arguments.run / "metrics.jsonl").exists():
        print(f"replay_wandb: {arguments.run}: no metrics.jsonl there", file=sys.stderr)
        return 2
    if arguments.dry_run:
        rows = list(rows_of(arguments.run))
        print(f"{len(rows)} rows, steps {rows[0]['step']} to {rows[-1]['step']}" if rows else "nothing to send")
        return 0
    try:
        print(f"{upload(arguments.run, arguments)} rows sent")
    except Exception as error:  # wandb's own, requests', the operating system's
        print(f"replay_wandb: {' '.join(f'{type(error).__name__}: {error}'.split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
