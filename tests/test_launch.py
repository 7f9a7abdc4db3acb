"""The recipes in launch/ start the training they promise, go on with it when given again, and hold no secrets."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

import config as configuration

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
RECIPES = sorted(path.name for path in LAUNCH.iterdir())
SHELL = [name for name in RECIPES if name.endswith((".sh", ".sbatch"))]
YAML = [name for name in RECIPES if name.endswith(".yaml")]
NODES = {"NODES": "2", "HEAD": "node1", "PORT": "29500"}
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "64"}
TOKEN = re.compile(
    r"hf_\w{8}|gh[pousr]_\w{8}|AKIA\w{12}|(?i:token|secret|password|key)['\"]?\s*[:=]\s*['\"]?[\w/+-]{20}"
)
MAIN = """
import os, signal, sys, time
def stop(*_):
    open("stopped" + os.environ["RANK"], "w").close()
    sys.exit(138)
signal.signal(signal.SIGUSR1, stop)
open("ready" + os.environ["RANK"], "w").close()
time.sleep(60)
"""


class Commands:
    """A PATH with executables that note how they are called, and little else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "bin"
        self.folder.mkdir()

    def add(self, name: str, body: str = "") -> None:
        path = self.folder / name
        note = '{ printf "%s\\x1f" "$@"; printf "\\x1e"; } >>"$0.calls"'
        path.write_text(f"#!/bin/bash\n{note}\n{body}\n")
        path.chmod(0o755)

    def calls(self, name: str) -> list[list[str]]:
        noted = self.folder / f"{name}.calls"
        return [call.split("\x1f")[:-1] for call in noted.read_text().split("\x1e")[:-1]] if noted.exists() else []

    def environment(self, **extra: str) -> dict[str, str]:
        return {"PATH": f"{self.folder}:/usr/bin:/bin", **extra}

    def run(self, *command: object, **extra: str) -> "subprocess.CompletedProcess[str]":
        words = [str(word) for word in command]
        return subprocess.run(
            words, env=self.environment(**extra), cwd=self.folder.parent, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((LAUNCH / name).read_text()))


def train_job() -> Any:
    return documents("kubernetes.yaml")[1]


def slurm(commands: Commands, status: int) -> "subprocess.CompletedProcess[str]":
    """Run the batch script, the step of which ends with this status."""
    commands.add("scontrol", '[ "$1" = show ] && printf "node1\\nnode2\\n"; true')
    commands.add("srun", f"exit {status}")
    return commands.run("bash", LAUNCH / "slurm.sbatch", **JOB)


def torchrun_arguments(name: str, commands: Commands) -> list[str]:
    """What torchrun is given by a recipe, its own arguments and the program's."""
    if name == "slurm.sbatch":
        slurm(commands, 0)
        (step,) = commands.calls("srun")
        return step[step.index("-c") + 2 :]
    if name == "kubernetes.yaml":
        trainer = train_job()["spec"]["trainer"]
        return [*trainer["command"][1:], *trainer["args"]]
    commands.add("torchrun")
    script = ["-c", documents(name)[0]["run"]] if name in YAML else [LAUNCH / name]
    assert commands.run("bash", *script, **NODES).returncode == 0
    (arguments,) = commands.calls("torchrun")
    return arguments


def program_arguments(name: str, commands: Commands) -> list[str]:
    arguments = torchrun_arguments(name, commands)
    start = next(i for i, word in enumerate(arguments) if word.endswith("main.py"))
    return arguments[start + 1 :]


def flags(name: str, commands: Commands) -> Mapping[str, Any]:
    return configuration.parse("main.py", "", program_arguments(name, commands))


def test_there_is_a_recipe_of_every_kind() -> None:
    assert RECIPES == ["kubernetes.yaml", "skypilot.yaml", "slurm.sbatch", "torchrun.sh", "torchrun_nodes.sh"]
    assert [len(documents(name)) for name in YAML] == [2, 1]


@pytest.mark.parametrize("name", SHELL)
def test_a_script_is_valid_bash(name: str) -> None:
    checked = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_is_accepted_and_goes_on_when_given_again(name: str, commands: Commands) -> None:
    given = flags(name, commands)
    assert given["resume_from"] == "auto"
    assert given["run_dir"]
    config = configuration.resolve(given)
    for ranks in (1, 2, 4, 8, 16):
        config.check_world(ranks)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs_the_same_training(name: str, commands: Commands) -> None:
    given = flags(name, commands)
    del given["run_dir"], given["cache_dir"], given["resume_from"]
    assert given == {
        "dataset": "imagenet1k",
        "scheduler": "onecycle",
        "amp": True,
        "batch_size": 1024,
        "streams": 16,
        "snapshot_steps": 500,
    }


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_no_token(name: str) -> None:
    assert TOKEN.search(f"HF_TOKEN=hf_{'a' * 34}")
    assert TOKEN.search((LAUNCH / name).read_text()) is None


def test_one_machine_uses_all_its_gpus_and_restarts_its_ranks(commands: Commands) -> None:
    arguments = torchrun_arguments("torchrun.sh", commands)
    own = arguments[: arguments.index("main.py")]
    assert own == ["--standalone", "--nproc_per_node", "gpu", "--max_restarts", "3"]


