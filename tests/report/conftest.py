"""The tests here use the logs of tests/monitor."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "monitor"))
