"""Errors whose message says all: which file, which field, what was found, what was expected, what to do.

Commands show a `BiomassError` as one line. Anything else is a fault of the program and keeps its traceback.
"""

from collections.abc import Iterable, Sequence


class BiomassError(ValueError):
    """The base of all errors of both packages that are for the user."""


# Exit code of a command that SIGTERM stopped and that resumes when it is given again; launchers requeue on it.
STOPPED = 75


NEARLY_EMPTY = 0.001  # a share of what there could be; less is taken for a fault and not for a result


def refuse_empty(kind: type[BiomassError], found: int, of: int, what: str, *, allowed: bool) -> None:
    """Refuse a result with nothing or next to nothing in it, less than 0.1 % of what there could be.

    Args:
        kind: of the error.
        found: how many there are.
        of: how many there could be.
        what: the file, what was counted and what may be the reason, to stand before `N of M`.
        allowed: `allow_empty`.

    Raises:
        BiomassError: of that kind, nothing or too little was found and it isn't allowed.
    """
    if not allowed and (found == 0 or found < NEARLY_EMPTY * of):
        raise kind(f"{what}: {found:,} of {of:,}; allow_empty (--allow-empty, config.allow_empty=true) takes it")


class Stopped(BaseException):
    """SIGTERM came; a BaseException so that nothing takes it for a failure."""


class UsageError(BiomassError):
    """The command line or the config can't be run."""


class ConfigError(BiomassError):
    """A config whose fields don't fit each other, the data or the devices; the message names the field."""


class FolderError(BiomassError):
    """A folder in which another run is at work, or that went away or can't be written any more under a run."""


class BandError(BiomassError):
    """A band list or a file's bands are not what they have to be."""


class RasterError(BiomassError):
    """A raster can't be read or written as it has to be; the message names the file."""


class FractionError(RasterError):
    """An image that int16 can't hold exactly."""


class RecordError(BiomassError):
    """A record is not what it has to be; the message names chip, field, what was found and what was expected."""


class DataError(BiomassError):
    """A data set can't be used; the message names folder and split, what was found and what was expected."""


class BiomeError(BiomassError):
    """A biome can't be known, or the file that should tell it can't be used."""


class ArchitectureError(BiomassError):
    """A task that no module has, or a field that the module doesn't have."""


class BundleError(BiomassError):
    """A bundle that is missing, incomplete, of another schema version, or not what its description says."""


class TorchFileError(BiomassError):
    """A file that can't be read as a PyTorch or safetensors file; the message names it and what is wrong."""


class ConvertError(BiomassError):
    """A checkpoint, a flag or a bundle that cannot be converted; the message is for the user."""


class DistributedError(BiomassError):
    """The processes of a run can't be told from the flags and the environment."""


class CheckpointError(BiomassError):
    """A checkpoint that can't be written, or can't be continued from."""


class TrainingError(BiomassError):
    """A run that can't continue; the message says where it stands and what to do."""


class TilingError(BiomassError):
    """Tile settings that contradict each other, or a raster that the chosen algorithm can't cover."""


class PredictionError(BiomassError):
    """A prediction that can't be made or can't be right; `failures` lists (input, error) where several were tried."""

    def __init__(self, message: str, failures: Sequence[tuple[str, Exception]] = ()) -> None:
        super().__init__(message)
        self.failures = list(failures)


class EvaluationError(BiomassError):
    """A setting is wrong, the bundle doesn't fit the data, or the model gave no number where it is scored."""


class RegionalError(BiomassError):
    """A regional figure that can't be told from the maps, zones or footprints that are given."""


class FigureError(BiomassError):
    """A file that a picture is to be made from is missing or holds something else."""


class PrepError(BiomassError):
    """Input or settings that a step can't work with; the message names file, field, what was found and expected."""


class WorkError(BiomassError):
    """A table of work that can't be made, read or worked on; the message names its folder."""


class SweepError(BiomassError):
    """A sweep, or an ensemble's trainings, that can't be run as asked; the message names the option or the field."""


def name_list(names: Iterable[str], limit: int = 5) -> str:
    """Names in one line, the tail of a long list as a count: what errors and log lines show of many."""
    names = list(names)
    if not names:
        return "none"
    more = f" ... and {len(names) - limit} more ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
