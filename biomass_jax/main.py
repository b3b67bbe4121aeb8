"""Run one config: `python -m biomass_jax.main --config X --workdir DIR [--config.field=value]`.

X is a file, or the name of one of `configs/`, which come with the package: `--config predict`.

Exit codes: 0 finished, 75 stopped by SIGTERM (give the same command again to resume), anything else failed.
"""

import contextlib
import difflib
import gc
import json
import logging
import os
import re
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from biomass_jax.errors import STOPPED, FolderError, Stopped, UsageError
from biomass_jax.runtime import environment, processes
from biomass_jax.runtime.files import check_local, write_json
from biomass_jax.runtime.lock import one_writer
from biomass_jax.runtime.settings import find_config

ROOT = Path(__file__).resolve().parent.parent

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file, or the name of one of configs/: predict; change a field with --config.field=value."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes; made if it isn't there.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster says it.")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "Processes of the run; 1 = alone, whatever the cluster.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0 on.")
flags.mark_flags_as_required(["config", "workdir"])

log = logging.getLogger("biomass_jax")


def main(argv: list[str]) -> None:
    """Run the mode that the config names."""
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax logs a page at INFO
    if len(argv) > 1:
        raise UsageError(f"unexpected arguments {argv[1:]}; fields are given as --config.field=value")
    config = CONFIG.value
    if config.mode not in MODES:
        raise UsageError(f"config.mode is {config.mode!r}; expected one of {', '.join(sorted(MODES))}")
    workdir = Path(WORKDIR.value or "")
    forget_none(config)
    check_paths(config)
    # Read by JAX when it is imported, which happens below: a second run compiles next to nothing.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir.absolute().parent / ".jax_cache"))
    # On GPUs draws by a kernel of JAX's own, the same numbers: the compiler takes minutes for them otherwise.
    os.environ["JAX_THREEFRY_GPU_KERNEL_LOWERING"] = "true"
    if config.get("deterministic"):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".strip()
    processes.start(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_ID.value)
    if processes.place()[0] > 0:
        log.setLevel(logging.WARNING)  # one voice is enough
    with alone(workdir):
        if processes.place()[0] == 0 and MODES[config.mode] is predict:
            write_config(config, workdir)
        MODES[config.mode](config, workdir)


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[None]:
    """Keep other runs out of the workdir. The first process holds its lock for all; none begins before it does.

    Raises:
        FolderError: another run is at work there, or it can't be made or written; in every process.
    """
    with contextlib.ExitStack() as held:
        refused = ""
        if processes.place()[0] == 0:
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(one_writer(workdir))
            except FolderError as error:
                refused = str(error)
            except OSError as error:
                refused = f"{workdir}: can't write to the workdir: {error.strerror or error}"
        if processes.place()[1] > 1:
            refused = processes.gather(refused.encode())[0].decode()
        if refused:
            raise FolderError(
                refused if processes.place()[0] == 0 else f"{workdir}: process 0 says what is wrong with it"
            )
        yield


def predict(config: object, workdir: Path) -> None:
    """Maps, on all local devices."""
    from biomass_jax.prediction.run import run
    from biomass_jax.runtime.mesh import local_placement

    run(config, workdir, shardings=local_placement)


def train(config: object, workdir: Path) -> None:
    """Train on all devices, or resume from what the workdir holds."""
    from biomass_jax.training.run import train_and_evaluate

    if not train_and_evaluate(config, workdir, stop=processes.AgreedStop(DeferredStop())):
        raise Stopped


def evaluate(config: object, workdir: Path) -> None:
    """Scores, on the local devices of each process."""
    from biomass_jax.evaluation.evaluate import run
    from biomass_jax.runtime.mesh import local_placement

    run(config, workdir, shardings=local_placement)


class DeferredStop:
    """Whether SIGTERM came. From the first call on the signal is only noted, so that the caller can save first."""

    def __init__(self) -> None:
        self._deferring = self._came = False

    def __call__(self) -> bool:
        """Ask; before the first call there is nothing to save, and the signal ends the program at once."""
        if not self._deferring:
            self._deferring = True
            signal.signal(signal.SIGTERM, self._note)
        return self._came

    def _note(self, *_: object) -> None:
        self._came = True


MODES: dict[str, Callable[[Any, Path], None]] = {
    "evaluate": evaluate,
    "finetune": train,
    "predict": predict,
    "pretrain": train,
}


