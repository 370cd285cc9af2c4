"""The `svd-monitor` command."""

import sys


def main() -> int:
    """Say that the command is not built yet; exit code 2."""
    print("svd-monitor: not built yet; the records of a run are in its metrics.jsonl", file=sys.stderr)
    return 2
