"""`biomass-jax COMMAND [options]`: everything that the package does as one command; `biomass-jax --help` lists it.

Exit codes: 0 finished, 75 stopped by SIGTERM (give the same command again to resume), 2 a command line that can't be
read, anything else failed.
"""

import argparse
import contextlib
import difflib
import importlib
import importlib.metadata
import io
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from biomass_jax.errors import BiomassError, UsageError
from biomass_jax.version import __version__

PROGRAM = "biomass-jax"


class ConfigCommand(NamedTuple):
    """A command that runs a config; options for its fields follow from its settings."""

    about: str
    settings: str  # module:class
    config: str  # the packaged one that it takes where none is given
    example: str


class ToolCommand(NamedTuple):
    """A command with a command line of its own."""

    about: str
    module: str  # its main(argv) runs
    example: str


RUNS = {
    "predict": ConfigCommand(
        "maps of biomass from satellite images",
        "biomass_jax.prediction.config:Predict",
        "predict",
        "--bundle granite --inputs scene.tif --workdir maps --quicklook",
    ),
    "evaluate": ConfigCommand(
        "scores of a model on chips with labels",
        "biomass_jax.evaluation.config:Evaluate",
        "evaluate",
        "--bundle granite --data.path data/shards --workdir scores",
    ),
    "finetune": ConfigCommand(
        "train a model on labels",
        "biomass_jax.training.config:Finetune",
        "finetune_all_biomes",
        "--data.path data/shards --init-from pretrain/best --load encoder --workdir run",
    ),
    "pretrain": ConfigCommand(
        "pretrain an encoder on images without labels",
        "biomass_jax.training.config:Pretrain",
        "pretrain_simmim_swin_b_100ep",
        "--data.path data/shards --workdir pretrain",
    ),
}
TOOLS = {
    "convert": ToolCommand(
        "PyTorch checkpoints to model bundles and back",
        "biomass_jax.convert.__main__",
        "--input biomass_model.ckpt --config config.yaml --output granite",
    ),
    "export": ToolCommand(
        "a bundle as a program for JAX alone (StableHLO) or other runtimes (ONNX)",
        "biomass_jax.portable.__main__",
        "--bundle granite --format onnx --output granite.onnx",
    ),
    "merge": ToolCommand(
        "an adapter and its base as one plain bundle",
        "biomass_jax.convert.merge",
        "--adapter run/best --base granite --output merged",
    ),
    "calibrate": ToolCommand(
        "a bundle whose maps say how sure they are",
        "biomass_jax.evaluation.calibrate",
        "--bundle granite --data data/shards --split val --output calibrated",
    ),
    "validate": ToolCommand(
        "maps beside field plots",
        "biomass_jax.evaluation.__main__",
        "--plots plots.gpkg --maps maps/*_agbd.tif --out validation",
    ),
    "catalog": ToolCommand(
        "maps, mosaics and changes as a STAC collection",
        "biomass_jax.regional.catalog",
        "--maps maps/*_agbd.tif mosaic.tif change.tif --out maps --title 'Biomass of the Valley' --license CC-BY-4.0",
    ),
    "change": ToolCommand(
        "what two maps tell of the time between them",
        "biomass_jax.regional.change",
        "--before maps/2019_agbd.tif --after maps/2021_agbd.tif --out change.tif",
    ),
    "compare": ToolCommand(
        "maps beside those that others publish",
        "biomass_jax.regional.compare",
        "--maps mosaic.tif --with GEDI04_B_MW019MW223_02_002_02_R01000M_MU.tif --product l4b --out beside_l4b",
    ),
    "mosaic": ToolCommand(
        "many maps as one on a grid of its own, by area",
        "biomass_jax.regional.mosaic",
        "--maps 'maps/*_agbd.tif' --out mosaic.tif",
    ),
    "report": ToolCommand(
        "maps and all that is known of them on one page",
        "biomass_jax.regional.report",
        "maps scores beside_l4b --out report.html",
    ),
    "zones": ToolCommand(
        "biomass by zone, with its standard error",
        "biomass_jax.regional.zones",
        "--maps maps/*_agbd.tif --zones districts.gpkg --footprints data/footprints --out districts_agb.csv",
    ),
    "sweep": ToolCommand(
        "search for good settings by many trainings",
        "biomass_jax.launch.sweep",
        "--config finetune_all_biomes --space finetune --workdir sweep --trials 50 --config.data.path=data/shards",
    ),
    "ensemble": ToolCommand(
        "several models as one, which tells how sure it is",
        "biomass_jax.launch.ensemble",
        "--members 5 --config finetune_all_biomes --workdir ensemble --config.data.path=data/shards",
    ),
    "work": ToolCommand(
        "maps of thousands of tiles by many workers",
        "biomass_jax.launch.work",
        "make work/2020 --tiles tiles.txt --seasons 2020 --bundle granite --out maps",
    ),
    "demo": ToolCommand(
        "a synthetic forest: training data, a tiny model, its scores, its map",
        "biomass_jax.launch.demo",
        "--out demo_out",
    ),
}
STEPS = "data_prep.__main__"  # its table of steps; each of them is a command, too
STEP_EXAMPLES = {
    "prepare": "--out data --season 2020 --tiles 10SFF,10SGF --workers 8",
    "download": "hls --tile 10SFF --season 2020 --out data/granules",
    "stream": "--out data --tile 10SFF --season 2020",
    "composite": "data/granules/hls --season 2020 --out data/composites",
    "gedi": "--out data --tile 10SFF --season 2020",
    "labels": "--out data",
    "chips": "--out data --min-labels 20",
    "splits": "--out data --block-km 50",
    "stats": "data/shards",
    "shards": "--out data",
    "geotiff": "granite-geospatial-biomass-datasets/taiga_datasplit --out shards",
    "chip_folders": "--out data --folders folders",
    "check": "--out data",
    "preview": "--out data --tile 10SFF",
    "synthetic": "--out data --world forest",
}
COMPLETION = "completion"
SHELLS = ("bash", "zsh", "fish")
COMPLETION_HELP = f"""usage: {PROGRAM} {COMPLETION} {{{",".join(SHELLS)}}}

Print what makes the shell complete {PROGRAM}'s commands and options with the Tab key.

examples:
  bash  {PROGRAM} {COMPLETION} bash > ~/.local/share/bash-completion/completions/{PROGRAM}
  zsh   {PROGRAM} {COMPLETION} zsh > ~/.biomass-jax.zsh    # and, behind compinit in ~/.zshrc: source ~/.biomass-jax.zsh
  fish  {PROGRAM} {COMPLETION} fish > ~/.config/fish/completions/{PROGRAM}.fish"""
