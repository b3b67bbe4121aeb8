"""What a sweep varies: the base config, the search space or grid, and the best config as a file."""

import itertools
import random
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from biomass_jax import configs
from biomass_jax.errors import SweepError

from .run_config import PREFIX, check_field, parse_config

CONFIGS = Path(configs.__path__[0]).resolve()
SAMPLERS = ("tpe", "random", "grid")

Value = str | int | float | bool | None
Space = dict[str, BaseDistribution]


def load_space(path: Path, sampler: str) -> Space:
    """The fields that a sweep varies, with what they may be.

    Args:
        path: a Python file with `get_space() -> {field: Optuna distribution}` and, for `grid`, also
            `get_grid() -> {field: [values]}`.
        sampler: one of `SAMPLERS`; under `grid` each field becomes a choice of its values.

    Raises:
        SweepError: no such function, or something else than the above in it.
    """
    name = "get_grid" if sampler == "grid" else "get_space"
    function = runpy.run_path(str(path)).get(name)
    if function is None:
        raise SweepError(f"{path}: no {name}(), which --sampler {sampler} needs")
    space = function()
    if not isinstance(space, dict) or not space:
        raise SweepError(f"{path}: {name}() gave {space!r}; expected a dict that names at least one field")
    if sampler == "grid":
        for field, values in space.items():
            if not isinstance(values, list | tuple) or not values or len(set(values)) < len(values):
                raise SweepError(f"{path}: {name}()[{field!r}] is {values!r}; expected a list of different values")
        space = {field: CategoricalDistribution(values) for field, values in space.items()}
    for field, distribution in space.items():
        if not isinstance(distribution, BaseDistribution):
            raise SweepError(
                f"{path}: {name}()[{field!r}] is {distribution!r}; expected one of optuna.distributions, for example "
                "FloatDistribution(1e-5, 1e-3, log=True) or CategoricalDistribution((64, 128))"
            )
    return space


def check_space(space: Space, config_path: Path, overrides: Sequence[str], space_path: Path) -> None:
    """Refuse a space that doesn't fit the config, before the first trial.

    Raises:
        SweepError: a field that the config lacks or that the command line fixes, or a value of another type.
    """
    config = parse_config(config_path, overrides)
    fixed = {override.removeprefix(PREFIX).partition("=")[0] for override in overrides}
    for field, distribution in space.items():
        check_field(config, field, str(space_path))
        if field in fixed:
            raise SweepError(f"{space_path} varies {field!r}, which the command line fixes; leave one of the two out")
        for value in _ends(distribution):
            if value is not None and not isinstance(value, str | int | float | bool):
                raise SweepError(
                    f"{space_path}: {field!r} may be {value!r}; a database keeps only text, numbers, booleans and "
                    "None: write a tuple as text, '(1, 1, 1, 1)'"
                )
            parse_config(config_path, [*overrides, *as_overrides({field: value})])


def _ends(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, FloatDistribution | IntDistribution):
        return distribution.low, distribution.high
    assert isinstance(distribution, CategoricalDistribution)
    return distribution.choices


def grid(space: Space, seed: int) -> list[dict[str, Value]]:
    """Every combination of a grid's values once, in an order fixed by the seed; trial k gets the k-th.

    Shuffled, so that a sweep that ends early has looked everywhere.
    """
    choices = {field: _ends(space[field]) for field in sorted(space)}
    combinations = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    random.Random(seed).shuffle(combinations)
    return combinations


def as_overrides(params: dict[str, Value]) -> list[str]:
    """Sampled values as arguments of `biomass_jax.main`; floats without loss."""
    return [f"{PREFIX}{field}={value}" for field, value in params.items()]


def best_config(path: Path, overrides: Sequence[str], params: dict[str, Value], about: str) -> str:
    """Text of a config file: the base config, with the command line's and the best trial's fields set.

    Args:
        path: the base config.
        overrides: `--config.field=value` of the sweep's command line.
        params: of the best trial.
        about: first line of its docstring.
    """
    arguments = [*overrides, *as_overrides(params)]
    config = parse_config(path, arguments)
    resolved = path.resolve()
    if resolved.is_relative_to(CONFIGS):
        folder = ".".join(("biomass_jax.configs", *resolved.parent.relative_to(CONFIGS).parts))
        imports = f"from ml_collections import config_dict\n\nfrom {folder} import {resolved.stem} as base"
        derived = "base.get_config()"
    else:
        imports = "import runpy\n\nfrom ml_collections import config_dict"
        derived = f'runpy.run_path({str(resolved)!r})["get_config"]()'
    lines = []
    for field in dict.fromkeys(argument.removeprefix(PREFIX).partition("=")[0] for argument in arguments):
        value = config
        for name in field.split("."):
            value = value[name]
        lines.append(f"    config.{field} = {value!r}\n")
    return (
        f'"""{about}\n\n    python -m biomass_jax.main --config THIS_FILE --workdir OUT\n"""\n\n{imports}\n\n\n'
        'def get_config() -> config_dict.ConfigDict:\n    """The base config with the best fields found."""\n'
        f"    config = {derived}.unlock()\n{''.join(lines)}    return config.lock()\n"
    )
