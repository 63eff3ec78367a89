"""What the user reads while a run works: a few plain lines on the terminal, and the same in `log.txt`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console as RichConsole
from rich.table import Table

_LIBRARIES = ("py.warnings", "lightning.pytorch", "lightning.fabric", "transformers", "calig")

# What these say is true, but for who writes the Trainer call or the model's code, and here calig does.
_NOISE = (
    ".*does not have many workers.*",
    ".*log_every_n_steps.*",
    ".*LeafSpec.*",
    ".*predict returned None.*",
    ".*across ranks is zero.*",
    ".*Experiment logs directory .* exists and is not empty.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*your dataloader is not resumable.*",  # the data module is
)


def _quieten() -> None:
    from transformers.utils import logging as transformers_logging

    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Console:
    """Writes to the terminal and to a log file; silent on all processes but the first.

    Messages of the libraries and Python warnings go to the log file too while the console is open.

    Args:
        log: The log file; appended to.
        main: Whether this process speaks.
    """

    def __init__(self, log: Path, main: bool = True) -> None:
        self.log = log
        self.main = main
        self.terminal = RichConsole(highlight=False, quiet=not main, soft_wrap=True)
        self._file: RichConsole | None = None
        self._handler: logging.Handler | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        if self.main:
            self._stream = self.log.open("a", encoding="utf8")
            self._file = RichConsole(file=self._stream, width=160, highlight=False, no_color=True)
            self._handler = logging.StreamHandler(self._stream)
            self._handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
            logging.captureWarnings(True)
            for name in _LIBRARIES:
                logging.getLogger(name).addHandler(self._handler)
        _quieten()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            for name in _LIBRARIES:
                logging.getLogger(name).removeHandler(self._handler)
            logging.captureWarnings(False)
            if error is not None:
                # The terminal shows one line; whoever looks into a run that took hours wants to see where.
                self._stream.writelines(traceback.format_exception(error))
            with contextlib.suppress(OSError):
                self._stream.close()
            self._file = self._handler = None

    def say(self, message: Any) -> None:
        """Print a line, or anything that rich can draw."""
        for target in (self.terminal, self._file):
            if target is not None:
                # Nothing is cropped: a narrow terminal wraps, a pipe gets whole lines.
                width = None if isinstance(message, str) else max(target.width, 100)
                # A full disk must not end a training through a line of its log; a broken pipe does end the run.
                with contextlib.suppress(*([OSError] if target is self._file else [])):
                    target.print(message, markup=False, width=width, crop=False)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._stream.flush()

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.say(f"warning  {message}")

    def stage(self, name: str) -> None:
        """Head a stage."""
        self.say(f"\n── {name} {'─' * (60 - len(name))}")

    def table(self, title: str, columns: list[str], rows: list[list[str]], note: str = "") -> None:
        """Print a table: the first column left, the others right."""
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), collapse_padding=True)
        self.say(title)
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.say(table)
        if note:
            self.say(note)

    def results(self, folder: Path, failed: int, headlines: Mapping[str, str] | None = None) -> None:
        """Say what came out and where to look, at the end of a run.

        Args:
            folder: The run directory.
            failed: Explanations that failed.
            headlines: What came out, name -> value as text.
        """
        seconds = time.monotonic() - self._start
        rows = []
        for name, what in (
            ("report.html", "the page to open in a browser"),
            ("summary.json", "every number"),
            ("benchmark.csv", "the methods compared, with tests"),
            ("explanations", "parquet, one row per sample and method"),
            ("model", "the best weights, a Hugging Face folder"),
        ):
            if (folder / name).exists():
                rows.append((str(folder / name), what))
        # The shell expands the pattern: several sessions of one run are uploaded in their order.
        if any((folder / "wandb").glob("offline-run-*")):
            rows.append((f"wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*", "uploads the offline run"))
        self.say(f"\n── done in {seconds:.0f} s {'─' * (52 - len(f'{seconds:.0f}'))}")
        width = max(map(len, headlines or ()), default=0)
        for name, value in (headlines or {}).items():
            self.say(f"  {name:<{width}}  {value}")
        if headlines:
            self.say("")
        width = max((len(path) for path, _ in rows), default=0)
        for path, what in rows:
            self.say(f"  {path:<{width}}  {what}")
        if failed:
            self.warn(f"{failed} explanations failed; see {folder / 'failures.jsonl'}")
