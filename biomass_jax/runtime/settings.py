"""Settings declared once: a dataclass a group, each field with its type, default, choices or range, and a line of help.

Configs (`to_config`), checks (`check`), command lines (`add_options`) and the tables of the docs (`table`) follow from
the declaration.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import json
import math
import operator
import os
import re
import types
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import config_dict

from biomass_jax.errors import ConfigError

Choices = tuple[str, ...] | str
Group = typing.TypeVar("Group")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", tuple: "a list"}
_FLAGS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


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


def find_config(given: str | Path, folder: str = "") -> Path:
    """The file of a config.

    Args:
        given: its path, or the name of one that comes with the package: `predict`.
        folder: of those that come with the package, the ones in this folder: `sweeps`.

    Raises:
        ConfigError: there is neither.
    """
    # Asked when it is needed: it says where the files are, in a checkout and in an installed package.
    place = Path(importlib.import_module("biomass_jax.configs").__path__[0]) / folder
    packaged = {path.stem: path for path in sorted(place.glob("*.py")) if path.stem not in ("__init__", "common")}
    path = packaged.get(str(given), Path(given))
    if path.is_file():
        return path
    near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(path.stem, packaged, 1))
    raise ConfigError(
        f"{path}: no such config file; give a file, or one that comes with biomass_jax by its name, of "
        f"{', '.join(packaged)}{near}"
    )


def config_option(argv: Sequence[str] | None, default: str) -> tuple[argparse.ArgumentParser, Path]:
    """A parser of `--config` alone, to be the parent of a command's parser, and the file of the config that is given.

    Args:
        argv: the command line; that of the process where none is given.
        default: name of the packaged config that is taken where none is given.

    Raises:
        ConfigError: there is no such config.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    text = f"a config of your own, or the name of a packaged one ({default})"
    parser.add_argument("--config", default=default, metavar="FILE", help=text)
    return parser, find_config(parser.parse_known_args(argv)[0].config)


def check(config: config_dict.ConfigDict, kind: type) -> None:
    """Give a config's values their fields' types, and refuse those that a field can't have; see `typed`.

    Raises:
        ConfigError: the field, what it holds, what was expected.
    """
    for name, field, annotation in _fields(kind):
        *groups, last = name.split(".")
        holder = functools.reduce(operator.getitem, groups, config)
        given = holder[last]
        value = typed(given, annotation, f"config.{name}")
        choices, within = choices_of(field), field.metadata["within"]
        if choices and value is not None and value not in choices:
            raise ConfigError(f"config.{name} is {value!r}; expected one of {', '.join(choices)}")
        if within is not None and value is not None and value not in within:
            raise ConfigError(f"config.{name} is {value}; expected {within}")
        if type(value) is not type(given) or value != given:
            with holder.unlocked(), holder.ignore_type():
                holder[last] = None  # or a whole number would become a float again
                holder[last] = value


def checked(kind: type[Group], values: Mapping[str, object]) -> Group:
    """A group of the given values and of the defaults of the others, each of its type and in its range.

    Raises:
        ConfigError: one isn't; see `check`.
    """
    config = to_config(kind)
    with config.ignore_type():
        config.update(values)
    check(config, kind)
    return kind(**config)


def typed(value: Any, annotation: Any, name: str) -> Any:
    """A value as its field's type, where it can be meant in one way only.

    Texts of numbers and flags, whole floats for whole numbers, one value for a list and lists as text are taken.

    Args:
        value: as a config, a file or a caller gives it.
        annotation: of the field.
        name: of the field, for messages.

    Raises:
        ConfigError: it is something else, None for a field that has to be given too.
    """
    if isinstance(annotation, types.UnionType):
        if value is None:
            return None
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    plain = _plain(annotation)
    try:
        return _typed_tuple(value, typing.get_args(annotation), name) if plain is tuple else _typed_one(value, plain)
    except ConfigError:
        raise
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} is {value!r}; expected {_EXPECTED.get(plain, plain.__name__)}") from error


def _typed_one(value: Any, kind: type) -> Any:
    """KeyError, TypeError or ValueError where it can't be."""
    if hasattr(value, "dtype") and hasattr(value, "item"):
        value = value.item()
    if kind is bool:
        return _FLAGS[str(value).strip().casefold()]
    if isinstance(value, bool) or value is None:
        raise TypeError
    if kind is str:
        return str(value) if isinstance(value, str | int) else os.fspath(value)
    if isinstance(value, str):
        value = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if kind(value) != value:  # a fraction for a whole number, NaN
        raise ValueError
    return kind(value)


