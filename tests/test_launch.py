"""The launch files: they parse, name keys that exist, and start or continue what they say."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_resume_fit import SETTINGS

from calig.pipeline.compose import compose

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
    assert started[:3] == ["srun", "calig", "run"]
    assert "data.path=with space" in started and f"run.dir={tmp_path / 'run'}" in started
    config = compose([item for item in started[3:] if not item.startswith("data.path")], check=False)
    assert config.trainer["num_nodes"] == 2 and config.trainer["devices"] == 4
    assert config.trainer["strategy"] == "ddp"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    continued, _ = shell(text, "experiment=sst2", **slurm)
    assert continued == ["srun", "calig", "run", f"run.resume={tmp_path / 'run'}"]
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
    assert started[:4] == ["exec", "torchrun", "--standalone", "--nproc-per-node"], error
    settings = started[started.index("run") + 1 :]
    compose([item for item in settings if not item.startswith("data.path")], check=False)
    (tmp_path / "config.yaml").touch()
    continued, _ = shell(text, **{**variables, "RUN_DIR": str(tmp_path)})
    assert continued[continued.index("run") + 1 :] == [f"run.resume={tmp_path}"]


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
    assert sweep["metric"]["name"] == config.model.monitor


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
