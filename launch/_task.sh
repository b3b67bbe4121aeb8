#!/usr/bin/env bash
# One process of a run, as launch/slurm.sbatch starts it; BIOMASS_JAX_MODULE is what runs, biomass_jax.main if not given. BUCKETS="gs://A=/mnt/a s3://B=/mnt/b" are mounted before.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r -a buckets <<<"${BUCKETS:-}"
if ((${#buckets[@]})); then
    bash "$root/launch/_mount.sh" "${buckets[@]}"
fi
cd "$root"
exec "${PYTHON:-$root/.venv/bin/python}" -m "${BIOMASS_JAX_MODULE:-biomass_jax.main}" "$@"
