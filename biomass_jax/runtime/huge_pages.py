"""Huge pages under the arrays of a training step.

On CPU every call of a compiled program takes its intermediate arrays from the system and gives them back when it is
done: 1.8 GB for Swin-B at batch 4, 460,000 pages of 4 KiB. In pages of 2 MiB a step takes an eighth less time
(docs/performance.md). glibc asks for them only where the environment says so when a process starts.
"""

import contextlib
import os
import sys
from pathlib import Path

TUNABLES, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"  # 1: transparent ones; since glibc 2.35
LINUX = Path("/sys/kernel/mm/transparent_hugepage")
SIZE = 2 << 20  # bytes; some ARM kernels' pages of 512 MiB would waste memory
PROGRAM = "biomass_jax.main"


def environment(linux: Path = LINUX) -> dict[str, str]:
    """What to add to a process's environment for glibc to ask for huge pages.

    Args:
        linux: the folder in which Linux tells whether it gives them.

    Returns:
        Nothing where the environment says already what glibc shall do, or where asking has no effect: Linux gives huge
        pages to all or to none, or their size is not 2 MiB, or this is no Linux.
    """
    given = os.environ.get(TUNABLES, "")
    try:
        useful = "[madvise]" in (linux / "enabled").read_text() and int((linux / "hpage_pmd_size").read_text()) == SIZE
    except (OSError, ValueError):
        useful = False
    if SETTING in given or not useful:
        return {}
    return {TUNABLES: f"{given}:{SETTING}=1" if given else f"{SETTING}=1"}


def start_anew() -> None:
    """Start `python -m biomass_jax.main` over, as the same process, with `environment()`; before anything is begun.

    Returns where that changes nothing, and where `main` is called by another program: a test, a notebook, a debugger.
    """
    ours = ["-m", PROGRAM, *sys.argv[1:]]
    own, options = sys.orig_argv[-len(ours) :], sys.orig_argv[1 : -len(ours)]
    wanted = environment()
    if wanted and own == ours and "-m" not in options and sys.executable:
        with contextlib.suppress(OSError):  # a run is as good without
            os.execve(sys.executable, [sys.executable, *options, *ours], os.environ | wanted)
