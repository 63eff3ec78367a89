"""What a signal does to a run, with and without SLURM around it."""

import os
import signal
import stat

import pytest
from test_resume_fit import AtBatch, resume, run, weights

from calig.pipeline.signals import END, REQUEUE, Stopped, StopSignals, requeue

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
    monkeypatch.setattr("calig.pipeline.stages.report.run_stage", lambda context: send(signal.SIGTERM)())
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
