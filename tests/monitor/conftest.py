"""The tests of this folder share run_logs.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
