"""What a run tells: `metrics.jsonl`, TensorBoard events and lines on the console."""

import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


def summary_writer() -> Any:
    """tensorboardX's `SummaryWriter`, without torch, which it would import where it finds it: 1.6 s, 200 MB, no use."""
    barred = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if barred:
            del sys.modules["torch"]
    return SummaryWriter


class Writer:
    """Writes scalars and figures of one run; on processes other than the first, nothing."""

    def __init__(self, workdir: Path, *, resumed: int | None, active: bool = True) -> None:
        """Open the files, cut back to where the run goes on.

        Args:
            workdir: of the run.
            resumed: step of the checkpoint that the run goes on from; None = a new run.
            active: whether this process writes at all.
        """
        self._active = active
        if not active:
            return
        self._path = workdir / METRICS
        cut_back(self._path, -1 if resumed is None else resumed)
        self._file = self._path.open("a", encoding="utf-8")
        # Events after the checkpoint's step are hidden by TensorBoard.
        self._board = summary_writer()(str(workdir), purge_step=None if resumed is None else resumed + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line of `metrics.jsonl`, and each number as a scalar in TensorBoard.

        Numbers that aren't finite are null in the file: JSON has no word for them.
        """
        if not self._active:
            return
        line = {"step": step} | {name: _finite(value) for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in line.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def figure(self, step: int, name: str, image: Any) -> None:
        """A picture in TensorBoard: uint8 (H, W, 3)."""
        if self._active:
            self._board.add_image(name, image, step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Close both files."""
        if self._active:
            self._file.close()
            self._board.close()


def cut_back(path: Path, step: int) -> None:
    """Take lines after `step`, validations at it and half a last line out of a `metrics.jsonl`; rewrite and rename.

    The validation at the checkpoint's step is written again by the run, from the checkpoint: a kill may have come
    before or after its line.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short by a kill
        if line["step"] < step or (line["step"] == step and "val/loss" not in line):
            kept.append(text + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
