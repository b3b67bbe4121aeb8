"""A bundle's folder as trees of arrays and their description, written whole and compared before they are used."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from biomass_jax.errors import BundleError, name_list
from biomass_jax.runtime.files import replace_folder

SCHEMA_VERSION = 1
_REQUIRED = {"task": str, "weights_sha256": str} | dict.fromkeys(
    ("architecture", "input", "output", "training", "provenance", "check"), dict
)


def flatten(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries -> {'a/b/c': leaf}, sorted by path."""
    return dict(sorted(traverse_util.flatten_dict(tree, sep="/").items()))


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """What `flatten` took apart."""
    return traverse_util.unflatten_dict(flat, sep="/")


def weights_sha256(variables: dict[str, Any]) -> str:
    """Digest over sorted path, dtype, shape and little-endian bytes (Orbax folders are not byte-stable)."""
    digest = hashlib.sha256()
    for path, leaf in flatten(variables).items():
        array = np.asarray(leaf)
        digest.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(np.ascontiguousarray(little).data if little.size else b"")
    return digest.hexdigest()


def write_folder(path: Path, meta: dict[str, Any], trees: dict[str, Any]) -> Path:
    """Write `bundle.json` and an Orbax folder a tree under another name, and rename the whole.

    Args:
        path: the folder to make.
        meta: of `bundle.json`.
        trees: arrays by the name of their folder; Orbax keeps no empty tree.
    """
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


def stored_shapes(folder: Path, what: str = "weights") -> dict[str, Any]:
    """What an Orbax folder holds, as a tree of `jax.ShapeDtypeStruct`; `what` it is, for messages.

    Raises:
        BundleError: it can't be read.
    """
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            stored = checkpointer.metadata(folder.absolute()).item_metadata.tree
    except (ValueError, KeyError, OSError, AttributeError) as error:
        raise BundleError(f"{folder}: no readable {what} there: {_first_line(error)}") from error
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), stored)


def restore_plain(folder: Path, abstract: dict[str, Any], what: str) -> Any:
    """Arrays of an Orbax folder, on the host, of exactly the shapes of `abstract`.

    Raises:
        BundleError: arrays that are missing, unknown, of another shape, or damaged.
    """
    import orbax.checkpoint as ocp

    plain = jax.tree.map(lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=x.dtype), abstract)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.restore(folder.absolute(), args=ocp.args.PyTreeRestore(abstract, restore_args=plain))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BundleError(f"{folder}: the {what} are damaged: {_first_line(error)}") from error
    compare_trees(str(folder), abstract, found)
    return found


def _first_line(error: Exception) -> str:
    # Orbax's messages can run to pages; the first line says what happened.
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def compare_trees(where: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise a `BundleError` that names missing, unknown and misshapen arrays, the first few and their number."""
    want = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    have = {path: tuple(leaf.shape) for path, leaf in flatten(found).items()}
    faults = [f"missing {path} {want[path]}" for path in sorted(want.keys() - have.keys())]
    faults += [f"unknown {path} {have[path]}" for path in sorted(have.keys() - want.keys())]
    both = sorted(want.keys() & have.keys())
    faults += [f"{path} has shape {have[path]}, expected {want[path]}" for path in both if want[path] != have[path]]
    if faults:
        raise BundleError(f"{where}: weights do not fit the architecture: {name_list(faults)}")


def without_empty(variables: dict[str, Any]) -> dict[str, Any]:
    """Variables as Orbax keeps them: it doesn't keep an empty `batch_stats`."""
    return {key: tree for key, tree in variables.items() if tree}
