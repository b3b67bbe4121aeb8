"""`biomass-jax catalog`: maps, mosaics and changes as a STAC collection, which QGIS, pystac and odc-stac open.

Each raster has its item beside it, made here where `predict`, `mosaic` or `change` didn't; the collection's file leads
to all of them by relative paths, so that the folder can be moved, or served as it lies.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomass_jax.data.raster import stac
from biomass_jax.data.raster.inputs import granule_name
from biomass_jax.errors import RasterError, RegionalError
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import check_local, expanded, write_json
from biomass_jax.runtime.lock import writer_beside
from biomass_jax.runtime.progress import Progress
from biomass_jax.runtime.settings import add_options, checked, options_of, setting

log = logging.getLogger(__name__)

NAME = "collection.json"
_OF_ONE_MAP = ("statistics", "spatial_resolution")  # of its bands
_LICENSE = re.compile(r"[\w.+-]+")  # as STAC has it
_NASA = {"name": "NASA LP DAAC", "roles": ["producer"], "url": "https://lpdaac.usgs.gov"}  # of the granules


@dataclass(frozen=True)
class Catalog:
    """The settings of `catalog`."""

    title: str = setting("Above-ground biomass", "of the collection; its id follows from it")
    description: str = setting("Maps of above-ground biomass, made by biomass_jax.", "of the collection")
    license: str = setting("other", "of the maps: an identifier of SPDX such as CC-BY-4.0, or other")
    provider: str | None = setting(None, "who made the maps")


@dataclass
class Listed:
    """What the items of a collection have in common, and which maps have none.

    Attributes:
        items: paths of the maps that have one, by their items' ids.
        left_out: why each of the others has none.
    """

    items: dict[str, Path] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    _order: list[tuple[int, Path]] = field(default_factory=list)
    _boxes: list[list[float]] = field(default_factory=list)
    _times: list[str] = field(default_factory=list)
    _values: dict[str, set[str]] = field(default_factory=dict)
    _assets: dict[str, dict[str, Any]] = field(default_factory=dict)
    _granules: bool = False

    def add(self, path: Path, item: dict[str, Any]) -> None:
        """Count a map's item."""
        about = item["properties"]
        self.items[item["id"]] = path
        self._order.append((min(stac.KINDS.index(one) for one in about["keywords"] if one in stac.KINDS), path))
        self._boxes.append(item["bbox"])
        times = [about.get(name) or about["datetime"] for name in ("start_datetime", "end_datetime")]
        self._times = [min([*self._times, *times]), max([*self._times, *times])]
        for name in ("keywords", "proj:code", "processing:software"):
            found = about.get(name)
            for one in found if isinstance(found, list) else [found]:
                if one is not None:  # sets of JSON: some values are objects
                    self._values.setdefault(name, set()).add(json.dumps(one, sort_keys=True))
        for name, asset in item["assets"].items():
            kept = {key: _common(asset[key]) for key in ("type", "roles", "raster:bands") if key in asset}
            known = self._assets.setdefault(name, kept)
            self._assets[name] = {key: value for key, value in known.items() if kept.get(key) == value}
        far = (link["href"] for link in item["links"] if "://" in link["href"])
        self._granules = self._granules or any(map(granule_name, far))

    def collection(self, chosen: Catalog, folder: Path) -> dict[str, Any]:
        """The collection, for a file of that folder."""
        values = {name: [json.loads(one) for one in sorted(found)] for name, found in self._values.items()}
        providers = [{"name": chosen.provider, "roles": ["processor"]}] if chosen.provider else []
        providers += [_NASA] if self._granules else []
        fields = {
            "id": id_of(chosen),
            "title": chosen.title,
            "description": chosen.description,
            "keywords": values["keywords"],
            "license": chosen.license,
            **({"providers": providers} if providers else {}),
            "extent": {"spatial": {"bbox": [united(self._boxes)]}, "temporal": {"interval": [self._times]}},
            "summaries": values,
            "item_assets": self._assets,
        }
        text = json.dumps(fields)
        used = [url for prefix, url in stac.EXTENSIONS.items() if f'"{prefix}:' in text]
        # Maps come first: odc-stac takes the bands of the first item for those of all.
        links = [
            {"rel": "item", "href": stac.href_to(stac.item_path(path), folder), "type": stac.ITEM_TYPE}
            for _, path in sorted(self._order)
        ]
        links.insert(0, {"rel": "root", "href": f"./{NAME}", "type": stac.JSON_TYPE})
        return {"type": "Collection", "stac_version": stac.VERSION, "stac_extensions": used, **fields, "links": links}


