"""Signals that end a run: SIGTERM, and SIGUSR1, with which SLURM announces the end of a job's time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from types import FrameType, TracebackType
from typing import Any, Self

END, REQUEUE = 2, 3
"""What is asked, as numbers: of several processes that were asked differently, the largest counts (1: only save)."""

_ASKS = {signal.SIGTERM: END, signal.SIGUSR1: REQUEUE}


class Stopped(SystemExit):
    """The run ends with exit code 143, because a signal asked it to.

    Args:
        asked: `END` or `REQUEUE`.
    """

    def __init__(self, asked: int) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.asked = asked

    def __str__(self) -> str:
        return "SIGUSR1" if self.asked == REQUEUE else "SIGTERM"


class StopSignals:
    """Takes SIGTERM and SIGUSR1 for the time of a run.

    They end the run at once, or, while `deferred`, are only noted: a training first comes to a place from which it can
    be continued exactly, which a signal handler never is.

    Attributes:
        asked: 0, or the largest of `END` and `REQUEUE` that came.
        deferred: Whether signals are only noted.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _ASKS}
            self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def install(self) -> None:
        """Take the signals, also from Lightning.

        Its handlers save in the middle of a batch and call collectives, for which the other processes do not wait.
        """
        if self._before:
            for number in _ASKS:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, _ASKS[signal.Signals(number)])
        if not self.deferred:
            raise Stopped(self.asked)


def requeue() -> str | None:
    """Ask SLURM to run this job again; the job then ends, and starts anew under the same number.

    Returns:
        What was done, or why it failed, in words; None outside a SLURM job.
    """
    environment = os.environ
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', 0)}"
    if not re.fullmatch(r"\d+(_\d+)?", job):
        return f"SLURM_JOB_ID={job} is no job number: the job was not put back into the queue."
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`scontrol requeue {job}` failed: {error}"
    if done.returncode:
        return f"`scontrol requeue {job}` failed with code {done.returncode}: {done.stderr.strip()}"
    return f"job {job} is back in the queue"
