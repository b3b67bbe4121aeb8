"""A model on disk: weights, architecture, bands, statistics and where they came from.

A bundle is a folder with `bundle.json`, Orbax `variables/` and, to train further, Orbax `optimizer/`; a calibrated one
has a section `uncertainty` in `bundle.json` and may have its area of applicability in Orbax `applicability/`. Nothing
else is needed to make a map. Reading `bundle.json` alone (`read_meta`) does not start JAX.
"""

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from biomass_jax.data.labels import Label, of_output
from biomass_jax.errors import ArchitectureError, BundleError, name_list
from biomass_jax.models.build import CHECK_SEED, abstract_variables, architecture_of, build_module, dummy_inputs
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import replace_folder
from biomass_jax.version import __version__

SCHEMA_VERSION = 1
PIXEL_SIZE = 30.0  # metres, of HLS
CHECK_TOLERANCE = 1e-4
_REQUIRED = {"task": str, "weights_sha256": str} | dict.fromkeys(
    ("architecture", "input", "output", "training", "provenance", "check"), dict
)


class Bundle:
    """A bundle in memory.

    Attributes:
        path: its folder.
        meta: `bundle.json`.
    """

    def __init__(self, path: Path, meta: dict[str, Any], variables: dict[str, Any] | Future[dict[str, Any]]) -> None:
        """`variables` may still be read; then `variables` waits for them."""
        self.path, self.meta, self._variables = path, meta, variables

    @property
    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"} on the device. BundleError where they turned out to be damaged."""
        if isinstance(self._variables, Future):
            self._variables = self._variables.result()
        return self._variables

    @property
    def task(self) -> str:
        """`biomass`, `simmim` or `encoder`."""
        return self.meta["task"]

    @property
    def bands(self) -> tuple[str, ...]:
        """Input bands by name, in the model's order."""
        return tuple(self.meta["input"]["bands"])

    @property
    def means(self) -> np.ndarray:
        """Mean of each band, float32 (bands,), digital numbers."""
        return np.asarray(self.meta["input"]["means"], np.float32)

    @property
    def stds(self) -> np.ndarray:
        """Standard deviation of each band, float32 (bands,), digital numbers."""
        return np.asarray(self.meta["input"]["stds"], np.float32)

    @property
    def fill(self) -> float | None:
        """Value that marks no-data in the training images."""
        return self.meta["input"].get("fill")

    @property
    def pixel_size(self) -> float:
        """Side of the training images' pixels on the ground, metres; HLS's where an older bundle doesn't tell."""
        return float(self.meta["input"].get("pixel_size", PIXEL_SIZE))

    @property
    def label(self) -> Label:
        """What the output is. DataError where its unit isn't the label's own."""
        return of_output(self.meta["output"], str(self.path))

    @property
    def nodata(self) -> float:
        """Value that marks no-data in the output."""
        return self.meta["output"]["nodata"]

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights (see `weights_sha256`)."""
        return self.meta["weights_sha256"]

    @functools.cached_property
    def applicability(self) -> dict[str, np.ndarray] | None:
        """Arrays of the area of applicability, on the host, read when first asked for; None where there is none.

        Raises:
            BundleError: arrays that are missing, damaged, or not those of `uncertainty.applicability_sha256`.
        """
        folder = self.path / "applicability"
        expected = self.meta.get("uncertainty", {}).get("applicability_sha256")
        if expected is None and not folder.is_dir():
            return None
        found = _restore_plain(folder, _stored_shapes(folder, "arrays"), "arrays")
        if (digest := weights_sha256(found)) != expected:
            raise BundleError(
                f"{folder}: the arrays' SHA-256 is {digest}, bundle.json says {expected}; calibrate the model again"
            )
        return found

    def _repr_html_(self) -> str:
        """What notebooks show: bands with their statistics, pixel size, output, provenance."""
        cells = zip(self.bands, self.means.tolist(), self.stds.tolist(), strict=True)
        bands = "".join(f"<tr><th>{escape(b)}</th><td>{m:.5g}</td><td>{s:.5g}</td></tr>" for b, m, s in cells)
        output, provenance = self.meta.get("output", {}), self.meta.get("provenance", {})
        facts = {
            "task": self.task,
            "sensors": ", ".join(self.meta["input"].get("sensors", ())) or "not told",
            "pixel size": f"{self.pixel_size:g} m",
            "output": f"{', '.join(output.get('bands', ()))} ({output.get('units')})",
            "no data": output.get("nodata"),
            "weights": self.weights_sha256[:12],
            **{key: provenance[key] for key in ("source", "command") if provenance.get(key)},
        }
        rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(str(value))}</td></tr>" for key, value in facts.items())
        return (
            f"<b>Model bundle {escape(str(self.path))}</b><table>{rows}</table>"
            f"<table><tr><th>band</th><th>mean</th><th>standard deviation</th></tr>{bands}</table>"
        )

    def module(self, dtype: str = "float32", *, attention: str = "auto") -> Any:
        """The Flax module that `variables` belong to; `attention` as models/attention.py has it."""
        return _build(self.path, self.task, self.meta["architecture"], dtype).clone(attention=attention)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {'a/b/c': leaf}, sorted by path."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def weights_sha256(variables: dict[str, Any]) -> str:
    """Digest over sorted path, dtype, shape and little-endian bytes (Orbax folders are not byte-stable)."""
    digest = hashlib.sha256()
    for path, leaf in flatten(variables).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).data if little.size else b"")
    return digest.hexdigest()


def software_versions() -> dict[str, str]:
    """For provenance: versions of what computes a result, and what the environment adds to it, as `$XLA_FLAGS`."""
    names = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
    found = {"biomass_jax": __version__, "python": sys.version.split()[0]} | {name: version(name) for name in names}
    return found | {f"${name}": value for name, value in environment.recorded().items()}


def compute_check(module: nn.Module, variables: dict[str, Any]) -> dict[str, Any]:
    """Summary of the module's output on a fixed input: {input_seed, input_shape, mean, std, min, max, values}.

    The input is `dummy_inputs`, z-scored noise. A final ReLU is left off, since it could turn every value into 0; of an
    encoder the last feature map counts. `values` are 16 values spread evenly over the flattened output.
    """
    inputs = dummy_inputs(module)
    if hasattr(module, "final_relu"):
        module = module.clone(final_relu=False)
    with jax.default_matmul_precision("highest"):
        output = jax.jit(module.apply)(variables, *inputs)
    flat = np.asarray(output[-1] if isinstance(output, list) else output, np.float64).ravel()
    return {
        "input_seed": CHECK_SEED,
        "input_shape": list(inputs[0].shape),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "min": float(flat.min()),
        "max": float(flat.max()),
        "values": [float(v) for v in flat[np.linspace(0, flat.size - 1, 16).round().astype(int)]],
    }


def save(
    path: str | os.PathLike[str],
    variables: dict[str, Any],
    *,
    task: str,
    architecture: dict[str, Any],
    input: dict[str, Any],
    output: dict[str, Any],
    training: dict[str, Any],
    provenance: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a bundle, whole or not at all.

    Args:
        path: the folder to make.
        variables: {"params", "batch_stats"}; must have exactly the shapes that the architecture asks for.
        task: `biomass`, `simmim` or `encoder`.
        architecture: the module's constructor fields, dtype apart; defaults of those left out are written too.
        input: bands, units, fill, means, stds, sensors, no_data_rule.
        output: bands, units, nodata; of another label than biomass `top` and `bins`, see `labels.Label`.
        training: dataset, season, scores.
        provenance: source, sha256, command, versions.
        optimizer: {count, mu, nu, lr, plateau} to continue training from, `mu` and `nu` shaped like params.
        overwrite: replace a bundle that is there.

    Raises:
        BundleError: the folder exists, the variables do not fit the architecture, or they give no finite output.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    module = _build(path, task, architecture)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    _compare_trees(str(path), abstract_variables(module), variables)
    meta: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "task": task,
        "architecture": architecture_of(module),
        "input": input,
        "output": output,
        "training": training,
        "provenance": provenance,
        "weights_sha256": weights_sha256(variables),
        "check": compute_check(module, variables),
    }
    if not np.isfinite([*meta["check"]["values"], meta["check"]["mean"]]).all():
        raise BundleError(f"{path}: the model gives NaN or infinite values on a fixed input; its weights are unusable")
    trees = {"variables": _without_empty(variables)}
    if optimizer is not None:
        trees["optimizer"] = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else np.asarray(leaf), optimizer)
    return _write(path, meta, trees)


def with_uncertainty(
    bundle: Bundle,
    path: str | os.PathLike[str],
    uncertainty: Mapping[str, Any],
    applicability: Mapping[str, np.ndarray] | None = None,
    *,
    output_bands: Sequence[str],
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Path:
    """Write a calibrated copy of a bundle, whole or not at all: the same weights, no optimiser's state.

    Args:
        bundle: the one to copy.
        path: the folder to make.
        uncertainty: the section of bundle.json; the digest of `applicability` is added to it.
        applicability: arrays of the area of applicability, float32.
        output_bands: what its maps have.
        provenance: fields that are added to the bundle's own, or stand in their place.
        overwrite: replace a bundle that is there.

    Raises:
        BundleError: the folder exists, or the bundle's weights are damaged.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    section = {name: value for name, value in uncertainty.items() if name != "applicability_sha256"}
    trees = {"variables": _without_empty(bundle.variables)}
    if applicability is not None:
        trees["applicability"] = dict(applicability)
        section["applicability_sha256"] = weights_sha256(trees["applicability"])
    meta = bundle.meta | {
        "output": bundle.meta["output"] | {"bands": list(output_bands)},
        "provenance": bundle.meta["provenance"] | dict(provenance),
        "uncertainty": section,
    }
    return _write(path, meta, trees)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: already exists; choose another folder or ask to overwrite it")