def _common(value: object) -> object:
    """Of an asset's field what maps may have in common: bands without what was measured of one map."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [{key: text for key, text in band.items() if key not in _OF_ONE_MAP} for band in value]
    return value


def id_of(chosen: Catalog) -> str:
    """The collection's id: its title in small letters, with hyphens between the words."""
    return re.sub(r"\W+", "-", chosen.title.casefold()).strip("-")


def united(boxes: Iterable[Sequence[float]]) -> list[float]:
    """The smallest box around some: west, south, east, north in degrees, west more than east across the antimeridian.

    What it leaves out is the widest gap between them around the Earth.
    """
    every = list(boxes)
    spans = sorted((west, east if east >= west else east + 360) for west, _, east, _ in every)
    reach = max(east for _, east in spans) - 360  # how far east what lies west of a span goes
    widest, first, last = 0.0, -180.0, 180.0
    for west, east in spans:
        if west - reach > widest:
            widest, first, last = west - reach, west, reach
        reach = max(reach, east)
    last += 360 if last <= -180 else -360 if last > 180 else 0
    return [first, min(box[1] for box in every), round(last, 7), max(box[3] for box in every)]


def catalog(maps: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], **settings: object) -> Listed:
    """Write the collection of maps, and the items of those that have none or an old one.

    Memory grows by some hundred bytes a map. The same maps and settings give the same bytes.

    Args:
        maps: paths of maps, mosaics and changes.
        out: folder of the collection's file.
        **settings: fields of `Catalog`.

    Raises:
        ConfigError: a setting that can't be.
        RegionalError: a title, description or license that can't be, or no map that can have an item.
        OSError: a file can't be written.
    """
    chosen, folder, listed = checked(Catalog, settings), Path(os.path.abspath(out)), Listed()
    if not _LICENSE.fullmatch(chosen.license):
        raise RegionalError(
            f"license is {chosen.license!r}; expected an identifier of SPDX, such as CC-BY-4.0, or other"
        )
    for name, text in (("title", id_of(chosen)), ("description", chosen.description)):
        if not text:
            raise RegionalError(f"{name} is {getattr(chosen, name)!r}; expected some words (--{name})")
    paths = sorted({Path(os.path.abspath(path)) for path in maps})
    with Progress("items", len(paths), terminal=False, every=15.0) as shown:
        for path in paths:
            if why := _add(path, listed, folder / NAME):
                listed.left_out[str(path)] = why
            shown.advance(1)
    if not listed.items:
        first = next((f"{path}: {why}" for path, why in listed.left_out.items()), "give some (--maps)")
        raise RegionalError(f"{out}: of {len(paths)} maps none can have an item: {first}")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NAME, listed.collection(chosen, folder))
    for path in listed.items.values():
        stac.join_collection(path, folder / NAME, id_of(chosen))
    return listed


def _add(path: Path, listed: Listed, collection: Path) -> str:
    """Take a map in, with its item made where need be; why it can't be, "" where it can."""
    try:
        if stac.item_path(path) == collection:
            raise RasterError(f"its item would be {collection.name}, the collection's own file; rename it")
        if path.stem in listed.items:
            raise RasterError(
                f"{listed.items[path.stem]} has the same name, and with it the same id; rename one of them"
            )
        if why := stac.renew_item(path):
            return why  # the log has it
    except (RasterError, OSError) as error:
        log.warning("%s: has no STAC item: %s", path, error)
        return str(error)
    listed.add(path, stac.read_item(path))
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biomass_jax.regional.catalog",
        description="Maps, mosaics and changes as a STAC collection; an item beside each of them where it lacks one.",
        allow_abbrev=False,
    )
    parser.add_argument("--maps", required=True, nargs="+", metavar="MAP", help="maps, or patterns of such")
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder of {NAME}, best the one of the maps")
    add_options(parser, Catalog)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = _parser().parse_args(argv)
    try:
        environment.settle(jax=False)
        check_local(args.out, "--out")
        with writer_beside(Path(args.out)):
            listed = catalog(expanded(args.maps), args.out, **options_of(args, Catalog))
    except Exception as error:
        return environment.failed(error)
    many = "" if len(listed.items) == 1 else "s"
    print(f"{Path(args.out) / NAME}: {len(listed.items)} item{many}")
    if listed.left_out:
        print(f"error: {len(listed.left_out)} of the maps have no item, as said above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
