"""`fireopd env`, and what is said of devices that are here and not used."""

import json
import stat
import sys

import jax
import pytest

from fireopd_jax import cli
from fireopd_jax.commands.env import is_writable
from fireopd_jax.runtime import devices


class Device:
    def __init__(self, platform, kind, limit=None):
        self.platform, self.device_kind, self.limit = platform, kind, limit

    def memory_stats(self):
        return None if self.limit is None else {"bytes_limit": self.limit}


def run_env(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fireopd", "env"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert not done.value.code


def tool(folder, text):
    """Write an nvidia-smi that prints `text`."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\nprintf '%s\\n' '{text}'\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


def test_the_environment_is_json_with_machine_and_cache(monkeypatch, capsys):
    run_env(monkeypatch)
    found = json.loads(capsys.readouterr().out)
    [kind] = found["machine"]["kinds"]
    assert (kind["platform"], kind["count"]) == ("cpu", 8)
    assert found["machine"]["usable_cores"] >= 1 and kind["memory_bytes"] > 0
    assert found["cache"]["folder"] and found["cache"]["writable"] is True


def test_devices_are_named_with_their_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus = [Device("gpu", "NVIDIA H200", 139 * devices.GIB)] * 2
    monkeypatch.setattr(jax, "devices", lambda: gpus)
    assert devices.kinds() == ["2 × NVIDIA H200 (139 GiB)"]
    monkeypatch.setattr(jax, "devices", lambda: [Device("tpu", "TPU v5 lite")])
    assert devices.kinds() == ["1 × TPU v5 lite (unknown memory)"]


def test_of_a_gpu_the_whole_memory_is_named(monkeypatch, tmp_path):
    tool(tmp_path, "NVIDIA H200, 142336")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(jax, "devices", lambda: [Device("gpu", "NVIDIA H200", 104 * devices.GIB)])
    assert devices.kinds() == ["1 × NVIDIA H200 (139 GiB)"]


def test_a_gpu_that_jax_does_not_use_is_named(monkeypatch, tmp_path, capsys):
    tool(tmp_path, "NVIDIA H200, 142336")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert devices.advice() == [
        "an NVIDIA GPU is here (NVIDIA H200), but JAX runs on the CPU: "
        'pip install "fireopd-jax[cuda]"'
    ]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu keeps JAX off it" in devices.advice()[0]
    run_env(monkeypatch)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["machine"]["advice"] == devices.advice()
    assert printed.err == f"fireopd: {devices.advice()[0]}\n"


def test_a_broken_tool_is_no_gpu(monkeypatch, tmp_path):
    tool(tmp_path, "NVIDIA-SMI has failed, communicate with the driver")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert devices.installed_gpus() == {}


def test_a_folder_that_is_not_there_yet_may_be_writable(tmp_path):
    assert is_writable(tmp_path / "a" / "b") and not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    assert not is_writable(tmp_path / "file")
