"""A model on disk: weights, architecture, bands, statistics and where they came from.

A bundle is a folder with `bundle.json`, Orbax `variables/` and, to train further, Orbax `optimizer/`; a calibrated one
has a section `uncertainty` in `bundle.json` and may have its area of applicability in Orbax `applicability/`. Nothing
else is needed to make a map, but for an adapter (see adapter.py), which names the bundle whose weights it updates.
Reading `bundle.json` alone (`read_meta`) does not start JAX.
"""

import functools
import os
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

from biomass_jax.adapter import Adapter, check_base, find_base, lora_of, shared
from biomass_jax.data.labels import Label, of_output
from biomass_jax.errors import ArchitectureError, BundleError
from biomass_jax.models.build import CHECK_SEED, abstract_variables, architecture_of, build_module, dummy_inputs
from biomass_jax.models.lora import Lora, merge
from biomass_jax.runtime import environment
from biomass_jax.trees import (
    SCHEMA_VERSION,
    compare_trees,
    flatten,
    read_meta,
    restore_plain,
    stored_shapes,
    unflatten,
    weights_sha256,
    without_empty,
    write_folder,
)
from biomass_jax.version import __version__

PIXEL_SIZE = 30.0  # metres, of HLS
CHECK_TOLERANCE = 1e-4


