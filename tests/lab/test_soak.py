"""Whatever came before, a request is drawn as in an engine that has drawn nothing else."""

from pathlib import Path

import pytest

from lab.benchmarks import server_soak
from lab.benchmarks.soak import OTHER, TURBO, soak


def test_many_requests_with_many_loras_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form of `python -m lab.benchmarks.soak`."""
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    monkeypatch.setenv("BASE_MODEL", "miniature-turbo")
    found = soak(requests=40, distinct=14, loras=10, seed=3, folder=tmp_path)
    assert found.generated + found.refused == 40
    assert found.generated > 25
    assert found.refused > 0  # broken files and words that come twice
    assert found.different == 0
    assert found.base_unchanged


@pytest.mark.slow
def test_a_server_under_mixed_requests_holds_nothing_back_and_mixes_nothing_up(
    tmp_path: Path, use_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The short form of `python -m lab.benchmarks.server_soak`, on two bases more."""
    bases = (TURBO, OTHER, "z-image-turbo", "qwen-image")
    found = server_soak.soak(seconds=5, distinct=8, seed=2, folder=tmp_path, bases=bases)
    assert (found.wrong, found.strange, found.left) == ([], [], [])
    assert found.answers["drawn"] > 8
    assert found.answers["refused"] >= len(server_soak.REFUSED)
    assert found.answers["canceled"] > 0
    assert found.late.threads <= found.early.threads + 8  # the runtime's come and go
    assert found.late.files <= found.early.files + 8
    assert found.late.memory < found.early.memory + 150  # MB; a leak is found by the long form
