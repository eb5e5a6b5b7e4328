#!/usr/bin/env bash
# Sets itself up and runs the checks and tests; arguments go to pytest.
set -euo pipefail
extra_requirements="requirements-test.txt"
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export HF_HUB_OFFLINE=1
ruff check .
ruff format --check .
exec python -m pytest "$@"
