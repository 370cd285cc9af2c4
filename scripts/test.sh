#!/usr/bin/env bash
# Sets up .venv with the test tools and runs the tests.
# Further arguments go to pytest, for example: bash scripts/test.sh tests/spectral -k angle
set -euo pipefail
source "$(dirname "$0")/_setup.sh"
setup_environment test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # the tests are small: two processes with one thread each are faster
exec .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" --dist loadfile "$@"