def _write(path: Path, meta: dict[str, Any], trees: dict[str, Any]) -> Path:
    """Write the folder under another name and rename it when it is whole."""
    import orbax.checkpoint as ocp

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        # Trained weights hardly compress (8 %), and plain ones open in half the time.
        # One process of a run writes, so that Orbax must not wait for the others.
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=me, active_processes={me}, barrier_sync_key_prefix="bundle"
        )
        handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True, multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            for name, tree in trees.items():
                checkpointer.save(partial.absolute() / name, args=ocp.args.PyTreeSave(tree))
        (partial / "bundle.json").write_text(json.dumps(meta, indent=2, allow_nan=False) + "\n")
        replace_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`bundle.json`, checked.

    Raises:
        BundleError: no bundle there, unreadable, of another schema version, or with a field missing.
    """
    path = Path(path)
    file = path / "bundle.json"
    if not file.is_file():
        hint = "; a PyTorch file is turned into a bundle by `python -m biomass_jax.convert`" if path.is_file() else ""
        raise BundleError(f"{path}: not a model bundle (there is no {file}){hint}")
    try:
        meta = json.loads(file.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(meta, dict) or "schema_version" not in meta:
        raise BundleError(f"{file}: no field `schema_version`; this is not a bundle's description")
    if meta["schema_version"] != SCHEMA_VERSION:
        raise BundleError(
            f"{file}: schema_version {meta['schema_version']!r}, but this version of biomass_jax reads "
            f"{SCHEMA_VERSION}; convert the original checkpoint again, or use the matching release"
        )
    for field, kind in _REQUIRED.items():
        if not isinstance(meta.get(field), kind):
            raise BundleError(f"{file}: field `{field}` must be a {kind.__name__}, found {meta.get(field)!r}")
    if not isinstance(meta.get("uncertainty", {}), dict):
        raise BundleError(f"{file}: field `uncertainty` must be a dict, found {meta['uncertainty']!r}")
    return meta


def load(path: str | os.PathLike[str], sharding: object = None, *, background: bool = False) -> Bundle:
    """Open a bundle written on any number of devices.

    Args:
        path: the bundle's folder.
        sharding: where the variables go, one `jax.sharding.Sharding` or a tree of them; default, the first device.
        background: read the weights in a thread; whoever asks for them first waits, and meets the second error.

    Raises:
        BundleError: see `read_meta`; or weights that are damaged or do not fit the architecture.
    """
    meta = read_meta(path)
    if not background:
        return Bundle(Path(path), meta, _read_variables(path, meta, sharding))
    reader = ThreadPoolExecutor(1, "bundle reader")
    bundle = Bundle(Path(path), meta, reader.submit(_read_variables, path, meta, sharding))
    reader.shutdown(wait=False)
    return bundle


def _read_variables(path: str | os.PathLike[str], meta: dict[str, Any], sharding: object) -> dict[str, Any]:
    abstract = _without_empty(abstract_variables(_build(path, meta["task"], meta["architecture"])))
    folder = Path(path) / "variables"
    try:
        variables = _restore(folder, abstract, sharding)
    except BundleError:
        _compare_trees(str(folder), abstract, _stored_shapes(folder))  # names the arrays that don't fit
        raise
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def load_optimizer(bundle: Bundle, sharding: object = None) -> dict[str, Any] | None:
    """The optimiser's state of a bundle, {count, mu, nu, lr, plateau}, or None where it has none.

    Raises:
        BundleError: a damaged state, or moments that do not fit the parameters.
    """
    folder = bundle.path / "optimizer"
    if not folder.is_dir():
        return None
    abstract = _stored_shapes(folder)
    for moments in ("mu", "nu"):
        _compare_trees(f"{folder}: {moments}", bundle.variables["params"], abstract.get(moments, {}))
    return _restore(folder, abstract, sharding)


def verify(path: str | os.PathLike[str]) -> dict[str, float]:
    """Recompute a bundle's digests and check.

    Returns:
        Difference of each summary from the recorded one, relative to the largest recorded value.

    Raises:
        BundleError: a digest differs, of the weights or the area of applicability, or a summary by more than 1e-4.
    """
    bundle = load(path)
    found = weights_sha256(bundle.variables)
    if found != bundle.weights_sha256:
        raise BundleError(f"{path}: the weights' SHA-256 is {found}, bundle.json says {bundle.weights_sha256}")
    bundle.applicability  # noqa: B018  read, it checks its digest
    recorded, computed = bundle.meta["check"], compute_check(bundle.module(), bundle.variables)
    scale = max(abs(v) for v in (recorded["min"], recorded["max"])) or 1.0
    names = ("mean", "std", "min", "max", "values")
    differences = {n: float(np.max(np.abs(np.subtract(computed[n], recorded[n]))) / scale) for n in names}
    if worse := {n: d for n, d in differences.items() if not d <= CHECK_TOLERANCE}:
        raise BundleError(
            f"{path}: the model's output on the fixed input differs from bundle.json's `check` by {worse} "
            f"(relative to its largest value; allowed {CHECK_TOLERANCE})"
        )
    return differences


def _build(path: str | os.PathLike[str], task: str, architecture: dict[str, Any], dtype: str = "float32") -> Any:
    try:
        return build_module(task, architecture, dtype)
    except ArchitectureError as error:
        raise BundleError(f"{path}: {error}") from error


def _stored_shapes(folder: Path, what: str = "weights") -> dict[str, Any]:
    """What an Orbax folder holds, as a tree of `jax.ShapeDtypeStruct`."""
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise BundleError(f"{folder}: no readable {what} there: {_first_line(error)}") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def _restore(folder: Path, abstract: Any, sharding: object) -> Any:
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        sharding = jax.tree.map(lambda _: sharding, abstract)
    # By way of NumPy: Orbax takes twice as long to put hundreds of arrays on their devices one by one.
    return jax.device_put(_restore_plain(folder, abstract, "weights"), sharding)


def _restore_plain(folder: Path, abstract: dict[str, Any], what: str) -> Any:
    """Arrays on the host."""
    import orbax.checkpoint as ocp

    plain = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), abstract)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(abstract, restore_args=plain))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BundleError(f"{folder}: the {what} are damaged: {_first_line(error)}") from error
    _compare_trees(str(folder), abstract, found)
    return found


def _first_line(error: Exception) -> str:
    # Orbax's messages can run to pages; the first line says what happened.
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _compare_trees(where: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise a `BundleError` that names missing, unknown and misshapen arrays, the first few and their number."""
    want = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    have = {path: tuple(leaf.shape) for path, leaf in flatten(found).items()}
    faults = [f"missing {path} {want[path]}" for path in sorted(want.keys() - have.keys())]
    faults += [f"unknown {path} {have[path]}" for path in sorted(have.keys() - want.keys())]
    both = sorted(want.keys() & have.keys())
    faults += [f"{path} has shape {have[path]}, expected {want[path]}" for path in both if want[path] != have[path]]
    if faults:
        raise BundleError(f"{where}: weights do not fit the architecture: {name_list(faults)}")


def _without_empty(variables: dict[str, Any]) -> dict[str, Any]:
    # Orbax does not keep an empty `batch_stats`.
    return {key: tree for key, tree in variables.items() if tree}
