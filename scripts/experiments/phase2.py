"""Phase 2: depth 4, all attention, 2,000 steps at the reference sizes, several seeds, against plain full training.

    python scripts/experiments/phase2.py --data DIR --out docs/results/phase2.json [--device cuda --parallel 6]

DIR: parquet shards of text. Both arms of a seed start from the same weights and see the same batches.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import REFERENCE_SIZES, Arm, experiment_parser, run_arms, write_rows

FIRST_SEED = 1337
ARMS = {
    "full": {"svd-preset": "off"},
    "original-rule": {"svd-preset": "fast", "svd-rule": "original"},
    "calibrated-rule": {"svd-preset": "fast", "svd-rule": "calibrated", "svd-recompute-every": 1},
    "calibrated-rule-half": {"svd-preset": "fast", "svd-rule": "calibrated", "svd-recompute-every": 2},
    "calibrated-rule-replay": {
        "svd-preset": "fast", "svd-rule": "calibrated", "svd-recompute-every": 2, "svd-on-alarm": "replay",
    },
}  # fmt: skip
"""calibrated-rule: the split of a low-rank matrix is computed anew at every decision; -half: as is the default of
training, at every second; -replay: the same, but an alarm replays first-seen text and leaves the matrices alone."""
DEFAULT = ",".join(ARMS)


def main() -> None:
    parser = experiment_parser(__doc__, "phase2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=DEFAULT, help=f"of {', '.join(ARMS)}")
    arguments = parser.parse_args()
    flags = {**REFERENCE_SIZES, "data": arguments.data, "device": arguments.device, "dtype": "fp32", "compile": "off"}
    arms = [
        Arm(name=name, seed=FIRST_SEED + i, flags={**flags, **ARMS[name]})
        for i in range(arguments.seeds)
        for name in arguments.arms.split(",")
    ]
    rows = run_arms(arms, arguments.runs, parallel=arguments.parallel)
    for row in rows:
        if row["seed"] != FIRST_SEED:
            row["layers"] = {}  # one seed is enough for the figure; the rest would only make the file large
    command = f"python scripts/experiments/phase2.py --data DIR --device {arguments.device} --seeds {arguments.seeds}"
    if arguments.arms != DEFAULT:
        command += f" --arms {arguments.arms}"
    write_rows(rows, arguments.out, command)


if __name__ == "__main__":
    main()