def _typed_tuple(value: Any, parts: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        text = value.strip().strip("()[]").strip().removesuffix(",")
        value = [] if text in ("", "all") else [part.strip().strip("'\"") for part in text.split(",")]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        value = [value]
    elif not isinstance(value, list | tuple):
        raise TypeError
    kinds = parts[:1] * len(value) if parts[-1] is ... else parts
    if len(kinds) != len(value):
        raise ConfigError(f"{name} is {value!r}; expected {len(kinds)} values")
    return tuple(
        typed(one, kind, f"{name}[{place}]") for place, (one, kind) in enumerate(zip(value, kinds, strict=True))
    )


class Typed:
    """A group without groups, whose values get their fields' types when it is made; see `typed`.

    Choices and ranges are left to whoever uses it.
    """

    def __post_init__(self) -> None:
        for name, _, annotation in _fields(type(self)):
            object.__setattr__(self, name, typed(getattr(self, name), annotation, name))


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """A field's choices, () where it has none."""
    found = field.metadata["choices"]
    if isinstance(found, str):
        module, _, name = found.partition(":")
        return tuple(getattr(importlib.import_module(module), name))
    return found


def add_options(
    parser: argparse.ArgumentParser,
    kind: type,
    *,
    without: Container[str] = (),
    config: Mapping[str, Any] | None = None,
) -> None:
    """Add a group's fields to a command line: `min_clear` is `--min-clear`, `min_clear` of `chips` `--chips.min-clear`.

    Texts and numbers are given as such, a flag as `--flag` or `--no-flag`, a tuple of fixed length as so many words,
    one of any length with commas, or `all` for none.

    Args:
        parser: gets the options.
        kind: the group.
        without: names of fields that are left out.
        config: one that the options change, whose fields alone get one: help tells their values, and what isn't given
            leaves no trace.
    """
    titles: dict[str, Any] = {"": parser}
    for name, field, annotation in _fields(kind):
        if name in without or (config is not None and not _holds(config, name)):
            continue
        title, plain, parts = name.rpartition(".")[0], _plain(annotation), typing.get_args(_given(annotation))
        options: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        if config is not None:
            options = {"default": argparse.SUPPRESS, "help": _with_value(options["help"], _value(config, name))}
        options["help"] = options["help"].replace("%", "%%") or None
        if plain is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif plain is tuple and parts[-1] is ...:
            shown = ",".join(str(value) for value in typing.cast(tuple[Any, ...], field.default or ()))
            options |= {"type": _with_commas(parts[0]), "metavar": shown or "VALUE,..."}
        elif plain is tuple:
            options |= {"type": parts[0], "nargs": len(parts), "metavar": "VALUE"}
        elif config is None:
            options |= {"type": plain, "choices": choices_of(field) or None}
        else:  # choices that a module holds aren't asked for: importing it may take seconds, and `check` knows them
            listed = isinstance(field.metadata["choices"], tuple) and field.metadata["choices"]
            options |= {"type": plain, "choices": listed or None}
            options["metavar"] = None if listed else {str: "TEXT", int: "N"}.get(plain, "X")
        if title not in titles:
            titles[title] = parser.add_argument_group(title)
        titles[title].add_argument(f"--{name.replace('_', '-')}", **options)


def _with_value(text: str, value: object) -> str:
    """A field's line of help for a terminal, with its value."""
    text = re.sub(r"[;,] see above$", "", re.sub(r"\[[^]]*]\(([^)]*)\)", r"docs/\1", text.replace("`", "")))
    if value in (None, "", ()):
        return text
    parts = value if isinstance(value, tuple) else (value,)
    return f"{text} ({','.join(str(part).lower() if isinstance(part, bool) else str(part) for part in parts)})".lstrip()


def options_of(arguments: argparse.Namespace, kind: type, *, without: Container[str] = ()) -> dict[str, Any]:
    """What `add_options` has read, by field."""
    given = vars(arguments)
    return {name: given[name] for name, _, _ in _fields(kind) if name not in without and name in given}


def overrides(arguments: argparse.Namespace, kind: type) -> list[str]:
    """What `add_options` has read of a config's fields, as `--config.field=value`."""
    return [f"--config.{name}={value}" for name, value in options_of(arguments, kind).items()]


def _with_commas(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def values(text: str) -> tuple[Any, ...]:
        parts = [part.strip(" '\"") for part in text.strip(" ()").split(",")]  # ('a', 'b') as configs have it, too
        return () if text == "all" else tuple(kind(part) for part in parts if part)

    values.__name__ = f"{kind.__name__} (or several, with commas)"  # of which argparse says that it is invalid
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
            value = _value(defaults, name)
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


def _value(config: Mapping[str, Any], name: str) -> Any:
    """Of a dotted field."""
    return functools.reduce(operator.getitem, name.split("."), config)


def _holds(config: Mapping[str, Any], name: str) -> bool:
    """Whether a config has a dotted field."""
    try:
        _value(config, name)
    except KeyError:
        return False
    return True


def _given(annotation: Any) -> Any:
    """The annotation without None."""
    if isinstance(annotation, types.UnionType):
        (annotation,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _plain(annotation: Any) -> type:
    """The type beside None: `tuple[int, ...] | None` -> tuple, `Literal["a", "b"]` -> str."""
    annotation = _given(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return type(typing.get_args(annotation)[0])
    return typing.get_origin(annotation) or annotation


def changed_fields(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """`field: was X, now Y` for each field in which two configs differ, nested ones as `group.field`."""
    changes = []
    for name in sorted(set(before) | set(now)):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += changed_fields(old, new, f"{prefix}{name}.")
        elif json.dumps(old) != json.dumps(new):
            changes.append(f"{prefix}{name}: was {old!r}, now {new!r}")
    return changes


def known_fields(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Those fields of a config that there were when an earlier one was saved, perhaps by an older version."""
    return {
        name: known_fields(before[name], value) if isinstance(value, dict) and isinstance(before[name], dict) else value
        for name, value in now.items()
        if name in before
    }
