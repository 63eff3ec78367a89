"""The launch files: they parse, name keys that exist, and start or continue what they say."""

import csv
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from test_resume_fit import SETTINGS

from calig.pipeline.compose import compose
from calig.pipeline.tasks import MONITORED

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
BATCH = sorted((SCRIPTS / "slurm").glob("*.sbatch"))


def shell(text, *arguments, **environment):
    """Run a bash script with a `srun`, `calig` and `torchrun` that print how they are called."""
    names = 'srun() { say srun "$@"; }\nexec() { say exec "$@"; }\ncommand() { say "$2"; }\n'
    says = 'say() { printf "%s\\n" "$@"; }\n' + names
    done = subprocess.run(
        ["bash", "-c", says + text, "script", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines(), done.stderr


@pytest.mark.parametrize("path", BATCH, ids=lambda path: path.name)
def test_batch_scripts_are_valid_bash_that_slurm_can_requeue(path):
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text()
    options = [line.split(None, 1)[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "--requeue" in options and "--open-mode=append" in options
    # No `B:`, with which the signal would reach the shell and not the processes.
    assert any(option.startswith("--signal=USR1@") for option in options)
    # SLURM stops reading options at the first command.
    assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


def test_the_training_job_starts_a_run_and_continues_it(tmp_path):
    text = (SCRIPTS / "slurm" / "train.sbatch").read_text()
    slurm = {"RUN_DIR": str(tmp_path / "run"), "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "4"}
    started, _ = shell(text, "experiment=sst2", "data.path=with space", **slurm)
    assert started[:4] == ["srun", "--kill-on-bad-exit=1", "calig", "run"]
    assert "data.path=with space" in started and f"run.dir={tmp_path / 'run'}" in started
    config = compose([item for item in started[4:] if not item.startswith("data.path")], check=False)
    assert config.trainer["num_nodes"] == 2 and config.trainer["devices"] == 4
    assert config.trainer["strategy"] == "ddp"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    # Submitted again with other nodes, it goes on with those.
    continued, _ = shell(text, "experiment=sst2", **{**slurm, "SLURM_NNODES": "1"})
    given = ["trainer.num_nodes=1", "trainer.devices=4"]
    assert continued[1:] == ["--kill-on-bad-exit=1", "calig", "run", f"run.resume={tmp_path / 'run'}", *given]
    del slurm["RUN_DIR"]
    assert "set RUN_DIR" in shell(text, **slurm)[1]


def test_the_array_job_runs_its_own_combination(tmp_path):
    text = (SCRIPTS / "slurm" / "sweep.sbatch").read_text()
    line, _ = shell(text, "experiment=sst2", "--grid", "seed=0,1", OUT=str(tmp_path), SLURM_ARRAY_TASK_ID="1")
    assert line[1:] == ["python", "scripts/sweep.py", "--out", str(tmp_path), "--only", "1", *line[7:]]
    assert line[7:] == ["experiment=sst2", "--grid", "seed=0,1"]


def test_the_kubernetes_job_starts_and_continues(tmp_path):
    job = yaml.safe_load((SCRIPTS / "kubernetes" / "job.yaml").read_text())
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    variables = {item["name"]: item["value"] for item in container["env"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS"])
    (text,) = container["args"]
    started, error = shell(text, **{**variables, "RUN_DIR": str(tmp_path)})
    assert started[:3] == ["exec", "calig", "run"], error
    config = compose([item for item in started[3:] if not item.startswith("data.path")], check=False)
    assert config.trainer["strategy"] == "ddp" and config.trainer["devices"] == int(variables["GPUS"])
    (tmp_path / "config.yaml").touch()
    continued, _ = shell(text, **{**variables, "RUN_DIR": str(tmp_path)})
    assert continued[3:] == [f"run.resume={tmp_path}", "trainer.devices=4"]


def test_the_sweep_of_weights_and_biases_names_keys_that_exist():
    sweep = yaml.safe_load((SCRIPTS / "sweep.yaml").read_text())
    values = [
        f"{key}={item['values'][0] if 'values' in item else item['min']}" for key, item in sweep["parameters"].items()
    ]
    sh, flag, text, _, arguments = sweep["command"]
    assert (sh, flag, arguments) == ("/bin/sh", "-c", "${args_no_hyphens}")
    line, _ = shell(text, *values, WANDB_RUN_ID="abc")
    assert line[:3] == ["exec", "calig", "run"] and "run.dir=runs/sweep/abc" in line
    config = compose(line[3:], check=False)
    assert config.model.lr == sweep["parameters"]["model.lr"]["min"]
    assert sweep["metric"]["name"] == (config.model.monitor or MONITORED["classification"])


def sweep(*arguments):
    line = [sys.executable, SCRIPTS / "sweep.py", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_grid_runs_continues_and_is_tabled(tmp_path):
    """One run of the grid fails at first: the second call does only what is missing."""
    out = tmp_path / "sweep"
    settings = [item for item in SETTINGS if not item.startswith(("seed", "trainer.max_epochs"))]
    arguments = ["--out", out, *settings, "trainer.max_epochs=1", "--grid", "seed=0,1", "--jobs", 1]
    blocked = out / "001_seed-1"
    blocked.mkdir(parents=True)
    (blocked / "file").touch()  # calig does not write over what it does not know
    done = sweep(*arguments)
    assert done.returncode == 1 and "001_seed-1: ended with 2" in done.stdout, done.stderr
    shutil.rmtree(blocked)
    first = (out / "000_seed-0" / "model" / "model.safetensors").stat().st_mtime_ns
    done = sweep(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "000_seed-0" / "model" / "model.safetensors").stat().st_mtime_ns == first
    with (out / "sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["run"], row["seed"], row["exit_code"]) for row in rows] == [
        ("000_seed-0", "0", "0"),
        ("001_seed-1", "1", "0"),
    ]
    assert all(0 <= float(row["val/accuracy"]) <= 1 for row in rows)
    other = sweep("--out", out, *settings, "--grid", "seed=0,2")
    assert other.returncode == 1 and "holds another sweep" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--grid", "seed"], "expected key=value,value"),
        (["--grid", "seed=1,,2"], "expected key=value,value"),
        (["--grid", "seed=1", "--grid", "seed=2"], "given twice"),
        (["--grid", "seed=1,2", "--only", "2"], "has 2 combinations"),
    ],
)
def test_a_wrong_grid_is_refused(tmp_path, arguments, said):
    done = sweep("--out", tmp_path / "sweep", *arguments)
    assert done.returncode == 1 and said in done.stderr


def test_tasks_of_an_array_job_that_start_at_once_agree_on_their_sweep(tmp_path):
    """The first names the settings; no other finds half a file, and one of another sweep is refused."""
    same = ["--out", tmp_path / "sweep", "--grid", "seed=0,1", "--only", 9]
    lines = [[sys.executable, SCRIPTS / "sweep.py", *map(str, same)] for _ in range(4)]
    tasks = [subprocess.Popen(line, stderr=subprocess.PIPE, text=True) for line in lines]
    # Each comes past the settings, to a combination that does not exist.
    assert all("has 2 combinations" in task.communicate(timeout=60)[1] for task in tasks)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["sweep.json"]
    assert "holds another sweep" in sweep("--out", tmp_path / "sweep", "--grid", "seed=0,2").stderr


def test_settings_that_another_task_names_first_stand(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", SCRIPTS / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    link = os.link

    def beaten(source, target):
        target.write_text('{"overrides": [], "grid": ["seed=7"]}')
        link(source, target)

    monkeypatch.setattr(os, "link", beaten)
    with pytest.raises(SystemExit, match="holds another sweep"):
        module.check_same(tmp_path / "sweep", [], ["seed=0,1"])
    assert not list((tmp_path / "sweep").glob(".*"))


def test_a_signal_to_a_sweep_reaches_its_runs_and_starts_no_other(tmp_path):
    """A stand-in for `calig` that ends like a run: with 143, when SIGTERM asks it to."""
    stand_in = tmp_path / "calig" / "pipeline"
    stand_in.mkdir(parents=True)
    (tmp_path / "calig" / "__init__.py").touch()
    (stand_in / "__init__.py").touch()
    (stand_in / "cli.py").write_text(
        "import pathlib, signal, sys, time\n"
        "folder = pathlib.Path(next(a for a in sys.argv if a.startswith('run.dir=')).partition('=')[2])\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "folder.mkdir()\n"
        "time.sleep(60)\n"
    )
    out = tmp_path / "sweep"
    line = [sys.executable, SCRIPTS / "sweep.py", "--out", out, "--grid", "seed=0,1,2", "--jobs", "2"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([str(part) for part in line], env=environment, stdout=subprocess.PIPE, text=True)
    begun = [out / "000_seed-0", out / "001_seed-1"]
    try:
        while not all(path.is_dir() for path in begun):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 143
    assert "000_seed-0: ended with 143" in shown and "001_seed-1: ended with 143" in shown
    assert not (out / "002_seed-2").exists()


def test_the_runs_of_a_grid_are_one_group(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("sweep", SCRIPTS / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    groups = []

    def execv(program, line):
        groups.append(os.environ["WANDB_RUN_GROUP"])
        raise SystemExit

    class Done:
        def __init__(self, line, **given):
            groups.append(given["env"]["WANDB_RUN_GROUP"])

        def wait(self):
            return 0

    monkeypatch.setattr(module.os, "execv", execv)
    monkeypatch.setattr(module.subprocess, "Popen", Done)
    arguments = ["--out", str(tmp_path / "rates"), "--grid", "seed=0"]
    for known in (None, "mine"):
        monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
        if known:
            monkeypatch.setenv("WANDB_RUN_GROUP", known)
        assert module.main(arguments) == 0
        with pytest.raises(SystemExit):
            module.main([*arguments, "--only", "0"])
    assert groups == ["rates", "rates", "mine", "mine"]
