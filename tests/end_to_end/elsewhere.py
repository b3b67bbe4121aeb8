"""A program that hides from our own modules what Linux alone has, then imports them all and walks the short path.

Libraries keep what they use: they are built for each system. `python -m tests.end_to_end.elsewhere FOLDER SYSTEM`.
"""

import builtins
import importlib
import os
import pkgutil
import sys
import types
from pathlib import Path

import numpy as np

OURS = ("biomass_jax", "data_prep", "launch")
# What Python's documentation says to be on Linux alone, or on few others.
LINUX_ALONE = {
    "os": (
        "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate fdatasync splice copy_file_range eventfd "
        "memfd_create pidfd_open setns unshare getrandom getresuid O_DIRECT O_TMPFILE O_PATH O_NOATIME"
    ),
    "signal": "sigtimedwait sigwaitinfo SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT",
    "resource": "prlimit",
    "time": "CLOCK_BOOTTIME CLOCK_TAI",
}
# And what Windows lacks besides.
POSIX_ALONE = {
    "os": (
        "fork forkpty register_at_fork killpg getpgid getpgrp setsid getsid setpgid getuid geteuid getgid getegid "
        "pread pwrite preadv pwritev readv writev sendfile statvfs fstatvfs sysconf confstr getloadavg mkfifo mknod "
        "nice chown lchown fchown fchmod fchdir chroot wait wait3 wait4 WNOHANG sync lockf uname O_NOFOLLOW "
        "O_DIRECTORY O_CLOEXEC O_NONBLOCK O_SYNC posix_spawn sched_yield getpriority setpriority"
    ),
    "signal": (
        "SIGKILL SIGUSR1 SIGUSR2 SIGHUP SIGALRM SIGCHLD SIGCONT SIGSTOP SIGTSTP SIGPIPE SIGQUIT alarm setitimer pause "
        "pthread_kill pthread_sigmask sigwait"
    ),
    "socket": "AF_UNIX",
    "time": "tzset clock_gettime CLOCK_MONOTONIC CLOCK_REALTIME",
}
ABSENT_ON_WINDOWS = ("fcntl", "resource", "grp", "pwd", "termios", "tty", "pty", "syslog")


class Without(types.ModuleType):
    """A module that lacks some names and has others; all else is the real one's."""

    def __init__(self, real, lacking, **instead):
        super().__init__(real.__name__)
        self.__dict__.update(instead)
        self.__dict__["_real"], self.__dict__["_lacking"] = real, lacking

    def __getattr__(self, name):
        if name in self._lacking:
            raise AttributeError(f"module {self._real.__name__!r} has no attribute {name!r} on this system")
        return getattr(self._real, name)


class Locks(types.ModuleType):
    """`msvcrt` with locks that nobody else holds."""

    LK_NBLCK = 2

    @staticmethod
    def locking(handle, mode, size):
        os.fstat(handle)  # open


def hide(system):
    """Have our own modules, and no others, see the standard library as it is on `darwin` or `win32`."""
    windows = system == "win32"
    tables = [LINUX_ALONE, POSIX_ALONE] if windows else [LINUX_ALONE]
    lacking = {name: {word for table in tables for word in table.get(name, "").split()} for name in POSIX_ALONE}
    instead = {"os": {"name": "nt"} if windows else {}, "sys": {"platform": system}}
    seen = {
        name: Without(importlib.import_module(name), lacking.get(name, ()), **instead.get(name, {}))
        for name in {*lacking, "sys"}
    }
    seen["msvcrt"] = Locks("msvcrt")
    real = builtins.__import__

    def imports(name, globals=None, locals=None, fromlist=(), level=0):
        if level or (globals or {}).get("__name__", "").split(".")[0] not in OURS:
            return real(name, globals, locals, fromlist, level)
        if (windows and name in ABSENT_ON_WINDOWS) or (not windows and name == "msvcrt"):
            raise ModuleNotFoundError(f"No module named {name!r} on this system")
        return seen[name] if name in seen else real(name, globals, locals, fromlist, level)

    builtins.__import__ = imports


def import_all():
    """Every module of ours; how many."""
    names = []
    for top in OURS:
        package = importlib.import_module(top)
        names += [found.name for found in pkgutil.walk_packages(package.__path__, f"{top}.")]
    for name in names:
        if not name.endswith("__main__"):  # those run at once
            importlib.import_module(name)
    return len(names)


def prepare(folder):
    """Granules and orbits to shards; the composite."""
    from biomass_jax.runtime.lock import one_writer
    from data_prep.__main__ import main
    from data_prep.synthetic.forest.world import write_forest_world

    write_forest_world(folder, shape=(200, 200), scenes=2, tiles=1)
    season, chips = ["--season", "2020"], ["--size", "64", "--min-labels", "5", "--max-nodata", "0.3"]
    granules = folder / "granules"
    with one_writer(folder):
        pass  # as `prepare` holds it; single steps are refused beside one
    for step in (
        ["composite", granules / "hls", "--out", folder / "composites", *season, "--min-clear", "1"],
        ["gedi", "--out", folder, "--tile", "10SFF", *season],
        ["labels", "--out", folder],
        ["chips", "--out", folder, *chips],
        ["splits", "--out", folder, "--block-km", "2", "--buffer-m", "0"],
        ["shards", "--out", folder],
    ):
        assert main([str(word) for word in step]) == 0, step
    assert (folder / "shards" / "dataset_info.json").is_file()
    return next(folder.glob("composites/**/*.tif"))


def predict(folder, image):
    """A composite to a map, with a model of random weights."""
    import jax
    import rasterio

    import biomass_jax
    from biomass_jax import bundle
    from biomass_jax.data.bands import BAND_NAMES
    from biomass_jax.models.build import abstract_variables, build_module

    sizes = {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "in_channels": 6, "decoder_channels": 8}
    rng = np.random.default_rng(0)
    shapes = abstract_variables(build_module("biomass", sizes))
    variables = jax.tree.map(lambda leaf: abs(0.1 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes)
    means = {"bands": list(BAND_NAMES), "fill": -9999, "means": [1000.0] * 6, "stds": [500.0] * 6, "sensors": ["L30"]}
    output = {"bands": ["agbd"], "units": "Mg ha-1", "nodata": -1}
    made = bundle.save(
        folder / "model",
        variables,
        task="biomass",
        architecture=sizes,
        input=means,
        output=output,
        training={"dataset": "none"},
        provenance={"source": "random"},
    )
    model = biomass_jax.load(made, tile=64, stride=64, margin=0, batch_size=1)
    with rasterio.open(model.predict_file(image, folder / "maps").path) as found:
        assert (found.read(1) >= 0).any()


def main(folder, system):
    """All of it."""
    hide(system)
    count = import_all()
    predict(folder, prepare(folder))
    print(f"{count} modules, a data set and a map")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
