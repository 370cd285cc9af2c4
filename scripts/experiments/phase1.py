"""Phase 1: depth 4, one matrix (the first layer's c_q), 2,000 steps at the reference sizes, with the original rule.

    python scripts/experiments/phase1.py --data DIR --out docs/results/phase1.json

The first implementation of this method switched at step 280, took 82 minutes, went from 3.43 to 1.93 bpb, and was blind
after its switch. DIR: parquet shards of text.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from runs import REFERENCE_SIZES, Arm, experiment_parser, run_arms, write_rows


def main() -> None:
    parser = experiment_parser(__doc__, "phase1")
    parser.add_argument("--seed", type=int, default=1337)
    arguments = parser.parse_args()
    flags = {**REFERENCE_SIZES, "data": arguments.data, "device": arguments.device, "svd-targets": r"h\.0\.attn\.c_q"}
    arms = [
        Arm(name="original-rule", seed=arguments.seed, flags={**flags, "svd-rule": "original", "svd-preset": "fast"}),
        Arm(name="calibrated-rule", seed=arguments.seed, flags={**flags, "svd-rule": "calibrated"}),
    ]
    rows = run_arms(arms, arguments.runs, parallel=arguments.parallel)
    command = "python scripts/experiments/phase1.py --data DIR --device " + arguments.device
    write_rows(rows, arguments.out, command)


if __name__ == "__main__":
    main()
