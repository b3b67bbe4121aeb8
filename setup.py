"""Metadata and dependencies; tool settings are in pyproject.toml.

Floors are written here, each with its reason. The exact versions that were tested together are in constraints/, one
file a Python version, and the Makefile installs those.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "biomass_jax" / "version.py").read_text(), re.M).group(1)

CORE = [
    # 0.10 is the oldest that Flax 0.12.8 takes. Below 0.13, because each minor release drops deprecated names; 0.10 and
    # 0.12 were run.
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8",  # the first release tested with JAX 0.10
    "optax>=0.2.8",  # tested with JAX 0.10
    "orbax-checkpoint>=0.12.8",  # bundles are written by its StandardCheckpointer; older layouts were not tried
    "grain>=0.2.18",  # `grain.experimental.set_next_index`, by which a resumed run finds its place
    "array_record>=0.8.6",  # shards; the version that Grain 0.2.18 was tested with
    "tensorflow-datasets>=4.9.10",  # reads array_record without TensorFlow; older ones were not tried
    "ml_collections>=1.1.0",  # typed, locked configs
    "numpy>=2.0",  # JAX 0.10's own floor
    "ml_dtypes>=0.5",  # bfloat16 in NumPy, for checkpoints that hold it; JAX 0.10's own floor
    "scipy>=1.14",  # Student's t; the first tried, and JAX brings a newer one
    "rasterio>=1.4.3",  # GDAL 3.9 in its wheels; the COG driver of older ones was not tried
    "affine>=2.4",  # a raster's transform; the oldest tried
    "matplotlib>=3.9",  # the first built for NumPy 2
    "tensorboardX>=2.6.4",  # event files without TensorFlow; the oldest tried
    "tqdm>=4.66",  # progress bars; the first made for Python 3.12
    "absl-py>=2.0",  # flags; the oldest tried
    "pyyaml>=6.0.1",  # the reference's config.yaml; the first with wheels for Python 3.12
]

PREP = [
    "h5py>=3.11",  # GEDI orbits; the first built for NumPy 2
    "geopandas>=1.0",  # footprints; the first that needs no Fiona
    "pyarrow>=16.1",  # footprint tables; the first built for NumPy 2
    "pandas>=2.2.2",  # the first built for NumPy 2; geopandas brings it
    "shapely>=2.0.4",  # polygons of chips; the first built for NumPy 2
    "pyproj>=3.7",  # the first with wheels for Python 3.13
    "earthaccess>=0.14",  # Earthdata search and download; older ones were not tried
]
SWEEP = [
    "optuna>=5.0",  # importances without scikit-learn, parallel trials that keep apart; older ones were not tried
    "sqlalchemy>=2.0",  # under Optuna's storage; reads its URLs here; older ones were not tried
]
XARRAY = [
    "xarray>=2024.7",  # the first releases for NumPy 2; maps of DataArrays
    "rioxarray>=0.19",  # CRSs of DataArrays; older ones were not tried
    "dask>=2024.8",  # lazy ones; the first that works with NumPy 2
]
REGIONAL = [
    "exactextract>=0.2",  # means over polygons; the first of its Python releases that are on PyPI
    "geopandas>=1.0",  # as above
    "h5py>=3.11",  # as above
    "pandas>=2.2.2",  # as above
    "pyarrow>=16.1",  # as above
    "pyogrio>=0.8",  # styles in GeoPackages; geopandas brings it, older ones were not tried
    "pyproj>=3.7",  # as above
    "shapely>=2.0.4",  # as above
]
PORTABLE = [
    # jax.export writes and reads its files by it; older ones were not tried.
    "flatbuffers>=25.12.19",
    # ONNX, brings onnx and onnxruntime; older ones were not tried. Those from 0.13.1 on bound orbax-checkpoint below
    # our floor, so that pip takes this one, which goes with JAX 0.10; docs/export.md has what goes with 0.11.
    "jax2onnx>=0.13",
    "onnx>=1.20.1",  # jax2onnx's own floor
]
DOCS = ["nbclient>=0.10", "ipykernel>=6.29"]  # runs the notebook as a test; the first that allow Python 3.12
# `make docs`: the site with its API reference; older ones were not tried.
SITE = ["mkdocs-material>=9.6", "mkdocstrings[python]>=1.0", "mkdocs-jupyter>=0.25"]
TOOLS = [
    "flatbuffers>=25.12.19",  # for the tests of StableHLO, as above
    "setuptools>=70.1",  # builds the wheel without the network; the first that needs no `wheel` beside it
    "pystac[validation]>=1.12,<1.15",  # STAC items; the first with schemas of STAC 1.1; 1.15 is two dozen packages
    "pytest>=8.2",  # older ones were not tried with the importlib import mode
    "pytest-timeout>=2.3",  # a hanging test must not hang the suite
    "pytest-xdist>=3.6",  # the quick tests on two cores; older ones were not tried
    "ruff>=0.12",  # older ones format differently
    "mypy>=1.15",  # older ones were not tried with the annotations of NumPy 2
]

# Folders that are installed as parts of biomass_jax; in a checkout biomass_jax finds them where they are.
INSTALLED_INSIDE = {
    "biomass_jax.configs": "configs",
    "biomass_jax.configs.sweeps": "configs/sweeps",
    "biomass_jax.launch": "launch",
    "biomass_jax.launch.checkpoint": "tests/golden/ckpt_micro_cli",  # what the demo converts
}

setup(
    name="biomass-jax",
    version=VERSION,
    description="Above-ground biomass maps from HLS satellite images with Swin transformers, on JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    project_urls={
        "Paper": "https://arxiv.org/abs/2406.19888",
        "Released model": "https://huggingface.co/ibm-granite/granite-geospatial-biomass",
    },
    python_requires=">=3.11",  # JAX 0.10's own floor
    packages=sorted({*find_packages(include=["biomass_jax*", "data_prep*"]), *INSTALLED_INSIDE}),
    package_dir=INSTALLED_INSIDE,
    package_data={
        "biomass_jax": ["py.typed"],
        "data_prep": ["py.typed"],
        "biomass_jax.launch.checkpoint": ["state_dict.ckpt"],
    },
    entry_points={"console_scripts": ["biomass-jax = biomass_jax.cli:main"]},
    install_requires=CORE,
    extras_require={
        "prep": PREP,
        "dask": ["distributed>=2024.8"],  # the first that works with NumPy 2; brings dask
        "xarray": XARRAY,
        "regional": REGIONAL,
        "sweep": SWEEP,
        "portable": PORTABLE,
        "hub": ["huggingface_hub>=0.23"],  # resumes broken downloads by itself
        # torch: the version behind the numeric references in tests/golden, for the model that ours races. rioxarray,
        # with xarray: what composites are measured against; older ones were not tried. Only benchmarks/ uses them.
        "bench": ["torch==2.13.0", "rioxarray>=0.19"],
        "docs": DOCS,
        "site": SITE,
        "tools": TOOLS,
        "dev": PREP + REGIONAL + SWEEP + XARRAY + DOCS + TOOLS,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],  # bring-your-own CUDA 12: install jax[cuda12] instead
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: GIS",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
