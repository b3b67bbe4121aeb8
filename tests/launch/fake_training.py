"""Stands in for `biomass_jax.main` in tests of sweeps: takes its arguments, writes losses, resumes, stops on SIGTERM.

An epoch's loss is (log10(optimizer.learning_rate) + 3)^2 + |epoch - 2|, lowest in the second. Where the config begins
from a bundle, `best/` is that one. It needs no package, so that it starts at once.
"""

import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def stop(*_: object) -> None:
    note("sigterm")
    os._exit(75)


def note(word: str) -> None:
    with (workdir / "notes.txt").open("a") as file:
        file.write(word + "\n")


given = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))
workdir = Path(given["--workdir"])
fields = dict(text.removeprefix("--config.").split("=", 1) for text in sys.argv[5:])
epochs = int(fields.get("epochs", 3))
rate = float(fields.get("optimizer.learning_rate", 1e-3))
crash = fields.get("model.crash", "never")
signal.signal(signal.SIGTERM, stop)
workdir.mkdir(parents=True, exist_ok=True)
note(f"start {os.getpid()} gpu {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}")
starts = (workdir / "notes.txt").read_text().count("start")

metrics = workdir / "metrics.jsonl"
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
with metrics.open("a") as file:
    for epoch in range(done + 1, epochs + 1):
        if crash == "always" or (crash == "once" and starts == 1 and epoch == 2):
            print("no room left in this forest")
            sys.exit(3)
        if crash == "stopped" and starts == 1 and epoch == 2:
            os._exit(75)
        loss = math.nan if crash == "nan" else (math.log10(rate) + 3) ** 2 + abs(epoch - 2)
        line = {"step": 10 * epoch, "epoch": epoch, "val/loss": None if math.isnan(loss) else loss}
        file.write(json.dumps(line) + "\n")
        file.flush()
        time.sleep(float(fields.get("model.pause", 0)))
        if rate > 1:  # a bad trial that takes long
            time.sleep(0.1)
if fields.get("init_from"):
    shutil.copytree(fields["init_from"], workdir / "best", dirs_exist_ok=True)
