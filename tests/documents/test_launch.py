"""The scripts of launch/ find their environment, or say what is missing."""

import os
import subprocess

import pytest
from documents.blocks import ROOT
from documents.world import script

FAKE_PYTHON = "#!/bin/sh\nexit {status}\n"


def launch(tmp_path, **environment):
    (tmp_path / "launch").mkdir()
    text = (ROOT / "launch" / "local_gpu.sh").read_text()
    script(tmp_path / "launch" / "local_gpu.sh", text)
    clean = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    return subprocess.run(
        ["bash", "launch/local_gpu.sh", "x.yaml", "run.name=a b"],
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
