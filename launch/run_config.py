"""The config of trainings that another command starts: as its command line has it, and what they depend on."""

import difflib
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from biomass_jax.errors import BiomassError, SweepError

PREFIX = "--config."


def parse_config(path: Path, overrides: Sequence[str]) -> Any:
    """The config that `biomass_jax.main --config PATH OVERRIDES` would run.

    Raises:
        SweepError: a field that the config lacks, or a value that doesn't fit the field's type.
    """
    plain = _parse(path, [])
    for override in overrides:
        if not override.startswith(PREFIX) or "=" not in override:
            raise SweepError(f"unexpected argument {override!r}; fields are given as --config.field=value")
        check_field(plain, override.removeprefix(PREFIX).partition("=")[0], f"{path}: the command line")
    return _parse(path, overrides)


def _parse(path: Path, overrides: Sequence[str]) -> Any:
    values, argv = flags.FlagValues(), ["sweep", *overrides]
    config = runpy.run_path(str(path))["get_config"]()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as error:
        raise SweepError(f"{path} with {' '.join(overrides)}: {error}") from error
    return config


def check_field(config: Any, field: str, origin: str) -> None:
    """Refuse a dotted field that the config lacks.

    Raises:
        SweepError: names the field, who asked for it, and the nearest one that there is.
    """
    if field not in (known := fields(config)):
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(field, known, 1))
        raise SweepError(f"{origin} names {field!r}, a field that the config lacks{near}")


def fields(config: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields of a config that hold values."""
    found = []
    for name, value in config.items():
        found += fields(value, f"{prefix}{name}.") if hasattr(value, "items") else [f"{prefix}{name}"]
    return found


def depends_on(config: ConfigDict, *, data: Sequence[str], start: Sequence[str]) -> dict[str, Any]:
    """What trainings depend on that a command starts, as JSON: fields, and the data and bundles that they name.

    Args:
        config: of all of them.
        data: every `data.path`.
        start: every bundle of `init_from`.

    Raises:
        SweepError: data or a bundle that can't be used.
    """
    if "data" in config and not data:
        raise SweepError("config.data.path is not given; add --config.data.path=FOLDER, shards or GeoTIFF folders")
    try:
        return {
            "fields": config.to_dict(),
            "data": {path: _data_digests(config, path) for path in data},
            "init_from": {path: _bundle(path)["weights_sha256"] for path in start},
            "bundles": {path: _taken_from(path) for path in start},
        }
    except BiomassError as error:
        raise SweepError(str(error)) from error


# JAX takes seconds to import, and what starts trainings needs none.
def _data_digests(config: ConfigDict, path: str) -> dict[str, str]:
    from biomass_jax.training.run import open_split

    one = config.copy_and_resolve_references().unlock()
    one.data.path = path
    return {split: open_split(one, split).digest() for split in ("train", "val")}


def _bundle(path: str) -> dict[str, Any]:
    from biomass_jax.bundle import read_meta

    return read_meta(path)


def _taken_from(path: str) -> dict[str, Any]:
    from biomass_jax.training.run import taken_from

    return taken_from(_bundle(path))
