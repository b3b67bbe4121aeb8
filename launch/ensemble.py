"""Ensembles: models of one architecture, trained one after another or given, as one bundle.

    biomass-jax ensemble --members 5 --config finetune_all_biomes --workdir OUT [--config.field=value ...]
    biomass-jax ensemble --join BUNDLE BUNDLE ... --output ENSEMBLE

The first trains each member in OUT/member_0 ..., with a seed and a draw of blocks of ground of its own, and joins them
into OUT/ensemble; the same command resumes. See docs/train.md.

Exit codes: 0 finished, 75 stopped by SIGTERM or Ctrl-C (give the same command again to resume), anything else failed.
"""

import argparse
import contextlib
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from biomass_jax.errors import STOPPED, BiomassError, BundleError, Stopped, SweepError, UsageError
from biomass_jax.runtime import environment
from biomass_jax.runtime.files import write_json
from biomass_jax.runtime.lock import lock_beside, one_writer
from biomass_jax.runtime.settings import changed_fields, find_config, known_fields

from .local import Group
from .run_config import PREFIX, depends_on, parse_config

if TYPE_CHECKING:
    from biomass_jax.bundle import Bundle

PROGRAM = (sys.executable, "-m", "biomass_jax.main")
ENSEMBLE = "ensemble"  # the bundle, in the workdir
STATE = "ensemble.json"  # what the members have in common, and which of them are finished
# What members need to have in common beside their architecture, pixel size and label.
_ALIKE = {"input": ("bands", "units", "fill", "means", "stds", "no_data_rule"), "output": ("units", "nodata")}

log = logging.getLogger("ensemble")


def join(
    paths: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    command: str = "",
    overwrite: bool = False,
) -> Path:
    """Write bundles of one architecture as one, whose model is `BiomassEnsemble`.

    The encoder is stored once where all members' are equal to the bit, as they are where it was frozen.

    Args:
        paths: of two members or more.
        output: the bundle's folder.
        command: for provenance.
        overwrite: replace a bundle that is there.

    Raises:
        BundleError: fewer than two; one that can't be opened or be a member, or that differs from the first one in
            architecture, input or output; or `output` is there already.
    """
    from biomass_jax import bundle  # which takes seconds to import, and would hold the GPU while members are trained

    if len(paths) < 2:
        raise BundleError(f"found {len(paths)} member, expected two or more to join into an ensemble")
    if Path(output).exists() and not overwrite:
        raise BundleError(f"{output}: already exists; choose another folder")
    _check_alike([bundle.Bundle(Path(path), bundle.read_meta(path), {}) for path in paths])  # before weights are read
    members = [bundle.load(path) for path in paths]
    from biomass_jax.models.build import architecture_of
    from biomass_jax.models.ensemble import join_variables

    encoders = {bundle.weights_sha256(member.variables["params"]["encoder"]) for member in members}
    first, shared = members[0].meta, len(encoders) == 1
    label = first["output"]["bands"][0]
    architecture = architecture_of(members[0].module()) | {"members": len(members), "shared_encoder": shared}
    made = bundle.save(
        output,
        join_variables([member.variables for member in members], shared_encoder=shared),
        task="biomass",
        architecture=architecture,
        input=first["input"] | {"sensors": sorted({s for m in members for s in m.meta["input"].get("sensors", [])})},
        output=first["output"] | {"bands": [label, f"{label}_sd"]},
        training={name: _together(members, name) for name in ("dataset", "season")},
        provenance={
            "source": f"an ensemble of {len(members)}",
            "sha256": None,
            "command": command,
            "versions": bundle.software_versions(),
            "members": [
                {"path": str(member.path), "weights_sha256": member.weights_sha256}
                | {name: member.meta["training"].get(name) for name in ("seed", "bootstrap")}
                for member in members
            ],
        },
        overwrite=overwrite,
    )
    log.info("%s: %d members, %s", made, len(members), "one encoder" if shared else "each with an encoder of its own")
    return made


