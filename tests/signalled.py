"""A command that gets a signal while it works."""

import os
import signal
import subprocess
import time


def signalled(line, number, ready, timeout=120):
    """Start a command, send it a signal once `ready()` says so, and wait for its end.

    Returns:
        The exit code and what it wrote to stderr.
    """
    process = subprocess.Popen(
        line,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever runs the tests in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + timeout
        while not ready() and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, error
