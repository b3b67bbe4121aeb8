"""Several processes of a run on this machine: `launch/local.sh N --config configs/X.py --workdir DIR`.

On a machine with NVIDIA GPUs each process takes one of them, on any other they share the CPU. `launch/local.sh N --
COMMAND ...` starts another command N times; it is given the same three flags, --coordinator, --process_count and
--process_id.

When a process fails, its number and how it ended are printed, the rest is ended, and its exit code is this program's.
SIGTERM and Ctrl-C are handed on as SIGTERM, upon which a run saves and ends with 75; a second one kills.
"""

import contextlib
import ctypes
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from biomass_jax.errors import STOPPED, UsageError
from biomass_jax.runtime.system import end_group

from . import sweep_child

GRACE = 10.0  # seconds that the others have from SIGTERM to SIGKILL once a process has failed
GRACE_STOPPED = 60.0  # and once one has stopped as it was told: they may still be saving
USAGE = """usage: launch/local.sh N --config configs/X.py --workdir DIR [--config.field=value]
       launch/local.sh N -- COMMAND ..."""


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def parse(argv: list[str]) -> tuple[int, list[str]]:
    """Number of processes, and the command of each without its three flags.

    Raises:
        UsageError: no number, or nothing to run.
    """
    if len(argv) < 2 or not argv[0].isdigit() or int(argv[0]) < 1:
        raise UsageError(USAGE)
    count, rest = int(argv[0]), argv[1:]
    command = rest[1:] if rest[0] == "--" else [sys.executable, "-m", "biomass_jax.main", *rest]
    if not command:
        raise UsageError(USAGE)
    return count, command


def choose_gpus(count: int, environment: dict[str, str]) -> list[str]:
    """A GPU for each process; empty on a machine without, or where JAX_PLATFORMS leaves them out.

    Raises:
        UsageError: fewer GPUs than processes.
    """
    if not {"cuda", "gpu"} & set(environment.get("JAX_PLATFORMS", "cuda").split(",")):
        return []
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        found = [name for name in visible.split(",") if name.strip()]
    elif shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
        found = [str(i) for i, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
    else:
        found = []
    if found and len(found) < count:
        raise UsageError(
            f"{count} processes, but {len(found)} GPUs; expected one each. JAX_PLATFORMS=cpu leaves the GPUs out"
        )
    return found[:count]


def _die_with_launcher() -> None:
    """In a new process: have the kernel kill it when the launcher is killed, so that it doesn't keep a GPU."""
    assert LIBC  # it's called only where there is one
    LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def how_it_ended(code: int) -> str:
    """A process's return code in words."""
    if code >= 0:
        return f"ended with exit code {code}" + " (stopped, can be resumed)" * (code == STOPPED)
    return f"was killed by signal {-code} ({signal.Signals(-code).name})"


class Group:
    """The processes, each with a thread that prints its lines with its number in front."""

    def __init__(self, count: int, command: list[str], gpus: list[str], *, name: str = "") -> None:
        """Start them, and take SIGTERM and Ctrl-C from here on.

        Args:
            count: of processes.
            command: of each, without its three flags.
            gpus: one for each process; empty leaves them as they are.
            name: of a single process, which gets no flags; its lines begin with it.
        """
        self._names = [name or str(number) for number in range(count)]
        with socket.create_server(("127.0.0.1", 0)) as server:
            address = f"127.0.0.1:{server.getsockname()[1]}"
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._printers: list[threading.Thread] = []
        self._signals = 0
        for signum in (signal.SIGTERM, signal.SIGINT):  # before there is a process that could be left alone
            signal.signal(signum, self.hand_on)
        # A single one is started by a program that does more than this, perhaps in threads: nothing may run in it
        # between fork and exec.
        before, preexec = (sweep_child.words(), None) if name else ([], _die_with_launcher if LIBC else None)
        for number in range(count):
            flags = [] if name else [f"--coordinator={address}", f"--process_count={count}", f"--process_id={number}"]
            environment = os.environ | {"PYTHONUNBUFFERED": "1"}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[number]
            process = subprocess.Popen(
                [*before, *command, *flags],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes here alone and is handed on
                preexec_fn=preexec,
            )
            self._processes.append(process)
        if self._signals:  # came while they were being started
            self.send()
        for number in range(count):  # no threads before: they and preexec_fn don't go together
            self._printers.append(threading.Thread(target=self._print, args=(number,), daemon=True))
            self._printers[-1].start()
            threading.Thread(target=self._wait, args=(number,), daemon=True).start()

    def _print(self, number: int) -> None:
        pipe = self._processes[number].stdout
        assert pipe is not None
        with pipe:
            for line in pipe:
                # Where nobody listens any more the lines are lost, but the process must not wait with them.
                with contextlib.suppress(OSError):
                    sys.stdout.buffer.write(f"[{self._names[number]}] ".encode() + line.rstrip(b"\r\n") + b"\n")
                    sys.stdout.buffer.flush()

    def _wait(self, number: int) -> None:
        self._processes[number].wait()
        self._ended.put(number)

    @property
    def stopped(self) -> bool:
        """Whether SIGTERM or Ctrl-C came."""
        return self._signals > 0

    def hand_on(self, *_: object) -> None:
        """SIGTERM to all; SIGKILL the second time."""
        self._signals += 1
        self.send(at_once=self._signals > 1)

    def send(self, *, at_once: bool = False) -> None:
        """SIGTERM, or SIGKILL, to every process that still runs, and to what it has started."""
        for process in self._processes:
            if process.poll() is None:
                end_group(process, at_once=at_once)

    def wait(self) -> int:
        """Exit code of the whole: of the first process that didn't end with 0; the rest is ended then."""
        left, code, deadline = len(self._processes), 0, None
        while left:
            try:
                number = self._ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.send(at_once=True)
                deadline = None
                continue
            left -= 1
            ended = self._processes[number].returncode
            if ended == 0 or code:
                continue
            code = ended if ended > 0 else 128 - ended
            rest = f"; ending the other {left}" if left else ""
            say(f"process {number} of {len(self._processes)} {how_it_ended(ended)}{rest}")
            self.send()
            deadline = time.monotonic() + (GRACE_STOPPED if ended == STOPPED else GRACE)
        for printer in self._printers:
            printer.join(2.0)  # a grandchild may hold the pipe open
        return code


def say(text: str) -> None:
    """A line of the launcher's own."""
    print(f"[launch] {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run; return the exit code."""
    try:
        count, command = parse(sys.argv[1:] if argv is None else argv)
        gpus = choose_gpus(count, dict(os.environ))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return Group(count, command, gpus).wait()


if __name__ == "__main__":
    sys.exit(main())