def _check_alike(members: "Sequence[Bundle]") -> None:
    """BundleError where one can't be a member, or differs from the first in what has to be the same."""
    described = [_described(member) for member in members]
    for member, about in zip(members[1:], described[1:], strict=True):
        for field, expected in described[0].items():
            if about.get(field) != expected:
                raise BundleError(
                    f"{member.path}: {field} is {about.get(field)}, but {members[0].path} has {expected}; the members "
                    "of an ensemble have to be alike in it"
                )


def _described(member: "Bundle") -> dict[str, Any]:
    """What has to be the same in all members, by field.

    Raises:
        BundleError: the bundle can't be a member at all.
    """
    from biomass_jax.models.build import architecture_of

    meta = member.meta
    if member.task != "biomass":
        raise BundleError(f"{member.path}: task is {member.task!r}; members of an ensemble are of task 'biomass'")
    if "members" in meta["architecture"]:
        raise BundleError(f"{member.path}: is an ensemble itself; give its members, which its provenance names")
    if "uncertainty" in meta:
        raise BundleError(
            f"{member.path}: is calibrated, and its calibration doesn't hold for an ensemble; give the bundle that it "
            "was made from, and calibrate the ensemble"
        )
    # With the defaults of what a bundle leaves out.
    fields = {"spread": "none"} | architecture_of(member.module())
    if fields["spread"] == "quantiles":
        raise BundleError(
            f"{member.path}: architecture.spread is 'quantiles', and the mean of quantiles is no quantile of the "
            "ensemble; members have spread 'gaussian', 'laplace' or 'none'"
        )
    found = {f"architecture.{name}": value for name, value in fields.items()}
    found |= {f"{part}.{name}": meta[part].get(name) for part, names in _ALIKE.items() for name in names}
    found["input.pixel_size"] = member.pixel_size
    return found | {"output.bands[0]": meta["output"]["bands"][0]}


def _together(members: "Sequence[Bundle]", name: str) -> str:
    """A field of `training` of all members; several values one after another."""
    found = [str(member.meta["training"].get(name, "")) for member in members]
    return "; ".join(value for value in dict.fromkeys(found) if value)


def train(
    config_path: Path,
    workdir: Path,
    members: int,
    overrides: Sequence[str],
    *,
    program: Sequence[str] = PROGRAM,
    command: str = "",
) -> int:
    """Train what is left of the members one after another, then join them; the exit code.

    Args:
        config_path: of all members; its seed is the first one's.
        workdir: of the ensemble.
        members: how many.
        overrides: `--config.field=value` of all members.
        program: what trains; gets --config, --workdir and fields.
        command: for provenance.

    Raises:
        SweepError: a config that can't be an ensemble's, or another one than the ensemble was begun with.
        BundleError: see `join`.
    """
    config = parse_config(config_path, overrides)
    _check(config, config_path, members)
    common = depends_on(config, data=[p for p in [config.data.path] if p], start=[p for p in [config.init_from] if p])
    common = json.loads(json.dumps(common))
    finished = _begun(workdir / STATE, common)
    shared = [field for field in overrides if not field.startswith(f"{PREFIX}seed=")]
    before: Group | None = None
    for number in range(members):
        folder = workdir / f"member_{number}"
        if folder.name in finished:
            log.info("%s: is finished", folder)
            continue
        log.info("%s: %s", folder, "resumes" if folder.exists() else f"member {number + 1} of {members}")
        own = [f"{PREFIX}seed={config.seed + number}", f"{PREFIX}data.bootstrap={number + 1}"]
        words = [*program, "--config", str(config_path), "--workdir", str(folder), *shared, *own, "--process_count=1"]
        group = Group(1, words, [], name=folder.name)
        if before is not None and before.stopped:  # the signal came between the two
            group.hand_on()
        code, before = group.wait(), group
        if code == 0:
            finished.append(folder.name)
            write_json(workdir / STATE, {"common": common, "finished": finished})
        if code or (group.stopped and number + 1 < members):
            return code or STOPPED
    paths = [workdir / f"member_{number}" / "best" for number in range(members)]
    join(paths, workdir / ENSEMBLE, command=command, overwrite=True)
    return 0


