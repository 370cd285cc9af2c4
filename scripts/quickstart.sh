#!/usr/bin/env bash
# One command from a fresh clone to a trained small GPT: sets up .venv, then trains on the Python standard library's
# own sources. Further flags go to svdtrain, for example: bash scripts/quickstart.sh --num-iterations 100
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment
exec .venv/bin/svdtrain --depth 4 --device cpu "$@"