def check_paths(config: ConfigDict) -> None:
    """Refuse a bucket's address where a folder is meant; inputs of `predict` may be addresses."""
    check_local(WORKDIR.value, "--workdir")
    for name in ("bundle", "base", "adapters", "against", "init_from"):
        check_local(config.get(name), f"config.{name}")
    if "data" in config:
        check_local(config.data.get("path"), "config.data.path")


def forget_none(config: ConfigDict) -> None:
    """`--config.field=None` of a text gives the word; it means that the field is not given."""
    for name, value in config.items():
        if hasattr(value, "items"):
            forget_none(value)
        elif value == "None":
            config[name] = None


def write_config(config: ConfigDict, workdir: Path) -> None:
    """`config.json`: what the run was started with.

    Trainings and evaluations write it themselves, and later: one that is refused must leave that of an earlier run, to
    which checkpoints or scores belong.
    """
    try:
        write_json(workdir / "config.json", json.loads(config.to_json()))
    except OSError as error:
        raise UsageError(f"{workdir}: can't write to the workdir: {error.strerror or error}") from error


def parse_flags(argv: list[str]) -> list[str]:
    """absl's parser, which takes a config's name too, with a readable message for an unknown config or field."""
    argv, path = _with_config_file(argv)
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        if path is None:
            raise
        fields = sorted(runpy.run_path(str(path))["get_config"]().keys())
        unknown = re.findall(r"\w+", str(error))[0]  # "'name'" and perhaps more, quoted twice
        near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(unknown, fields, 1))
        raise UsageError(f"{path}: no field {unknown!r} in this config; it has {', '.join(fields)}{near}") from error


def _with_config_file(argv: list[str]) -> tuple[list[str], Path | None]:
    """The arguments with the config's file where its name was given, `--config=X` or `--config X`; and that file."""
    words, path = list(argv), None
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in ("-config", "--config") and (equals or place + 1 < len(words)):
            path = find_config(value if equals else words[place + 1])
            words[place if equals else place + 1] = f"{flag}={path}" if equals else str(path)
    return words, path


def set_up_logging() -> None:
    """Our own lines from INFO on; libraries from WARNING on, as they are."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    # What Orbax's threads run into is raised as well; each of them would print it too, with a traceback.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    absl_logging.get_absl_logger().addFilter(lambda record: not (record.exc_info and "orbax" in record.pathname))
    sys.unraisablehook = _show_unraisable


def _show_unraisable(what: Any) -> None:
    """As Python does, but for what TensorStore's threads have to say of each array when a save has failed.

    They report to Orbax's event loop, which the first failure has closed; that failure is raised.
    """
    if not (what.exc_type is RuntimeError and str(what.exc_value) == "Event loop is closed"):
        sys.__unraisablehook__(what)


def _stop(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def cli(arguments: Sequence[str] | None = None) -> NoReturn:
    """Parse the arguments, those of the process where none are given; run; turn what happens into an exit code."""
    if arguments is not None:
        sys.argv[1:] = arguments  # ml_collections looks there for --config.field
    set_up_logging()
    gc.set_threshold(100_000, 50, 100)  # imports and tracing make objects that stay, and that it would walk each time
    sys.path.append(str(ROOT))  # configs of a checkout import `configs` or `biomass_jax`, wherever the command is given
    signal.signal(signal.SIGTERM, _stop)
    began = time.monotonic()
    try:
        environment.settle(log.warning)
        app.run(main, flags_parser=parse_flags)
    except Stopped:
        log.warning("stopped by SIGTERM after %.0f s; give the same command again to resume", time.monotonic() - began)
        processes.finish()
        logging.shutdown()
        # Threads may be compiling or reading: leaving at once is what was asked for, and nothing half-written is there.
        os._exit(STOPPED)
    except Exception as error:
        told = environment.told(error)
        log.error("%s", error if told is None else told, exc_info=told is None)
        # All processes raise together what came of a prediction, and that the workdir can't be had.
        if getattr(error, "failures", None) or isinstance(error, FolderError):
            processes.finish()
        else:
            processes.abandon(1)  # the other processes of a run would wait for this one
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)  # as above; what can't be written any more would be waited for
    sys.exit(0)


if __name__ == "__main__":
    cli()
