"""Fingerprints of what `make demo` leaves, to show that a change of the code did not change its results.

    python -m tests.end_to_end.fingerprints make demo_out --json before.json
    python -m tests.end_to_end.fingerprints compare before.json after.json

`make` lists a SHA-256 of each result, `compare` says which of them are equal. What training computes may differ in the
last bits where sums are taken in another order; such results carry numbers too, and pass while every number is within
1e-3 of the old one. Of the product only `biomass_jax.bundle.load` is used, so that lists of different versions of the
code can be compared. The libraries must be the same for both: some files carry their versions.
"""

import argparse
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio

TOLERANCE = 1e-3  # of the old number
# When the image was made, and what made it: different from one run, or one release, to the next.
VARYING_TAGS = ("SOURCE_MTIME_NS", "SOFTWARE")
COARSE = 4  # a trained map is also summed up by the means of 4 x 4 parts

Entry = dict[str, Any]  # sha256, and for what training computes `numbers` {name: number}


# One function a form of result: path -> entry


def file_bytes(path: Path) -> Entry:
    """The file as it is.

    Composites, labels, shards and synthetic granules hold no time, version or path of ours: tests of `data_prep` ask
    that a second run writes the same bytes.
    """
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def geoparquet(path: Path) -> Entry:
    """Columns, types and metadata of a GeoParquet file, without the text of its CRS.

    The CRS is PROJ's own text, which grows from one release of PROJ to the next. The coordinates are in the columns.
    """
    table = pq.read_table(path)
    metadata = {key.decode(): json.loads(value) for key, value in (table.schema.metadata or {}).items()}
    # The text of the CRS depended on PROJ's version, and the two kinds of table named different versions of GeoParquet.
    metadata.get("geo", {}).pop("version", None)
    for column in metadata.get("geo", {}).get("columns", {}).values():
        column.pop("crs", None)
    digest = hashlib.sha256(_canonical(metadata))
    for field in table.schema:
        digest.update(f"\n{field.name} {field.type} {field.nullable} ".encode())
        digest.update(_column(table.column(field.name)))
    return {"sha256": digest.hexdigest()}


def _column(column: pa.ChunkedArray) -> bytes:
    # Python's `repr` of a float is exact. In Arrow's buffers the unused bits are undefined.
    return repr(column.to_pylist()).encode()


def shards_metadata(path: Path) -> Entry:
    """The data set's own JSON inside TFDS's, without the versions of software."""
    found = json.loads(json.loads(path.read_text())["biomass_jax"])
    found.pop("software")
    return {"sha256": _sha256(_canonical(found))}


def prepare_record(path: Path) -> Entry:
    """A record of `prepare`: step, settings, result, and the names of its inputs and outputs.

    A file's fingerprint there is its size and time of change, and `digest` is a SHA-256 over such fingerprints: never
    the same in two runs. Only whether the file was there counts; what it holds has an entry of its own.
    """
    found = json.loads(path.read_text())
    found.pop("digest")
    for field in ("inputs", "outputs"):
        found[field] = {name: bool(fingerprint) for name, fingerprint in found[field].items()}
    return {"sha256": _sha256(_canonical(found))}


def bundle_weights(path: Path, *, trained: bool) -> Entry:
    """SHA-256 of a bundle's tensors; `path` is its bundle.json.

    Orbax's folders are not byte-stable, hence sorted path, dtype, shape and little-endian bytes of each tensor.
    """
    from biomass_jax import bundle

    meta = json.loads(path.read_text())
    digest, squares = hashlib.sha256(), 0.0
    for name, leaf in sorted(_leaves(bundle.load(path.parent).variables)):
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(_little_endian(array))
        squares += float(np.square(array.astype(np.float64)).sum())
    if digest.hexdigest() != meta["weights_sha256"]:
        raise SystemExit(
            f"{path}: weights_sha256 is {meta['weights_sha256']}, but the tensors' is {digest.hexdigest()}"
        )
    entry: Entry = {"sha256": digest.hexdigest()}
    if trained:
        entry["numbers"] = {"norm of all tensors": squares**0.5} | dict(_numbers(meta["training"]["scores"]))
    return entry


def bundle_description(path: Path, *, trained: bool) -> Entry:
    """What bundle.json says of model, input and output; weights, scores and `check` have entries of their own.

    The command, the data set and a trained bundle's source are paths as they were typed; the SHA-256 of that source is
    one of trained weights.
    """
    meta = json.loads(path.read_text())
    for field in ("weights_sha256", "check"):
        meta.pop(field)
    for field in ("versions", "command", *(("source", "sha256") if trained else ())):
        meta["provenance"].pop(field, None)
    for field in ("scores", "dataset"):
        meta["training"].pop(field, None)
    return {"sha256": _sha256(_canonical(meta))}


