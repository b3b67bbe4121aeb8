"""`python -m data_prep STEP [options]`: the commands of data preparation; `python -m data_prep` lists them."""

import importlib
import sys
from collections.abc import Sequence

from biomass_jax.runtime import environment

# Step: its module, which has a `main(argv)`, and what it does.
STEPS: dict[str, tuple[str, str]] = {
    "prepare": ("data_prep.prepare.run", "all steps for a list of tiles, from one config"),
    "download": ("data_prep.archive.download", "HLS granules and GEDI orbits from NASA's archives"),
    "stream": ("data_prep.archive.stream", "a composite straight from NASA's archive, without keeping granules"),
    "composite": ("data_prep.hls.composite", "a season's scenes to one image a tile"),
    "gedi": ("data_prep.gedi.orbits", "GEDI L4A orbits to footprint tables"),
    "labels": ("data_prep.gedi.labels", "footprints to label rasters on the composites' grids"),
    "chips": ("data_prep.chips.cells", "the index of chips with enough labels"),
    "splits": ("data_prep.chips.splits", "chips to train, val and test by ground"),
    "stats": ("data_prep.shards.statistics", "means and standard deviations of the bands"),
    "shards": ("data_prep.shards.write", "chips to array_record shards"),
    "geotiff": ("data_prep.shards.geotiff", "the published data set's GeoTIFF chips to shards"),
    "chip_folders": ("data_prep.chips.folders", "chips to the published data set's folder layout"),
    "check": ("data_prep.inspect.check", "whether labels lie on the pixels that they belong to"),
    "preview": ("data_prep.inspect.preview", "a picture of a chip or a tile with its labels"),
    "synthetic": ("data_prep.synthetic.__main__", "synthetic scenes and worlds for tests and demos"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a step; return its exit code, 2 where there is no such step."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print("usage: python -m data_prep STEP [options]\n\nsteps, each with --help:")
        print("\n".join(f"  {name:<13} {what}" for name, (_, what) in STEPS.items()))
        return 0 if words else 2
    step, *rest = words
    if step not in STEPS:
        print(f"error: no step {step!r}; expected one of {', '.join(STEPS)}", file=sys.stderr)
        return 2
    # before the step's modules are imported, with which PROJ starts
    environment.settle(jax=False)
    return importlib.import_module(STEPS[step][0]).main(rest) or 0


if __name__ == "__main__":
    # `data_prep.labels` in the old spelling, see `data_prep/__init__.py`
    called = __spec__.name.split(".")[1] if __spec__ else ""
    sys.exit(main([called, *sys.argv[1:]] if called in STEPS else None))
