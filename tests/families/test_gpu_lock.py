"""A GPU has one owner, and the lock is free when its process ends."""

import subprocess
import sys
from pathlib import Path

import pytest
from root import ROOT

from families.gpu_lock import GpuLock, own_gpu, owner, path_of, visible


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_one_owner_at_a_time_and_everybody_can_ask_who() -> None:
    first, second = GpuLock("GPU-1", "run", "one"), GpuLock("1", "generator", "studio")
    assert owner("GPU-1") is None
    assert first.take() and first.take() and not second.take()
    found = owner("1")
    assert found is not None and (found["kind"], found["id"]) == ("run", "one")
    first.release()
    assert owner("GPU-1") is None and second.take()
    second.release()


def test_another_device_needs_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("DEVICE", "cpu")
    assert own_gpu("run", "one") is None and visible() == ""


def test_a_killed_owner_is_none() -> None:
    program = "import sys; from families.gpu_lock import GpuLock; "
    program += "print(GpuLock('GPU-1', 'run', 'one').take(), flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes)  # type: ignore[call-overload]
    assert process.stdout.readline() == "True\n"
    assert owner("GPU-1") is not None
    process.kill()
    process.communicate()
    assert owner("GPU-1") is None
    assert path_of("GPU-1").name == "gpu-1.lock"