def bundle_check(path: Path) -> Entry:
    """The summary of the converted model's output on a fixed input; apart, since it is computed and not copied."""
    return {"sha256": _sha256(_canonical(json.loads(path.read_text())["check"]))}


def training_curve(path: Path) -> Entry:
    """metrics.jsonl without what depends on time; its numbers are the last validation and the lowest loss of all."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]
    validations = [line for line in lines if "val/loss" in line]
    numbers = {"best val/loss": min(line["val/loss"] for line in validations)} | dict(_numbers(validations[-1]))
    return {"sha256": _sha256(_canonical(lines)), "numbers": numbers}


def scores(path: Path) -> Entry:
    """Every number of an evaluation; its texts hold paths and versions."""
    found = json.loads(path.read_text())
    tables = {f"{row['table']} {row['group']}": row for row in found.pop("tables")}
    numbers = dict(_numbers(found)) | dict(_numbers(tables))
    return {"sha256": _sha256(_canonical(numbers)), "numbers": numbers}


def map_header(path: Path, *, trained: bool) -> Entry:
    """A map's grid, layout and tags.

    Neither the file's bytes nor all of its tags: they hold the image's time of change and the software's version. Of a
    trained map the weights' SHA-256 is left out too; they have an entry of their own. The CRS is an EPSG code, since
    its text depends on PROJ, and GDAL's `DERIVED_SUBDATASETS` are no tags of the file: they repeat its path.
    """
    left_out = (*VARYING_TAGS, *(("MODEL_SHA256",) if trained else ()))
    with rasterio.open(path) as file:
        profile = {key: value for key, value in file.profile.items() if key != "crs"}
        found = {
            "profile": profile | {"transform": tuple(file.transform)},
            "crs": file.crs and (file.crs.to_epsg() or file.crs.to_wkt()),
            "tags": {key: value for key, value in file.tags().items() if key not in left_out},
            "structure": file.tags(ns="IMAGE_STRUCTURE"),
            "bands": [file.descriptions, file.units, file.scales, file.offsets, [file.tags(i) for i in file.indexes]],
            "masks": [[flag.name for flag in flags] for flags in file.mask_flag_enums],
            "overviews": [file.overviews(i) for i in file.indexes],
        }
    return {"sha256": _sha256(_canonical(found))}


def map_pixels(path: Path, *, trained: bool) -> Entry:
    """A map's pixels and those of its overviews; of a trained map also a few numbers of its first band."""
    digest = hashlib.sha256()
    with rasterio.open(path) as file:
        values, nodata, overviews = file.read(), file.nodata, len(file.overviews(1))
    _add_array(digest, values)
    for level in range(overviews):
        with rasterio.open(path, OVERVIEW_LEVEL=level) as file:
            _add_array(digest, file.read())
    entry: Entry = {"sha256": digest.hexdigest()}
    if trained:
        entry["numbers"] = _map_numbers(values[0], nodata)
    return entry


def _map_numbers(values: np.ndarray, nodata: float) -> dict[str, float]:
    """Count, mean, standard deviation and percentiles of a map [H, W], and the means of its parts."""

    def valid(part: np.ndarray) -> np.ndarray:
        return part[part != nodata].astype(np.float64)

    known = valid(values)
    if not known.size:
        return {"count": 0}
    found = {"count": known.size, "mean": float(known.mean()), "std": float(known.std())}
    found |= {f"percentile {p}": float(np.percentile(known, p)) for p in (5, 50, 95)}
    for y, rows in enumerate(np.array_split(values, COARSE, axis=0)):
        for x, part in enumerate(np.array_split(rows, COARSE, axis=1)):
            if (inside := valid(part)).size:
                found[f"mean of part {y} {x}"] = float(inside.mean())
    return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _little_endian(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).tobytes()


