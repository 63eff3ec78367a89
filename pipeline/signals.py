"""Signals that end a run: SIGTERM, and SIGUSR1, with which SLURM announces the end of a job's time."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

END, REQUEUE = 2, 3
"""What is asked, as numbers: of several processes that were asked differently, the largest counts (1: only save)."""

_ASKS = {signal.SIGTERM: END}
if hasattr(signal, "SIGUSR1"):  # Windows has none
    _ASKS[signal.SIGUSR1] = REQUEUE


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
    be continued exactly, and several processes to one that all of them come to. A signal handler never is either.

    Attributes:
        asked: 0, or the largest of `END` and `REQUEUE` that came.
        deferred: Whether signals are only noted.
    """

    def __init__(self) -> None:
        self.asked = 0
        self.deferred = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

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
        self._process = os.getpid()  # a strategy may have forked it
        if self._before:
            for number in _ASKS:
                signal.signal(number, self._note)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the work within at once, also one that came before.

        Raises:
            Stopped: By a signal.
        """
        before, self.deferred = self.deferred, False
        try:
            if self.asked:
                raise Stopped(self.asked)
            yield
        finally:
            self.deferred = before

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked helper has the handler too. The run's end is not its business; its parent's `terminate()` is.
            if number == signal.SIGTERM:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked = max(self.asked, _ASKS[signal.Signals(number)])
        if not self.deferred:
            self.deferred = True  # a second signal must not break off what the first one makes the run do
            raise Stopped(self.asked)


def let_parent_end(name: str, seconds: float = 10) -> None:
    """Wait for the end of the process that has started this one, if it is the first of the run.

    Where Lightning starts the processes, it kills the first one, whatever that is still doing, as soon as it finds that
    another has ended with a code that is not 0. All of a run may end so: after a signal, or with failed samples.

    Args:
        name: Of the environment variable with the number of the first process.
        seconds: What to wait at most: where this process alone failed, the first is to be killed.
    """
    deadline = time.monotonic() + seconds
    while os.environ.get(name) == str(os.getppid()) and time.monotonic() < deadline:
        time.sleep(0.02)


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