class Bundle:
    """A bundle in memory.

    Attributes:
        path: its folder.
        meta: `bundle.json`; of an adapter what its whole model would have there.
        lora: the updates that the variables hold beside the weights; None where they are within them.
    """

    def __init__(
        self,
        path: Path,
        meta: dict[str, Any],
        variables: dict[str, Any] | Future[dict[str, Any]],
        lora: Lora | None = None,
    ) -> None:
        """`variables` may still be read; then `variables` waits for them."""
        self.path, self.meta, self._variables, self.lora = path, meta, variables, lora

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
        found = restore_plain(folder, stored_shapes(folder, "arrays"), "arrays")
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
        """The Flax module that `variables` belong to; `attention` as models/fused/choice.py has it."""
        module = _build(self.path, self.task, self.meta["architecture"], dtype)
        return module.clone(attention=attention, lora=self.lora)


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
    adapter: Adapter | None = None,
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
        adapter: write it as an adapter; `variables` hold its updates beside the weights.
        overwrite: replace a bundle that is there.

    Raises:
        BundleError: the folder exists, the variables do not fit the architecture, or they give no finite output.
    """
    path = Path(path)
    _refuse_existing(path, overwrite)
    module = _build(path, task, architecture)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    own, section = variables, {}
    if adapter is not None:
        mine = {name: leaf for name, leaf in flatten(variables).items() if name not in adapter.kept}
        own, section = unflatten(mine), {"adapter": adapter.section(path)}
        variables = merge(variables, adapter.lora.scale)
    compare_trees(str(path), abstract_variables(module), variables)
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
        **section,
    }
    if not np.isfinite([*meta["check"]["values"], meta["check"]["mean"]]).all():
        raise BundleError(f"{path}: the model gives NaN or infinite values on a fixed input; its weights are unusable")
    trees = {"variables": without_empty(own)}
    if optimizer is not None:
        trees["optimizer"] = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "shape") else np.asarray(leaf), optimizer)
    return write_folder(path, meta, trees)


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
    trees = {"variables": without_empty(bundle.variables)}
    if applicability is not None:
        trees["applicability"] = dict(applicability)
        section["applicability_sha256"] = weights_sha256(trees["applicability"])
    meta = bundle.meta | {
        "output": bundle.meta["output"] | {"bands": list(output_bands)},
        "provenance": bundle.meta["provenance"] | dict(provenance),
        "uncertainty": section,
    }
    return write_folder(path, meta, trees)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise BundleError(f"{path}: already exists; choose another folder or ask to overwrite it")


def load(
    path: str | os.PathLike[str],
    sharding: object = None,
    *,
    background: bool = False,
    base: str | os.PathLike[str] | None = None,
) -> Bundle:
    """Open a bundle written on any number of devices; of an adapter the whole model, merged in memory.

    Args:
        path: the bundle's folder.
        sharding: where the variables go, one `jax.sharding.Sharding` or a tree of them; default, the first device.
        background: read the weights in a thread; whoever asks for them first waits, and meets the second error.
        base: folder of an adapter's base, where it doesn't lie where it did.

    Raises:
        BundleError: see `read_meta`; an adapter whose base isn't found, a base for what is no adapter; or weights that
            are damaged or do not fit the architecture.
    """
    meta = read_meta(path)
    section = meta.pop("adapter", None)
    if section is None and base is not None:
        raise BundleError(f"{path}: is a whole model and no adapter; leave its base, {base}, out")
    under = None if section is None else (find_base(path, section, base), lora_of(path, section))
    arguments = (path, meta, sharding, under)
    if not background:
        return Bundle(Path(path), meta, _read_variables(*arguments))
    reader = ThreadPoolExecutor(1, "bundle reader")
    bundle = Bundle(Path(path), meta, reader.submit(_read_variables, *arguments))
    reader.shutdown(wait=False)
    return bundle


def load_adapter(path: str | os.PathLike[str], base: Bundle) -> Bundle:
    """Open an adapter with its updates beside the weights of its base, whose arrays it shares.

    Raises:
        BundleError: see `read_meta`; no adapter, one of another base, or arrays that are damaged or do not fit.
    """
    meta = read_meta(path)
    check_base(path, meta, base.path, base.weights_sha256)
    lora = lora_of(path, meta.pop("adapter"))
    own = jax.device_put(_read_updates(path, meta, lora, base.variables), jax.tree.leaves(base.variables)[0].sharding)
    return Bundle(Path(path), meta, own, lora)


def _read_variables(
    path: str | os.PathLike[str], meta: dict[str, Any], sharding: object, under: tuple[Path, Lora] | None = None
) -> dict[str, Any]:
    return _put(_read_plain(path, meta, under), sharding)


def _read_plain(
    path: str | os.PathLike[str], meta: dict[str, Any], under: tuple[Path, Lora] | None = None
) -> dict[str, Any]:
    """{"params", "batch_stats"} on the host; of an adapter merged with its base, in `under`."""
    if under is not None:
        place, lora = under
        about = read_meta(place)
        section = about.pop("adapter", None)
        below = None if section is None else (find_base(place, section), lora_of(place, section))
        return merge(_read_updates(path, meta, lora, _read_plain(place, about, below)), lora.scale)
    abstract = without_empty(abstract_variables(_build(path, meta["task"], meta["architecture"])))
    folder = Path(path) / "variables"
    try:
        variables = restore_plain(folder, abstract, "weights")
    except BundleError:
        compare_trees(str(folder), abstract, stored_shapes(folder))  # names the arrays that don't fit
        raise
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def _read_updates(
    path: str | os.PathLike[str], meta: dict[str, Any], lora: Lora, base: dict[str, Any]
) -> dict[str, Any]:
    """An adapter's own arrays, on the host, with the rest taken from its base's variables."""
    folder = Path(path) / "variables"
    own = flatten(restore_plain(folder, stored_shapes(folder), "weights"))
    wanted = abstract_variables(_build(path, meta["task"], meta["architecture"]).clone(lora=lora))
    found = {name: leaf for name, leaf in shared(base).items() if name in flatten(wanted)} | own
    variables = unflatten(found)
    compare_trees(str(folder), wanted, variables)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def load_optimizer(bundle: Bundle, sharding: object = None) -> dict[str, Any] | None:
    """The optimiser's state of a bundle, {count, mu, nu, lr, plateau}, or None where it has none.

    Raises:
        BundleError: a damaged state, or moments that do not fit the parameters.
    """
    folder = bundle.path / "optimizer"
    if not folder.is_dir():
        return None
    abstract = stored_shapes(folder)
    for moments in ("mu", "nu"):
        compare_trees(f"{folder}: {moments}", bundle.variables["params"], abstract.get(moments, {}))
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


def _restore(folder: Path, abstract: Any, sharding: object) -> Any:
    # By way of NumPy: Orbax takes twice as long to put hundreds of arrays on their devices one by one.
    return _put(restore_plain(folder, abstract, "weights"), sharding)


def _put(tree: dict[str, Any], sharding: object) -> Any:
    """Arrays of the host where they are to lie; `sharding` as for `load`."""
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.device_put(tree, sharding)