def _add_array(digest: Any, array: np.ndarray) -> None:
    digest.update(f"{array.dtype.name} {array.shape}\n".encode())
    digest.update(_little_endian(array))


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Numbers anywhere inside what JSON held, by name; texts, null and booleans are passed over."""
    if isinstance(value, Mapping | list):
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in inside:
            yield from _numbers(item, f"{name} {key}".strip())
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value


# Kind -> the files of a demo's folder, and what makes an entry of one. No pictures: they depend on matplotlib.
KINDS: dict[str, tuple[str, Callable[[Path], Entry]]] = {
    "granule": ("granules/**/*.*", file_bytes),
    "footprints": ("footprints/*.parquet", geoparquet),
    "composite": ("composites/**/*.tif", file_bytes),
    "label": ("labels/**/*.tif", file_bytes),
    "label shots": ("labels/**/*.parquet", file_bytes),
    "chip index": ("chips/chips.parquet", geoparquet),
    "shard": ("shards/*.array_record*", file_bytes),
    "shards metadata": ("shards/metadata.json", shards_metadata),
    "shards info": ("shards/dataset_info.json", file_bytes),
    "shards features": ("shards/features.json", file_bytes),
    "prepare record": ("state/**/*.json", prepare_record),
    "prepare table": ("state/**/*.parquet", geoparquet),
    "converted weights": ("model/bundle.json", functools.partial(bundle_weights, trained=False)),
    "converted bundle": ("model/bundle.json", functools.partial(bundle_description, trained=False)),
    "converted check": ("model/bundle.json", bundle_check),
    "map pixels": ("maps/*.tif", functools.partial(map_pixels, trained=False)),
    "map header": ("maps/*.tif", functools.partial(map_header, trained=False)),
    "trained weights": ("*/best/bundle.json", functools.partial(bundle_weights, trained=True)),
    "trained bundle": ("*/best/bundle.json", functools.partial(bundle_description, trained=True)),
    "training curve": ("*/metrics.jsonl", training_curve),
    "scores": ("scores/metrics.json", scores),
    "trained map pixels": ("biomass/*.tif", functools.partial(map_pixels, trained=True)),
    "trained map header": ("biomass/*.tif", functools.partial(map_header, trained=True)),
}


def make(out: Path) -> list[Entry]:
    """Entries of everything in a demo's folder: kind, file, sha256 and, for what training computes, numbers."""
    entries = []
    for kind, (pattern, entry_of) in KINDS.items():
        paths = sorted(path for path in out.glob(pattern) if path.is_file())
        if not paths:
            raise SystemExit(f"{out}: no {kind} ({pattern}); is it a folder that `make demo` has finished?")
        entries += [{"kind": kind, "file": path.relative_to(out).as_posix(), **entry_of(path)} for path in paths]
    return entries


def compare(old: list[Entry], new: list[Entry]) -> list[tuple[str, str, str, str]]:
    """Rows (kind, file, status, remark); status is equal, within 1e-3, differs, missing or new."""
    before = {(entry["kind"], entry["file"]): entry for entry in old}
    after = {(entry["kind"], entry["file"]): entry for entry in new}
    rows = []
    for key in before | after:
        if key not in after:
            rows.append((*key, "missing", ""))
        elif key not in before:
            rows.append((*key, "new", ""))
        else:
            rows.append((*key, *_status(before[key], after[key])))
    return rows


def _status(old: Entry, new: Entry) -> tuple[str, str]:
    """Status and remark; where numbers decide, the remark shows the one that is furthest off: name old, new."""
    before, after = old.get("numbers", {}), new.get("numbers", {})
    if old["sha256"] == new["sha256"] and before == after:
        return "equal", ""
    if not before:
        return "differs", ""
    if gone := sorted(before.keys() - after.keys()):
        return "differs", f"(no number {', '.join(gone)})"
    worst = max(before, key=lambda name: _distance(before[name], after[name]))
    within = all(_distance(before[name], after[name]) <= TOLERANCE for name in before)
    return "within 1e-3" if within else "differs", f"({worst} {before[worst]:.8g}, {after[worst]:.8g})"


def _distance(old: float, new: float) -> float:
    """Relative to the old number; infinite for a NaN and for what was exactly 0."""
    if old == new:
        return 0.0
    relative = abs(new - old) / abs(old) if old else np.inf
    return relative if np.isfinite(relative) else np.inf


def report(rows: list[tuple[str, str, str, str]]) -> bool:
    """Print the table and the counts; whether nothing differs or is missing."""
    widths = [max([len(row[column]) for row in rows], default=0) for column in range(3)]
    for row in rows:
        print("  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip())
    counts = {
        name: sum(row[2] == name for row in rows) for name in ("equal", "within 1e-3", "differs", "missing", "new")
    }
    last = f"{counts['equal']} equal, {counts['within 1e-3']} within 1e-3, {counts['differs']} differ"
    print(last + "".join(f", {counts[name]} {name}" for name in ("missing", "new") if counts[name]))
    return not counts["differs"] and not counts["missing"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="list the fingerprints of a folder")
    making.add_argument("folder", type=Path, help="what `make demo` wrote")
    making.add_argument("--json", type=Path, required=True, help="the list to write")
    comparing = commands.add_parser(
        "compare", help="compare two lists; exit code 1 where something differs or is missing"
    )
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    args = parser.parse_args(arguments)
    if args.command == "make":
        entries = make(args.folder)
        args.json.write_text(json.dumps(entries, indent=1) + "\n")
        print(f"{args.json}: {len(entries)} entries")
        return 0
    return 0 if report(compare(json.loads(args.old.read_text()), json.loads(args.new.read_text()))) else 1


if __name__ == "__main__":
    sys.exit(main())
