"""Settings declared once: a dataclass a group, each field with its type, default, choices or range, and a line of help.

Configs (`to_config`), checks (`check`), command lines (`add_options`) and the tables of the docs (`table`) follow from
the declaration.
"""

import argparse
import dataclasses
import importlib
import math
import types
import typing
from collections.abc import Callable, Container, Iterator
from typing import Any

from ml_collections import config_dict

from biomass_jax.errors import ConfigError

Choices = tuple[str, ...] | str


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; `ends` says whether each is allowed itself: [ ] or ( )."""

    low: float
    high: float = math.inf
    ends: str = "[)"

    def __contains__(self, value: float) -> bool:  # NaN is in no range
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        return above and (value <= self.high if self.ends[1] == "]" else value < self.high)

    def __str__(self) -> str:
        start = f"from {self.low:g}" if self.ends[0] == "[" else f"above {self.low:g}"
        if self.high == math.inf:
            return f"a number {start} on" if self.ends[0] == "[" else f"a number {start}"
        return f"a number {start} {'to' if self.ends[1] == ']' else 'to below'} {self.high:g}"


def setting(default: object, help: str = "", *, choices: Choices = (), within: Range | None = None) -> Any:
    """A field of a group of settings.

    Args:
        default: None where the field is not given.
        help: what it is, with its unit.
        choices: the values that it may have, or `module:NAME` of the tuple that holds them, read when it is needed.
        within: the numbers that it may have.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "within": within})


def group(kind: type) -> Any:
    """A field that holds a group of its own."""
    return dataclasses.field(default_factory=kind)


def to_config(kind: type) -> config_dict.ConfigDict:
    """The defaults of a group as an unlocked config; what is not given is a placeholder of the field's type."""
    config, kinds = config_dict.ConfigDict(), typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(kinds[field.name]):
            config[field.name] = to_config(kinds[field.name])
        elif field.default is None:
            config[field.name] = config_dict.placeholder(_plain(kinds[field.name]))
        else:
            config[field.name] = field.default
    return config


def check(config: config_dict.ConfigDict, kind: type) -> None:
    """Refuse values that a group's fields can't have; fields that are not given are left out.

    Raises:
        ConfigError: the field, what it holds, what was expected.
    """
    for name, field, _ in _fields(kind):
        value = config
        for part in name.split("."):
            value = value[part]
        if value is None:
            continue
        choices, within = choices_of(field), field.metadata["within"]
        if choices and value not in choices:
            raise ConfigError(f"config.{name} is {value!r}; expected one of {', '.join(choices)}")
        if within is not None and value not in within:
            raise ConfigError(f"config.{name} is {value}; expected {within}")


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """A field's choices, () where it has none."""
    found = field.metadata["choices"]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        return tuple(getattr(importlib.import_module(module), name))
    return found


def add_options(parser: argparse.ArgumentParser, kind: type, *, without: Container[str] = ()) -> None:
    """Add a group's fields to a command line: `min_clear` is `--min-clear`.

    Texts and numbers are given as such, a flag as `--flag` or `--no-flag`, a tuple of fixed length as so many words,
    one of any length with commas, or `all` for none.
    """
    for name, field, annotation in _fields(kind):
        if name in without:
            continue
        flag, plain, parts = f"--{name.replace('_', '-')}", _plain(annotation), typing.get_args(annotation)
        options: dict[str, Any] = {"default": field.default, "help": field.metadata["help"].replace("%", "%%") or None}
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif plain is tuple and parts[-1] is ...:
            shown = ",".join(str(value) for value in typing.cast(tuple[Any, ...], field.default))
            options |= {"type": _with_commas(parts[0]), "metavar": shown or "VALUE,..."}
        elif plain is tuple:
            options |= {"type": parts[0], "nargs": len(parts)}
        else:
            options |= {"type": plain, "choices": choices_of(field) or None}
        parser.add_argument(flag, **options)


def options_of(arguments: argparse.Namespace, kind: type, *, without: Container[str] = ()) -> dict[str, Any]:
    """What `add_options` has read, by field."""
    return {name: getattr(arguments, name) for name, _, _ in _fields(kind) if name not in without}


def _with_commas(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        return () if text == "all" else tuple(kind(part) for part in text.split(","))

    return values


def table(kind: type, defaults: config_dict.ConfigDict, *, without: type | None = None) -> str:
    """A Markdown table of a group's fields: name, default, help.

    Args:
        kind: the group.
        defaults: a config that holds the defaults to show.
        without: fields that this group has too are left out.
    """
    known = {name for name, _, _ in _fields(without)} if without else set()
    rows = ["| field | default | |", "|---|---|---|"]
    for name, field, _ in _fields(kind):
        if name not in known:
            value: Any = defaults
            for part in name.split("."):
                value = value[part]
            shown = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            rows.append(f"| `{name}` | {shown} | {field.metadata['help']} |")
    return "\n".join(rows)


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Dotted name, field and type of every field, groups in their place."""
    kinds = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from _fields(kinds[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, kinds[field.name]


def _plain(annotation: Any) -> type:
    """The type beside None: `tuple[int, ...] | None` -> tuple, `Literal["a", "b"]` -> str."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return type(typing.get_args(annotation)[0])
    return typing.get_origin(annotation) or annotation
