"""What a signal does to a run, with and without SLURM around it."""

import importlib.util
import os
import signal
import stat
import subprocess
import sys

import pytest
from test_resume_fit import AtBatch, logged, resume, run, weights

from calig.callbacks.exact_resume import ExactResume
from calig.pipeline import run as run_module
from calig.pipeline.checkpoint import find_resumable
from calig.pipeline.signals import END, REQUEUE, Stopped, StopSignals, requeue
from calig.pipeline.stages import fit

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "calig",
    "SLURM_NTASKS": "1",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's `scontrol` that notes how it is called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script, calls = folder / "scontrol", tmp_path / "calls"
    script.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit ${{SCONTROL_CODE:-0}}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return calls


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_sigusr1_in_a_slurm_job_saves_and_requeues_once(tmp_path, monkeypatch, scontrol, capsys):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        AtBatch(patch, 3, send(signal.SIGUSR1))
        assert run(folder) == 143
    assert scontrol.read_text() == "requeue 4711\n"
    shown = capsys.readouterr().out
    assert "ended by SIGUSR1" in shown and "job 4711 is back in the queue" in shown
    assert not list(folder.glob("hpc_ckpt*"))  # Lightning's own handling is out of the way
    assert resume(folder) == 0
    assert run(tmp_path / "whole") == 0
    assert weights(folder) == weights(tmp_path / "whole")
    assert scontrol.read_text() == "requeue 4711\n"


def test_sigterm_in_a_slurm_job_saves_and_does_not_requeue(tmp_path, monkeypatch, scontrol):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    AtBatch(monkeypatch, 3, send(signal.SIGTERM))
    assert run(tmp_path / "run") == 143
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() and not scontrol.exists()


def test_a_signal_outside_of_a_training_ends_the_run_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("calig.pipeline.stages.report.write_report", lambda folder: send(signal.SIGTERM)())
    assert run(tmp_path / "run", "stages=[fit,report]") == 143
    assert f"go on with run.resume={tmp_path / 'run'}" in " ".join(capsys.readouterr().out.split())
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("environment", "code", "said", "called"),
    [
        ({}, "0", None, None),
        ({"SLURM_JOB_ID": "12"}, "0", "job 12 is back", "requeue 12\n"),
        ({"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5"}, "0", "12_5", "requeue 12_5\n"),
        ({"SLURM_JOB_ID": "12"}, "1", "failed with code 1", "requeue 12\n"),
        ({"SLURM_JOB_ID": "12; rm -r /"}, "0", "no job number", None),
    ],
)
def test_requeue_names_the_job(monkeypatch, scontrol, environment, code, said, called):
    for name, value in {**environment, "SCONTROL_CODE": code}.items():
        monkeypatch.setenv(name, value)
    answer = requeue()
    assert answer is None if said is None else said in answer
    assert (scontrol.read_text() if scontrol.exists() else None) == called


def test_requeue_without_scontrol_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "`scontrol requeue 12` failed" in requeue()


def test_signals_are_taken_for_a_run_and_given_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with StopSignals() as signals:
        signals.deferred = True
        send(signal.SIGTERM)()
        assert signals.asked == END
        send(signal.SIGUSR1)()
        send(signal.SIGTERM)()
        assert signals.asked == REQUEUE
        signals.deferred = False
        with pytest.raises(Stopped) as stop:
            send(signal.SIGTERM)()
        assert stop.value.code == 143
    assert {number: signal.getsignal(number) for number in before} == before


def test_only_the_first_signal_breaks_off_what_runs():
    with StopSignals() as signals:
        with pytest.raises(Stopped):
            send(signal.SIGTERM)()
        send(signal.SIGUSR1)()  # while loggers are closed and SLURM is asked
        assert signals.asked == REQUEUE


