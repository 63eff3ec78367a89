"""A process that has imported everything once and forks a child per task: a start costs milliseconds, not seconds.

Lightning starts its gloo processes by fork too, and forking pytest itself, with its threads, would be asking for it.
"""

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
_server = None


def run_worker(task, *arguments, kill=None, timeout=240):
    """Run a task of `distributed_worker.py` in a process group of its own.

    Args:
        task: Name of its function.
        arguments: Plain values; `str` of a path.
        kill: (folder, n, seconds): the whole group gets SIGKILL that long after the folder got its n-th new file.
        timeout: Seconds after which that is an error.

    Returns:
        Whether it ended by itself.
    """
    global _server
    if _server is None or _server.poll() is not None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [sys.executable, str(Path(__file__))]
        _server = subprocess.Popen(
            line, env=environment, cwd=HERE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(_server.kill)
    request = {"task": task, "arguments": [str(a) if isinstance(a, Path) else a for a in arguments]}
    kill = kill and (str(kill[0]), *kill[1:])
    _server.stdin.write(json.dumps({**request, "kill": kill, "timeout": timeout}) + "\n")
    _server.stdin.flush()
    answer = json.loads(_server.stdout.readline())
    assert answer["ended"] or kill is not None, f"{task} still ran after {timeout} s:\n{answer['output']}"
    assert answer["code"] == 0 or not answer["ended"], answer["output"]
    return answer["ended"]


def _serve():
    sys.path.insert(0, str(HERE))
    import distributed_worker

    for name in distributed_worker.WARM:
        importlib.import_module(name)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        with tempfile.TemporaryFile("w+") as stream:
            child = os.fork()
            if child == 0:
                _child(distributed_worker, request, stream)
            ended, code = _wait(child, request["timeout"], request["kill"])
            stream.seek(0)
            answers.write(json.dumps({"ended": ended, "code": code, "output": stream.read()[-4000:]}) + "\n")
        answers.flush()


def _child(module, request, stream):
    import traceback

    os.setsid()
    for number in (1, 2):
        os.dup2(stream.fileno(), number)
    code = 1
    try:
        getattr(module, request["task"])(*request["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child, limit, kill):
    end = time.monotonic() + limit
    before = len(os.listdir(kill[0])) if kill and os.path.isdir(kill[0]) else 0
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            # What a crashed task has left running would write on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return True, os.waitstatus_to_exitcode(status)
        if kill and os.path.isdir(kill[0]) and len(os.listdir(kill[0])) >= before + kill[1]:
            time.sleep(kill[2])
            break
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, None


if __name__ == "__main__":
    _serve()
