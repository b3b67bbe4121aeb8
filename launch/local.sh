#!/usr/bin/env bash
# N processes of a run on this machine: launch/local.sh N --config configs/X.py --workdir DIR [--config.field=value]
# launch/README.md says more.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m launch.local "$@"