def test_within_a_deferred_part_some_work_can_be_stopped_at_once():
    with StopSignals() as signals:
        signals.deferred = True
        with pytest.raises(Stopped), signals.at_once():
            send(signal.SIGTERM)()
        assert signals.deferred
        with pytest.raises(Stopped), signals.at_once():  # the signal came before
            pytest.fail("this must not begin")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGUSR1, 0), (signal.SIGTERM, signal.SIGTERM)])
def test_a_forked_helper_leaves_the_signals_of_the_run_alone_and_can_be_ended(sent, status):
    """SLURM signals the loader's processes too; `Process.terminate` must go on ending them."""
    with StopSignals():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                send(sent)()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == status


def test_where_there_is_no_sigusr1_sigterm_is_taken_alone(monkeypatch):
    spec = importlib.util.find_spec("calig.pipeline.signals")
    windows = importlib.util.module_from_spec(spec)
    monkeypatch.delattr(signal, "SIGUSR1")
    spec.loader.exec_module(windows)
    with windows.StopSignals() as signals, pytest.raises(windows.Stopped):
        assert signals.asked == 0
        send(signal.SIGTERM)()


def test_a_second_signal_does_not_keep_a_job_out_of_the_queue(tmp_path, monkeypatch, scontrol):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    finish = run_module.finish_loggers

    def finish_under_fire(*args, **kwargs):
        send(signal.SIGTERM)()
        finish(*args, **kwargs)

    monkeypatch.setattr(run_module, "finish_loggers", finish_under_fire)
    AtBatch(monkeypatch, 3, send(signal.SIGUSR1))
    assert run(tmp_path / "run") == 143
    assert scontrol.read_text() == "requeue 4711\n"
    assert not (tmp_path / "run" / ".metrics-before.csv").exists()


def test_a_signal_behind_the_last_step_is_answered_when_the_training_is_saved(tmp_path, monkeypatch):
    best = fit.best_weights

    def late(*args):
        send(signal.SIGTERM)()
        return best(*args)

    monkeypatch.setattr(fit, "best_weights", late)
    assert run(tmp_path / "run", "stages=[fit,test]") == 143
    monkeypatch.undo()
    assert (tmp_path / "run" / "model").exists()
    assert resume(tmp_path / "run") == 0


@pytest.mark.parametrize("variant", [[], ["trainer.max_steps=99"]])
def test_a_signal_at_the_end_of_the_last_epoch_loses_no_step(tmp_path, monkeypatch, variant):
    """Where steps are counted, too, the checkpoint holds the last epoch."""
    on_train_end = ExactResume.on_train_end

    def ending(self, trainer, module):
        send(signal.SIGTERM)()
        on_train_end(self, trainer, module)

    monkeypatch.setattr(ExactResume, "on_train_end", ending)
    assert run(tmp_path / "run", *variant) == 143
    assert find_resumable(tmp_path / "run" / "checkpoints", print)[1] == 12
    monkeypatch.undo()
    assert resume(tmp_path / "run") == 0 and run(tmp_path / "whole", *variant) == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert logged(tmp_path / "run") == logged(tmp_path / "whole")


@pytest.mark.parametrize(("first", "waits"), [("parent", True), ("other", False)])
def test_a_process_that_fails_ends_behind_the_first_that_started_it(tmp_path, first, waits):
    """Lightning kills the first process when it finds another that has ended with an error."""
    child = (
        "import pathlib, sys; from calig.pipeline.signals import let_parent_end; folder = pathlib.Path(sys.argv[1]); "
        "(folder / 'waiting').touch(); let_parent_end('FIRST'); (folder / 'ended').touch()"
    )
    parent = (
        "import os, pathlib, subprocess, sys, time; folder = pathlib.Path(sys.argv[1])\n"
        f"os.environ['FIRST'] = str(os.getpid()) if {first == 'parent'} else '1'\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, sys.argv[1]])\n"
        "while not (folder / 'waiting').exists(): time.sleep(0.01)\n"
        "time.sleep(0.5)\n"
        "print((folder / 'ended').exists())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == str(not waits)
    assert (tmp_path / "ended").exists()  # the pipe it shares is closed
