"""The scripts of launch/ find their environment, or say what is missing."""

import math
import os
import re
import subprocess

import pytest
import yaml
from documents.blocks import ROOT
from documents.world import script

FAKE_PYTHON = "#!/bin/sh\nexit {status}\n"


def launch(tmp_path, name="local_gpu.sh", **environment):
    (tmp_path / "launch").mkdir()
    for each in (name, "environment.sh"):
        script(tmp_path / "launch" / each, (ROOT / "launch" / each).read_text())
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    return subprocess.run(
        ["bash", f"launch/{name}", "x.yaml", "run.name=a b"],
        cwd=tmp_path, env=clean | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def make_environment(folder, status=0):
    (folder / "bin").mkdir(parents=True)
    script(folder / "bin" / "fireopd", '#!/bin/sh\necho "$0" "$JAX_PLATFORMS" "$#" "$3"\n')
    script(folder / "bin" / "python", FAKE_PYTHON.format(status=status))
    return folder


@pytest.mark.parametrize("where", ["active", "checkout", "path"])
def test_the_environment_is_the_active_one_or_that_of_the_checkout(tmp_path, where):
    folder = make_environment(tmp_path / (".venv" if where == "checkout" else "other"))
    more = {
        "active": {"VIRTUAL_ENV": str(folder)},
        "checkout": {},
        "path": {"PATH": f"{folder}/bin:{os.defpath}:/usr/bin:/bin"},
    }[where]
    done = launch(tmp_path, **more)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/bin/fireopd cuda 3 run.name=a b\n"


def test_without_an_environment_or_cuda_the_remedy_is_one_line(tmp_path):
    done = launch(tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install -e" in done.stderr and "[cuda]" in done.stderr


def test_an_environment_without_cuda_is_named(tmp_path):
    make_environment(tmp_path / ".venv", status=1)
    done = launch(tmp_path)
    assert done.returncode == 2 and "no CUDA plugin" in done.stderr


@pytest.mark.parametrize("failing", [None, "0", "1"])
def test_two_processes_get_the_same_command_and_each_its_number(tmp_path, failing):
    folder = tmp_path / ".venv"
    (folder / "bin").mkdir(parents=True)
    said = (
        '#!/bin/sh\necho "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES at $JAX_COORDINATOR_ADDRESS: $*"\n'
        f'[ "$JAX_PROCESS_ID" != "{failing}" ] || exit 130\n'
    )
    script(folder / "bin" / "fireopd", said)
    done = launch(tmp_path, "two_processes.sh", PORT="7001")
    own = "of 2 at 127.0.0.1:7001: train x.yaml run.name=a b --distributed"
    assert sorted(done.stdout.splitlines()) == [f"0 {own}", f"1 {own}"], done.stderr
    assert done.returncode == (130 if failing else 0)


def test_on_a_tpu_slice_every_host_gets_the_command_quoted(tmp_path):
    script(tmp_path / "gcloud", '#!/bin/sh\nfor each in "$@"; do echo "$each"; done\nexit 3\n')
    path = f"{tmp_path}:/usr/bin:/bin"
    done = launch(tmp_path, "tpu_pod.sh", PATH=path, NAME="slice", ZONE="z", MAX_TRIES="2")
    lines = done.stdout.splitlines()
    assert done.returncode == 3 and lines.count("--worker=all") == 2 and "--zone=z" in lines
    wanted = r".venv/bin/fireopd train x.yaml run.name=a\ b --distributed"
    assert sum(line.endswith(wanted) for line in lines) == 2


def test_scripts_are_short_and_valid():
    files = sorted((ROOT / "launch").glob("*.s*"))
    assert len(files) == 5
    for file in files:
        assert len(file.read_text().splitlines()) < 60
        subprocess.run(["bash", "-n", file], check=True)
        assert file.name in (ROOT / "launch" / "README.md").read_text()


def test_a_jobset_has_a_process_for_each_host_and_ends_on_a_mistake():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    [job] = yaml.safe_load(text)["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    assert container["command"][:2] == ["fireopd", "train"]
    assert container["command"][-1] == "--distributed"
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(size) for size in topology.split("x"))
    hosts = chips // int(container["resources"]["limits"]["google.com/tpu"])
    assert spec["parallelism"] == spec["completions"] == hosts
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]  # that of a user's mistake, as in tpu_pod.sh
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    folder = mount["mountPath"]
    assert re.search(rf"run\.dir={folder}/", " ".join(container["command"]))