# As main has them: where no cluster says which processes belong together.
_FOR_MAIN = ("--config.", "--coordinator=", "--process_count=", "--process_id=")
# Which composite `predict --tile 10SFF --season 2020` makes its map of.
_ARCHIVE = "data_prep.archive.stream"
_MGRS_TILE = re.compile(r"T?\d{2}[A-Z]{3}")
# The programs that the tools name in their help when they are called by themselves.
_OTHER_NAMES = {
    "python -m biomass_jax.convert.merge": f"{PROGRAM} merge",
    "python -m biomass_jax.convert": f"{PROGRAM} convert",
    "python -m biomass_jax.portable": f"{PROGRAM} export",
    "python -m biomass_jax.evaluation.calibrate": f"{PROGRAM} calibrate",
    "python -m biomass_jax.evaluation": f"{PROGRAM} validate",
    "python -m biomass_jax.regional.catalog": f"{PROGRAM} catalog",
    "python -m biomass_jax.regional.change": f"{PROGRAM} change",
    "python -m biomass_jax.regional.compare": f"{PROGRAM} compare",
    "python -m biomass_jax.regional.mosaic": f"{PROGRAM} mosaic",
    "python -m biomass_jax.regional.report": f"{PROGRAM} report",
    "python -m biomass_jax.regional.zones": f"{PROGRAM} zones",
    "python -m launch.sweep": f"{PROGRAM} sweep",
    "python -m launch.ensemble": f"{PROGRAM} ensemble",
    "python -m launch.work": f"{PROGRAM} work",
    "python -m launch.demo": f"{PROGRAM} demo",
    "python -m data_prep": PROGRAM,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    try:
        return _command(name, rest)
    except BiomassError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        extra = _extra_of(library)
        if extra is None:
            raise
        print(f"error: {PROGRAM} {name} needs {library}; pip install '{PROGRAM}[{extra}]'", file=sys.stderr)
        return 1


def _command(name: str, rest: list[str]) -> int:
    steps = _steps()
    if name in RUNS:
        arguments = _arguments_of_run(name, rest)
        from biomass_jax import main as runner  # which defines absl's flags: when it is needed

        runner.cli(arguments)
    elif name in TOOLS:
        return _call(name, TOOLS[name].module, rest, TOOLS[name].example)
    elif name in steps:
        return _call(name, STEPS, [name, *rest], STEP_EXAMPLES[name])
    elif name == COMPLETION:
        if len(rest) == 1 and rest[0] in SHELLS:
            print(completion(rest[0]))
            return 0
        asked = rest in (["-h"], ["--help"])
        print(COMPLETION_HELP, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    else:
        near = difflib.get_close_matches(name, [*RUNS, *TOOLS, *steps, COMPLETION], 1)
        hint = "".join(f" did you mean {found}?" for found in near)
        print(f"error: no command {name!r};{hint} `{PROGRAM} --help` lists all", file=sys.stderr)
        return 2


def _call(name: str, module: str, arguments: list[str], example: str) -> int:
    """Run a program of ours that has a command line of its own."""
    run: Callable[[list[str]], int] = importlib.import_module(module).main
    if not {"-h", "--help"} & set(arguments):
        return run(arguments)
    # Its parser doesn't know by which name it was called, nor the example.
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        run(arguments)
    text = said.getvalue()
    for other, ours in _OTHER_NAMES.items():
        text = re.sub(rf"{re.escape(other)}\b", ours, text)
    print(f"{text.rstrip()}\n\nexample:\n  {PROGRAM} {name} {example}")
    return 0


def _arguments_of_run(name: str, rest: list[str]) -> list[str]:
    """What `biomass_jax.main` gets: config, workdir, and the fields that are changed."""
    from biomass_jax.runtime.settings import add_options, config_option, overrides

    about, settings, default, example = RUNS[name]
    archive = _archive_parser() if name == "predict" else None
    if archive is not None:
        rest = _from_archive(archive, rest)
    kind = getattr(importlib.import_module(settings.partition(":")[0]), settings.partition(":")[2])
    first, path = config_option(rest, default)
    made = runpy.run_path(str(path))
    if "get_config" not in made:
        raise UsageError(f"{path}: no function get_config; expected a config such as the packaged {default}")
    config = made["get_config"]()
    if config.get("mode") != name:
        raise UsageError(f"{path}: config.mode is {config.get('mode')!r}; {PROGRAM} {name} runs configs of {name!r}")
    parser = argparse.ArgumentParser(
        prog=f"{PROGRAM} {name}",
        usage=f"{PROGRAM} {name} --workdir DIR [options]",
        description=f"{about[0].upper()}{about[1:]}. In brackets: as configured.",
        epilog=f"Fields may be given as --config.field=value, too.\n\nexample:\n  {PROGRAM} {name} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        parents=[first] if archive is None else [first, archive],
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="folder for everything that the run writes")
    add_options(parser, kind, without=("mode",), config=config)
    arguments, left = parser.parse_known_args(rest)
    for word in left:
        if not word.startswith(_FOR_MAIN):
            flags = parser._option_string_actions
            near = difflib.get_close_matches(word.partition("=")[0].replace("_", "-"), flags, 1)
            parser.error(f"unexpected {word!r}" + "".join(f"; did you mean {flag}?" for flag in near))
    return [f"--config={path}", f"--workdir={arguments.workdir}", *overrides(arguments, kind), *left]


def _archive_parser() -> argparse.ArgumentParser:
    """What `predict` takes beside its config's fields: where in NASA's archive its image comes from."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    group = parser.add_argument_group(
        "straight from NASA's archive",
        "with --tile 10SFF --season 2020 in place of --inputs: a composite of the season's HLS scenes is made in "
        "WORKDIR/composites first, without keeping them",
    )
    group.add_argument("--season", metavar="TEXT", help="a year (by latitude) or START/STOP, STOP not included")
    group.add_argument("--sensors", metavar="TEXT", help="L30, S30 or L30+S30 (L30)")
    group.add_argument("--max-cloud", type=float, metavar="X", help="percent of cloud of a scene (100)")
    group.add_argument("--min-clear", type=int, metavar="N", help="fewest clear scenes of a pixel (3)")
    return parser


def _from_archive(archive: argparse.ArgumentParser, rest: list[str]) -> list[str]:
    """The options of `predict`; `--tile 10SFF --season 2020` becomes `--inputs` of their composite, made now."""
    if {"-h", "--help"} & set(rest):
        return rest
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} predict", add_help=False, allow_abbrev=False, parents=[archive])
    parser.add_argument("--tile")
    parser.add_argument("--inputs")
    parser.add_argument("--workdir")
    asked, left = parser.parse_known_args(rest)
    names = ("sensors", "max_cloud", "min_clear")
    place = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if asked.season is None:
        if place or _MGRS_TILE.fullmatch(asked.tile or ""):
            parser.error("an image from the archive wants --tile 10SFF and --season 2020 together")
        return rest
    if not _MGRS_TILE.fullmatch(asked.tile or "") or asked.inputs is not None or asked.workdir is None:
        parser.error("--season goes with --tile, an MGRS tile such as 10SFF, and --workdir, and without --inputs")
    if "sensors" in place:
        place["sensors"] = place["sensors"].replace(",", "+").split("+")
    out = os.path.join(asked.workdir, "composites")
    from biomass_jax.runtime import environment

    environment.settle(jax=False)  # before PROJ starts
    path = importlib.import_module(_ARCHIVE).stream(asked.tile, asked.season, out, **place)
    return [*left, "--workdir", asked.workdir, "--inputs", str(path)]


def _steps() -> dict[str, str]:
    """Step of data preparation -> what it does."""
    return {name: about for name, (_, about) in importlib.import_module(STEPS).STEPS.items()}


def _overview() -> str:
    """What `--help` shows."""
    models = ("convert", "export", "ensemble")
    parts = {
        "models and maps": {name: run.about for name, run in RUNS.items()}
        | {name: TOOLS[name].about for name in models},
        "training data": _steps(),
        "more": {name: tool.about for name, tool in TOOLS.items() if name not in models}
        | {COMPLETION: f"completion for {', '.join(SHELLS)}"},
    }
    lines = [f"usage: {PROGRAM} COMMAND [options]", ""]
    for title, commands in parts.items():
        lines += [f"{title}:", *(f"  {name:<13} {about}" for name, about in commands.items()), ""]
    lines += [f"`{PROGRAM} COMMAND --help` shows a command's options and an example; {PROGRAM} --version the version."]
    return "\n".join(lines)


def _extra_of(library: str) -> str | None:
    """The extra of ours that brings a library, None where no extra does."""
    try:
        required = importlib.metadata.requires(PROGRAM) or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
    for line in required:
        found = re.match(r"([\w.-]+).*extra == [\"']([\w-]+)[\"']", line)
        if found and found[1].replace("-", "_").lower() == library.lower():
            return found[2]
    return None


def completion(shell: str) -> str:
    """A script that completes commands and options, read from each command's own help.

    Options of commands whose libraries are not installed are left out.
    """
    commands = {name: run.about for name, run in RUNS.items()} | {name: tool.about for name, tool in TOOLS.items()}
    commands |= _steps() | {COMPLETION: "completion of the shell"}
    options = {name: _options(name) for name in commands}
    return _for_fish(commands, options) if shell == "fish" else _for_bash(options, zsh=shell == "zsh")


def _options(name: str) -> dict[str, list[str]]:
    """A command's options, each with what it may be, [] where that isn't listed."""
    if name == COMPLETION:
        return {"": list(SHELLS)}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        main([name, "--help"])
    found = {}
    for line in said.getvalue().splitlines():
        shown = re.match(r"  (?:-\w, )?(--[\w.-]+)(?:, (--no-[\w.-]+))?(?: \{([^}]*)\})?", line)
        if shown:
            found[shown[1]] = shown[3].split(",") if shown[3] else []
            found |= {shown[2]: []} if shown[2] else {}
    return found


def _for_bash(options: dict[str, dict[str, list[str]]], *, zsh: bool) -> str:
    """The function that bash calls; zsh calls it by bashcompinit."""
    values = [
        f'        "{name} {option}") words="{" ".join(choices)}" ;;'
        for name, known in options.items()
        for option, choices in known.items()
        if choices and option
    ]
    flags = [f'            {name}) words="{" ".join(known)}" ;;' for name, known in options.items() if "" not in known]
    head = ["#compdef biomass-jax", "autoload -U +X bashcompinit && bashcompinit"] if zsh else []
    return "\n".join(
        [
            *head,
            "_biomass_jax() {",
            '    local cur="${COMP_WORDS[COMP_CWORD]}" words=""',
            '    case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in',
            *values,
            f'        "{COMPLETION} {COMPLETION}") words="{" ".join(SHELLS)}" ;;',
            "        *)",
            f'        if [ "$COMP_CWORD" -eq 1 ]; then words="{" ".join(options)} --help --version"',
            '        elif [[ "$cur" == -* ]]; then case "${COMP_WORDS[1]}" in',
            *flags,
            "        esac; fi ;;",
            "    esac",
            '    COMPREPLY=($(compgen -W "$words" -- "$cur"))',  # none: -o default completes names of files
            "}",
            f"complete -o default -F _biomass_jax {PROGRAM}",
        ]
    )


def _for_fish(commands: dict[str, str], options: dict[str, dict[str, list[str]]]) -> str:
    lines = []
    for name, about in commands.items():
        about = about.replace("'", "\\'")
        lines.append(f"complete -c {PROGRAM} -n __fish_use_subcommand -f -a {name} -d '{about}'")
        for option, choices in options[name].items():
            flag = f" -l {option.removeprefix('--')}" if option else ""
            listed = f" -x -a '{' '.join(choices)}'" if choices else ""
            lines.append(f"complete -c {PROGRAM} -n '__fish_seen_subcommand_from {name}'{flag}{listed}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
