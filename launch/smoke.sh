#!/usr/bin/env bash
# Does it work on this accelerator, and how fast? launch/smoke.sh [--small] [--out DIR]
# Devices; synthetic training data; two steps of the full Swin-B in bfloat16; a map by the model that they made; chips/s.
# About five minutes on one accelerator. --small takes a tiny model instead, for machines without one.
set -euo pipefail

out=.cache/smoke
small=''
while (($#)); do
    case $1 in
        --small) small=yes && shift ;;
        --out)
            out=${2:?--out needs a folder}
            shift 2
            ;;
        *) echo "usage: launch/smoke.sh [--small] [--out DIR]" >&2 && exit 2 ;;
    esac
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
[[ -z ${PYTHON:-} && -x .venv/bin/python ]] && python=.venv/bin/python
granule=HLS.L30.T10SFF.2020198T184512.v2.0 # one of those that data_prep.synthetic makes up
world=$out/world maps=$out/maps run=$out/run
began=$SECONDS

stage() {
    printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - began))
}

stage "Devices"
"$python" -c 'import jax; print("JAX", jax.__version__, *jax.devices())'
devices=$("$python" -c 'import jax; print(jax.device_count())')

stage "Training data of a synthetic forest"
if [[ ! -f $world/report.json ]]; then
    "$python" -m data_prep.synthetic --world forest --size 900x1120 --out "$world"
    "$python" -m data_prep.prepare --config configs/prepare.py --out "$world" --config.season=2020 --config.splits.block_km=7 \
        --config.splits.buffer_m=0 --config.composite.min_clear=1  # a small tile, of few scenes
fi

config=configs/finetune_all_biomes.py what=Swin-B
sizes=(--batch-sizes 64 --rounds 9)
if [[ $small ]]; then
    config=configs/demo_finetune.py what="a tiny Swin"
    sizes=(--batch-sizes 1 --rounds 2)
fi
# A multiple of the devices, and no more than the 15 chips there are: an epoch is a step.
batch=$((devices > 8 ? devices : 8 / devices * devices))
stage "Two steps of $what in bfloat16, $batch chips each"
rm -rf "$run" "$maps"
"$python" -m biomass_jax.main --config "$config" --workdir "$run" --config.data.path="$world/shards" \
    --config.dtype=bfloat16 --config.batch_size="$batch" --config.epochs=2 --config.log_every=1

stage "A map by that model"
"$python" -m biomass_jax.main --config configs/predict.py --workdir "$maps" --config.bundle="$run/best" \
    --config.inputs="$world/granules/hls/$granule" --config.dtype=bfloat16 --config.matmul_precision=default
"$python" - "$maps/${granule}_agbd.tif" <<'END'
import sys

import numpy as np

from biomass_jax.data.raster.image import read_preview

biomass = read_preview(sys.argv[1], max_size=10_000)
known = np.isfinite(biomass)
if known.mean() < 0.5:
    sys.exit(f"{sys.argv[1]}: only {known.mean():.1%} of the pixels have a value")
print(f"{biomass.shape[0]} x {biomass.shape[1]} pixels, {known.mean():.1%} with a value, mean {biomass[known].mean():.4g} Mg/ha")
END

stage "Chips/s of Swin-B, forward pass"
"$python" -m benchmarks.model --dtype bfloat16 "${sizes[@]}" --json "$out/model.json"
stage "It works"