def _check(config: Any, path: Path, members: int) -> None:
    """SweepError where this can't be an ensemble's config."""
    if members < 2:
        raise SweepError(f"--members is {members}; expected 2 or more")
    if config.mode != "finetune":
        raise SweepError(f"{path}: mode is {config.mode!r}; expected 'finetune'")
    if config.overwrite:
        raise SweepError("overwrite=True would begin a member anew each time that it resumes; leave it off")
    if config.data.bootstrap is not None:
        raise SweepError(
            f"config.data.bootstrap is {config.data.bootstrap}, but each member has a draw of its own; leave it out"
        )
    if config.model.get("spread") == "quantiles":
        raise SweepError(
            "config.model.spread is 'quantiles', and the mean of quantiles is no quantile of the ensemble; expected "
            "gaussian, laplace or none"
        )


def _begun(path: Path, common: dict[str, Any]) -> list[str]:
    """Names of the members that are finished; notes what all have in common where nothing is begun.

    Raises:
        SweepError: the ensemble was begun with other settings or data.
    """
    if not path.exists():
        write_json(path, {"common": common, "finished": []})
        return []
    state = json.loads(path.read_text(encoding="utf-8"))
    changes = changed_fields(state["common"], known_fields(state["common"], common))
    if changes:
        more = f", and {len(changes) - 1} more changes" if changes[1:] else ""
        raise SweepError(
            f"{path}: this ensemble was begun with other settings or data: {changes[0]}{more}; give the same again, or "
            "another --workdir"
        )
    return list(state["finished"])


def parser() -> argparse.ArgumentParser:
    """The command line; `--config.field=value` comes beside it."""
    parser = argparse.ArgumentParser(
        "python -m launch.ensemble", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    training = parser.add_argument_group("train members and join them; --config.field=value changes a field of all")
    training.add_argument("--members", type=int, help="how many")
    training.add_argument("--config", help="config of all members: a file, or the name of one of configs/")
    training.add_argument("--workdir", type=Path, help="folder for the members and the ensemble")
    joining = parser.add_argument_group("join models that are trained already")
    joining.add_argument("--join", nargs="+", metavar="BUNDLE", help="the members, of one architecture and one input")
    joining.add_argument("--output", type=Path, metavar="BUNDLE", help="the ensemble's folder, to be made")
    return parser


def main(argv: Sequence[str] | None = None, *, program: Sequence[str] = PROGRAM) -> int:
    """Run the command; the exit code.

    Args:
        argv: the command line; that of the process where none is given.
        program: what trains, see `train`.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    words = list(sys.argv[1:] if argv is None else argv)
    arguments, overrides = parser().parse_known_args(words)
    command = shlex.join(["biomass-jax", "ensemble", *words])
    try:
        environment.settle(log.warning)
        if arguments.join is not None:
            _only(arguments, ("output",), ("members", "config", "workdir"), "--join", overrides)
            with one_writer(*lock_beside(arguments.output)):
                join(arguments.join, arguments.output, command=command)
            return 0
        _only(arguments, ("members", "config", "workdir"), ("output",), "an ensemble's training", [])
        with _answering_signals(), one_writer(arguments.workdir):
            path = find_config(arguments.config)
            code = train(path, arguments.workdir, arguments.members, overrides, program=program, command=command)
    except BiomassError as error:
        log.error("%s", error)
        return 1
    except Stopped:
        code = STOPPED
    if code == STOPPED:
        log.warning("stopped; give the same command again to resume")
    elif code:
        log.error("a member failed, see above; the same command resumes with it")
    return code


def _only(
    arguments: argparse.Namespace, needed: Sequence[str], other: Sequence[str], what: str, overrides: Sequence[str]
) -> None:
    """UsageError where an option is missing, or belongs to the command's other use."""
    if missing := [f"--{name}" for name in needed if getattr(arguments, name) is None]:
        raise UsageError(f"{what} needs {', '.join(missing)}")
    if given := [f"--{name}" for name in other if getattr(arguments, name) is not None] + list(overrides):
        raise UsageError(f"{what} doesn't go with {', '.join(given)}")


@contextlib.contextmanager
def _answering_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C end the block with `Stopped` as long as no member is being trained."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, _stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(*_: object) -> NoReturn:
    raise Stopped


if __name__ == "__main__":
    sys.exit(main())
