"""What a model's input has to be: bands, means, stds, fill, sensors; from declarations and flags, or a named preset."""

from dataclasses import dataclass
from typing import Any

from biomass_jax.convert.declared import Declared
from biomass_jax.data import bands as band_table
from biomass_jax.errors import ConvertError


@dataclass(frozen=True)
class Preset:
    """Published statistics of the six bands, in the band table's order, and the sensors they were taken over."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    sensors: tuple[str, ...]


PRESETS = {
    # The released granite-geospatial-biomass config.yaml; its model card says HLS L30.
    "granite": Preset(
        (547.36707, 898.5121, 1020.9082, 2665.5352, 2340.584, 1610.1407),
        (411.4701, 558.54065, 815.94025, 812.4403, 1113.7145, 1067.641),
        ("L30",),
    ),
    # Prithvi's published HLS statistics, arXiv 2310.18660.
    "prithvi": Preset(
        (775.2290, 1080.9928, 1228.5856, 2497.2023, 2204.2139, 1610.8325),
        (1281.5261, 1270.0298, 1399.4803, 1368.3446, 1291.6764, 1154.5057),
        (),
    ),
}


@dataclass(frozen=True)
class InputFlags:
    """What the user says about the input: None where a flag was not given."""

    bands: tuple[str, ...] | None = None
    means: tuple[float, ...] | None = None
    stds: tuple[float, ...] | None = None
    statistics: str | None = None
    fill: float | None = None
    sensors: tuple[str, ...] | None = None


def build(declared: Declared, flags: InputFlags, in_channels: int) -> tuple[dict[str, Any], list[str]]:
    """The bundle's `input` entry.

    Args:
        declared: the checkpoint's and the config's arguments.
        flags: the user's.
        in_channels: input channels of the weights.

    Returns:
        The entry, and a sentence for each missing item that names its flags.

    Raises:
        ConvertError: sources contradict each other or the number of channels, or a value makes no sense.
    """
    _check_no_data(declared)
    missing: list[str] = []
    names = _bands(declared, flags.bands)
    if names is None:
        missing.append("bands (--bands, names in the weights' order)")
    elif len(names) != in_channels:
        raise ConvertError(f"{len(names)} bands ({', '.join(names)}), but the weights take {in_channels} channels")
    means = _numbers("means", declared, flags.means, flags.statistics, names)
    stds = _numbers("stds", declared, flags.stds, flags.statistics, names)
    for name, values in (("means", means), ("stds", stds)):
        if values is None:
            missing.append(f"{name} (--{name}, --config config.yaml, or --statistics {'|'.join(PRESETS)})")
        elif len(values) != in_channels:
            raise ConvertError(f"{len(values)} {name}, but the weights take {in_channels} channels")
    if stds is not None and min(stds) <= 0:
        raise ConvertError(f"stds are {list(stds)}; expected numbers above 0")
    sensors = flags.sensors
    if sensors is None and names and means and stds:
        sensors = _sensors_of(names, means, stds)
    meta = {
        "bands": list(names or ()),
        "units": band_table.UNITS,
        "fill": band_table.FILL if flags.fill is None else flags.fill,
        "means": list(means or ()),
        "stds": list(stds or ()),
        "sensors": list(sensors or ()),
        "no_data_rule": band_table.NO_DATA_RULE,
    }
    return meta, missing


def _check_no_data(declared: Declared) -> None:
    said = declared.data.get("no_data_replace")
    if said is not None and said.value not in (0, None):
        raise ConvertError(
            f"{said.where}: no_data_replace is {said.value!r}; maps are made with 0 in place of no-data, so that these "
            "weights would see other inputs than in training"
        )


def _bands(declared: Declared, given: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The band names in the weights' order; every source that names them must name the same."""
    sources = [(given, "--bands")] if given is not None else []
    for arguments, name in ((declared.model, "bands"), (declared.data, "output_bands")):
        if (said := arguments.get(name)) is not None and said.value is not None:
            sources.append((said.value, f"{said.where}: {name}"))
    found: list[tuple[tuple[str, ...], str]] = []
    for value, where in sources:
        if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
            raise ConvertError(f"{where} is {value!r}; expected band names")
        names = tuple(name.upper() for name in value)
        unknown = sorted(set(names) - set(band_table.BAND_NAMES))
        if unknown or len(set(names)) != len(names):
            raise ConvertError(
                f"{where} is {list(value)}; expected each name once, out of {', '.join(band_table.BAND_NAMES)}"
            )
        found.append((names, where))
    for names, where in found[1:]:
        if names != found[0][0]:
            raise ConvertError(f"bands are {list(found[0][0])} in {found[0][1]} and {list(names)} in {where}")
    return found[0][0] if found else None


def _numbers(
    name: str, declared: Declared, given: tuple[float, ...] | None, preset: str | None, bands: tuple[str, ...] | None
) -> tuple[float, ...] | None:
    """Means or stds in the bands' order; every source that gives them must give the same."""
    sources = [(given, f"--{name}")] if given is not None else []
    if (said := declared.data.get(name)) is not None and said.value is not None:
        sources.append((said.value, f"{said.where}: {name}"))
    if preset is not None and bands is not None:
        of_band = dict(zip(band_table.BAND_NAMES, getattr(PRESETS[preset], name), strict=True))
        sources.append((tuple(of_band[band] for band in bands), f"--statistics {preset}"))
    for value, where in sources:
        is_list = isinstance(value, list | tuple)
        if not is_list or not all(isinstance(v, int | float) and abs(v) < float("inf") for v in value):
            raise ConvertError(f"{where} is {value!r}; expected a list of finite numbers")
    found = [(tuple(float(v) for v in value), where) for value, where in sources]
    for values, where in found[1:]:
        if values != found[0][0]:
            raise ConvertError(f"{name} are {list(found[0][0])} in {found[0][1]} and {list(values)} in {where}")
    return found[0][0] if found else None


def _sensors_of(bands: tuple[str, ...], means: tuple[float, ...], stds: tuple[float, ...]) -> tuple[str, ...]:
    """Published statistics tell the sensors they were taken over, whichever way they were given."""
    for preset in PRESETS.values():
        published = {b: (m, s) for b, m, s in zip(band_table.BAND_NAMES, preset.means, preset.stds, strict=True)}
        if tuple(published[band] for band in bands) == tuple(zip(means, stds, strict=True)):
            return preset.sensors
    return ()
