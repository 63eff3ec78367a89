"""A grid of runs on this machine: every combination in a run directory of its own, and one table of their results.

    python scripts/sweep.py --out runs/lr experiment=quickstart --grid model.lr=1e-3,5e-4 --grid seed=0,1,2 --jobs 2
    python scripts/sweep.py --out runs/lr experiment=quickstart --grid model.lr=1e-3,5e-4 --only 1    # one of them

Called again, it continues what was broken off and runs what is missing. `--out`/sweep.csv has a row per run: its
settings, its exit code and everything in its summary.json.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CALIG = [sys.executable, "-m", "calig.pipeline.cli", "run"]


def combinations(grid: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of `key=a,b,c`, the last key changing fastest."""
    axes = []
    for item in grid:
        key, sign, values = item.partition("=")
        if not sign or not all(values.split(",")):
            sys.exit(f"--grid {item}: expected key=value,value,...")
        axes.append([(key, value) for value in values.split(",")])
    keys = [axis[0][0] for axis in axes]
    if len(set(keys)) < len(keys):
        sys.exit(f"--grid: a key is given twice: {', '.join(keys)}")
    return [dict(chosen) for chosen in itertools.product(*axes)]


def run_name(index: int, chosen: dict[str, str]) -> str:
    """A folder's name: the number of the combination, and its values to read."""
    parts = [f"{key.rpartition('.')[2]}-{value}" for key, value in chosen.items()]
    return re.sub(r"[^\w.+-]+", "-", "_".join([f"{index:03d}", *parts]))


def command(folder: Path, overrides: Sequence[str], chosen: dict[str, str]) -> list[str]:
    """What starts a run, or continues it."""
    if (folder / "config.yaml").exists():
        return [*CALIG, f"run.resume={folder}"]
    return [*CALIG, f"run.dir={folder}", *overrides, *(f"{key}={value}" for key, value in chosen.items())]


def write_table(out: Path, grid: list[dict[str, str]], codes: dict[int, int]) -> Path:
    """Write sweep.csv from what is on disk; a run that has not ended has no scalars or not all."""
    rows = []
    for index, chosen in enumerate(grid):
        folder = out / run_name(index, chosen)
        file = folder / "summary.json"
        scalars = json.loads(file.read_text(encoding="utf8")) if file.exists() else {}
        rows.append({"run": folder.name, **chosen, "exit_code": codes.get(index, ""), **scalars})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = out / "sweep.csv"
    with table.open("w", newline="", encoding="utf8") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return table


def check_same(out: Path, overrides: list[str], grid: list[str]) -> None:
    """A folder holds one sweep: a run that is continued would go on with the settings it was started with."""
    file, now = out / "sweep.json", {"overrides": overrides, "grid": grid}
    out.mkdir(parents=True, exist_ok=True)
    # The tasks of an array job come here at once: whoever is first names the file, which is whole by then.
    temporary = out / f".sweep.json.{socket.gethostname()}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(now, indent=1) + "\n", encoding="utf8")
    try:
        os.link(temporary, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not file.exists():
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    if (before := json.loads(file.read_text(encoding="utf8"))) != now:
        sys.exit(f"{out} holds another sweep: {before}. Choose another --out.")


class Running:
    """The runs at work, which a signal to the sweep ends too; none is started after it.

    Attributes:
        ended: Whether there was one.
    """

    def __init__(self) -> None:
        self.ended = False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.RLock()  # a signal may come to the thread that holds it

    def wait(self, line: list[str], **arguments: Any) -> int:
        """Run a command; returns its exit code."""
        with self._lock:
            if self.ended:
                return 128 + signal.SIGTERM
            process = subprocess.Popen(line, **arguments)
            self._processes.append(process)
        return process.wait()

    def end(self, number: int) -> None:
        """Hand a signal on: every run comes to a checkpoint and ends by itself."""
        with self._lock:
            self.ended = True
            for process in self._processes:
                process.send_signal(number)  # of one that has ended, nothing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the grid; returns 0, 1 if a run did not end with 0 or 3, or 143 if a signal ended it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs, as for `calig run`")
    parser.add_argument("--grid", action="append", required=True, metavar="key=a,b,c", help="may be repeated")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the run directories go")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument("--gpus", metavar="0,1", help="GPUs to spread the runs over, one each: sets --jobs")
    parser.add_argument("--only", type=int, metavar="I", help="the I-th combination, in this process: for array jobs")
    options = parser.parse_intermixed_args(arguments)
    grid = combinations(options.grid)
    check_same(options.out, options.overrides, options.grid)
    if options.only is not None:
        if not 0 <= options.only < len(grid):
            sys.exit(f"--only {options.only}: the grid has {len(grid)} combinations, from 0.")
        chosen = grid[options.only]
        line = command(options.out / run_name(options.only, chosen), options.overrides, chosen)
        os.environ.setdefault("WANDB_RUN_GROUP", options.out.name)
        os.execv(line[0], line)  # the signals of the job reach the run itself
    slots: queue.Queue[str | None] = queue.Queue()
    for gpu in options.gpus.split(",") if options.gpus else [None] * max(1, options.jobs):
        slots.put(gpu)

    running = Running()
    for number in (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])):
        signal.signal(number, lambda sent, _: running.end(sent))

    def one(index: int) -> int:
        folder = options.out / run_name(index, grid[index])
        gpu = slots.get()
        environment = {"WANDB_RUN_GROUP": options.out.name, **os.environ}
        environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        try:
            with folder.with_suffix(".log").open("a", encoding="utf8") as log:
                line = command(folder, options.overrides, grid[index])
                code = running.wait(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
        finally:
            slots.put(gpu)
        print(f"{folder.name}: " + ("done" if code in (0, 3) else f"ended with {code}, see {log.name}"), flush=True)
        return code

    with ThreadPoolExecutor(slots.qsize()) as pool:
        codes = dict(enumerate(pool.map(one, range(len(grid)))))
    print(write_table(options.out, grid, codes))
    if running.ended:
        return 128 + signal.SIGTERM
    return int(any(code not in (0, 3) for code in codes.values()))


if __name__ == "__main__":
    sys.exit(main())
