"""What has been done already: `state/{step}/{name}.json`, written after a step's outputs.

A step is up to date when its settings, the version of the software and its inputs (size and time of change, and what
lies beside them) are those of its record, and its outputs lie where they were written, unchanged.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomass_jax.data.fingerprints import fingerprint
from biomass_jax.data.records import SOFTWARE_VERSION
from biomass_jax.errors import PrepError
from biomass_jax.runtime import files
from biomass_jax.runtime.settings import changed_fields

SCHEMA = 1


@dataclass(frozen=True)
class StepJob:
    """One step of one tile, orbit or of the whole.

    Attributes:
        step: for example `composite`.
        name: of the tile or orbit, `all` for the whole.
        function: does it; called with `arguments` as keywords, it returns what the report tells, JSON-able.
        arguments: picklable.
        settings: JSON-able, all that decides on the outputs besides the inputs.
        inputs: files, or folders of files.
        outputs: the same.
    """

    step: str
    name: str
    function: Callable[..., dict[str, Any]]
    arguments: Mapping[str, Any]
    settings: Mapping[str, Any]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]


@dataclass
class StepRecord:
    """What is known of a job that finished.

    Attributes:
        digest: over settings, software and inputs.
        inputs: path -> fingerprint.
        outputs: path -> fingerprint.
        result: what the job returned.
        warnings: sentences for the user.
        discarded: inputs that were deleted once used.
        settings: those of the job.
        software: version that did it, "" in older records.
    """

    digest: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    result: dict[str, Any]
    warnings: list[str]
    discarded: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    software: str = ""


class StepRecords:
    """The records of a folder of prepared data."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def path(self, step: str, name: str) -> Path:
        """Where a record lies."""
        return self.out / "state" / step / f"{name}.json"

    def read(self, step: str, name: str) -> StepRecord | None:
        """A record; None where there is none, or one that can't be read (then the step is done again)."""
        try:
            stored = json.loads(self.path(step, name).read_text(encoding="utf-8"))
            known = StepRecord(**{key: stored[key] for key in StepRecord.__dataclass_fields__ if key in stored})
            return known if stored["schema"] == SCHEMA else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def finished(self, job: StepJob) -> tuple[StepRecord | None, str]:
        """The job's record if nothing needs to be done; else what has changed, "" where the job was never done.

        Raises:
            PrepError: it would have to be done again, but inputs have been discarded.
        """
        record = self.read(job.step, job.name)
        if record is None:
            return None, ""
        inputs = self.fingerprints(job.inputs)
        lost = {path: record.inputs[path] for path in record.discarded if path not in inputs}
        outputs = self.fingerprints(job.outputs)
        if record.digest == digest(job, {**lost, **inputs}) and record.outputs == outputs:
            return record, ""
        changes = _changes(record, job, {**lost, **inputs}, outputs)
        why = changes[0] + (f", and {len(changes) - 1} more" if len(changes) > 1 else "")
        if lost:
            raise PrepError(
                f"it has to be made again ({why}), but {len(lost)} of its inputs were discarded, first {min(lost)}: "
                "put them back, or give back what was changed"
            )
        return None, why

    def begin(self, job: StepJob) -> dict[str, str]:
        """Forget what was known of a job, and take the fingerprints of its inputs."""
        self.path(job.step, job.name).unlink(missing_ok=True)
        return self.fingerprints(job.inputs)

    def finish(self, job: StepJob, inputs: dict[str, str], result: dict[str, Any], warnings: list[str]) -> StepRecord:
        """Write the record of a job whose outputs are there.

        Raises:
            PrepError: an input changed since `begin`, or an output is missing.
        """
        changed = sorted(path for path, mark in self.fingerprints(job.inputs).items() if inputs.get(path) != mark)
        if changed:
            raise PrepError(f"{changed[0]} changed while it was at work; run again")
        outputs = self.fingerprints(job.outputs)
        for path, mark in outputs.items():
            if not mark:
                raise PrepError(f"it ended without its output {path}")
        settings, software = _plain(job.settings), SOFTWARE_VERSION
        record = StepRecord(
            digest(job, inputs), inputs, outputs, result, warnings, settings=settings, software=software
        )
        self._write(job.step, job.name, record)
        return record

    def discard(self, step: str, name: str, folder: Path) -> int:
        """Delete a finished job's inputs below a (resolved) folder; their number. Written down before it is done."""
        record = self.read(step, name)
        if record is None:
            return 0
        # What a link leads out of the folder to isn't ours to delete.
        inside = [path for path in record.inputs if (self.out / path).resolve().is_relative_to(folder)]
        if sorted(inside) != sorted(record.discarded):
            record.discarded = sorted(inside)
            self._write(step, name, record)
        return sum(_delete(self.out / path) for path in record.discarded)

    def discarded(self, step: str, name: str) -> bool:
        """Whether inputs of a finished job were deleted."""
        record = self.read(step, name)
        return record is not None and bool(record.discarded)

    def names(self, step: str) -> list[str]:
        """Of what there are records of a step."""
        return sorted(path.stem for path in (self.out / "state" / step).glob("*.json"))

    def fingerprints(self, paths: Iterable[Path]) -> dict[str, str]:
        """Path (relative where it lies in the folder) -> fingerprint, "" where there is nothing."""
        return {self.key(path): fingerprint(path) for path in paths}

    def key(self, path: Path) -> str:
        """A path as records have it."""
        path, root = path.absolute(), self.out.absolute()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()

    def _write(self, step: str, name: str, record: StepRecord) -> None:
        write_json(self.path(step, name), {"schema": SCHEMA, "step": step, "name": name, **vars(record)})


def digest(job: StepJob, inputs: Mapping[str, str]) -> str:
    """SHA-256 over a job's settings, the software's version and the fingerprints of inputs."""
    parts = [SCHEMA, job.step, job.name, job.settings, SOFTWARE_VERSION, dict(inputs)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return json.loads(json.dumps(settings))


def _changes(record: StepRecord, job: StepJob, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> list[str]:
    """What makes a job another one than its record tells of, a sentence each."""
    changes = changed_fields(record.settings, _plain(job.settings))
    if record.software not in ("", SOFTWARE_VERSION):
        changes.append(f"biomass_jax: was {record.software}, now {SOFTWARE_VERSION}")
    for what, before, now in (("input", record.inputs, inputs), ("output", record.outputs, outputs)):
        for path in sorted({*before, *now}):
            if before.get(path) != now.get(path):
                fate = "is new" if path not in before else "has changed" if now.get(path) else "is gone"
                changes.append(f"{what} {path} {fate}")
    return changes or [f"its record is of another version than {SOFTWARE_VERSION}"]


def write_json(path: Path, value: object) -> None:
    """Write a record or a report; its folder is made.

    Raises:
        PrepError: the disk doesn't take it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise PrepError(f"{path}: not written: {error.strerror or error}") from error


def _delete(path: Path) -> bool:
    """Delete a file or a granule's folder, which leaves its name in one moment."""
    aside = path.with_name(f".{path.name}.discarded")
    found = path.exists()
    if found:
        path.rename(aside)
    if aside.is_dir():
        shutil.rmtree(aside)
    else:
        aside.unlink(missing_ok=True)
    return found