def test_folders_and_flags_can_be_chosen(commands: Commands) -> None:
    commands.add("torchrun")
    chosen = {"RUN_DIR": "my runs/one", "CACHE_DIR": "/big disk", "GPUS": "4"}
    assert commands.run("bash", LAUNCH / "torchrun.sh", "--epochs", "18", **chosen).returncode == 0
    (arguments,) = commands.calls("torchrun")
    given = configuration.parse("main.py", "", arguments[arguments.index("main.py") + 1 :])
    assert (given["run_dir"], given["cache_dir"], given["epochs"]) == ("my runs/one", "/big disk", 18)
    assert arguments[arguments.index("--nproc_per_node") + 1] == "4"


def test_machines_meet_at_the_head(commands: Commands) -> None:
    arguments = torchrun_arguments("torchrun_nodes.sh", commands)
    assert arguments[:2] == ["--nnodes", "2"]
    assert arguments[arguments.index("--rdzv_endpoint") + 1] == "node1:29500"


@pytest.mark.parametrize("missing", NODES)
def test_a_missing_variable_is_named(missing: str, commands: Commands) -> None:
    commands.add("torchrun")
    given = {name: value for name, value in NODES.items() if name != missing}
    done = commands.run("bash", LAUNCH / "torchrun_nodes.sh", **given)
    assert done.returncode != 0
    assert f"{missing}: set {missing} to" in done.stderr
    assert commands.calls("torchrun") == []


@pytest.mark.parametrize(
    ("status", "requeued"),
    [(0, False), (1, False), (3, False), (137, False), (138, True), (143, False)],
    ids=["done", "failed", "no data", "killed", "stopped by SIGUSR1", "cancelled"],
)
def test_slurm_requeues_a_job_if_and_only_if_a_signal_stopped_it(
    status: int, requeued: bool, commands: Commands
) -> None:
    assert slurm(commands, status).returncode == status
    again = [call for call in commands.calls("scontrol") if call[0] == "requeue"]
    assert again == ([["requeue", "77"]] if requeued else [])


def test_slurm_starts_one_torchrun_a_node_that_hears_sigusr1(commands: Commands) -> None:
    arguments = torchrun_arguments("slurm.sbatch", commands)
    assert arguments[:2] == ["--nnodes", "2"]
    assert arguments[arguments.index("--rdzv_endpoint") + 1] == "node1:29500"
    assert "SIGUSR1" in arguments[arguments.index("--signals-to-handle") + 1].split(",")
    options = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"--ntasks-per-node=1", "--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)


@pytest.mark.slow
def test_torchrun_passes_sigusr1_on_and_the_job_is_requeued(commands: Commands, tmp_path: Path) -> None:
    """With the real torchrun: the recipe rests on how it ends after a signal."""
    (tmp_path / "main.py").write_text(MAIN)
    commands.add("scontrol", '[ "$1" = show ] && echo localhost; true')
    commands.add("srun", 'echo $$ >srun.pid; while [[ "$1" == --* ]]; do shift; done; exec "$@"')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = commands.environment(**{**JOB, "SLURM_JOB_NUM_NODES": "1"}, GPUS="2", PORT=port, OMP_NUM_THREADS="1")
    env["PATH"] = f"{commands.folder}:{Path(sys.executable).parent}:/usr/bin:/bin"
    pipe = subprocess.PIPE
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch"], env=env, cwd=tmp_path, stdout=pipe, stderr=pipe)
    limit = time.monotonic() + 60
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert job.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 138, err.decode()
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped0", "stopped1"]
    assert b"stopped by SIGUSR1" in out
    assert commands.calls("scontrol")[-1] == ["requeue", "77"]


def test_kubernetes_keeps_runs_and_cache_on_the_claim() -> None:
    claim, job = documents("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    (node,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (container,) = pod["containers"]
    (name,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/volume"]
    assert volumes[name]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    arguments = job["spec"]["trainer"]["args"]
    assert {word.split("/")[1] for word in arguments if word.startswith(("--run_dir=", "--cache_dir="))} == {"volume"}


def test_kubernetes_arguments_are_text() -> None:
    trainer = train_job()["spec"]["trainer"]
    assert {type(word) for word in [*trainer["command"], *trainer["args"]]} == {str}


def test_kubernetes_takes_the_token_from_a_secret() -> None:
    (token,) = [entry for entry in train_job()["spec"]["trainer"]["env"] if entry["name"] == "HF_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["key"] == "HF_TOKEN"
    assert "value" not in token


def test_skypilot_keeps_runs_and_cache_in_buckets_and_is_given_the_token(commands: Commands) -> None:
    (task,) = documents("skypilot.yaml")
    given = flags("skypilot.yaml", commands)
    mounts = task["file_mounts"]
    assert {f"/{given[flag].split('/')[1]}" for flag in ("run_dir", "cache_dir")} == mounts.keys()
    assert {mount["mode"] for mount in mounts.values()} == {"MOUNT_CACHED"}
    assert task["secrets"] == {"HF_TOKEN": None}
    assert task["resources"]["use_spot"] is True
