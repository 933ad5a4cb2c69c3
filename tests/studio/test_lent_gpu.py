"""Runs that are paused for images are resumed whatever ends the images, unless they are stopped."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import Page, Server, until, with_dataset

pytestmark = pytest.mark.usefixtures("small_generator")


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMALL_GPU", "1")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def paused_for_images(page: Page, state: str = "paused", **images: Any) -> tuple[str, str]:
    """A run and the job that it is paused for."""
    run = page.new(steps=1000, rank=16)
    until(lambda: page.run(run)["step"])
    body = {"prompt": "a slow dog", "seed": 5, "when": "pause", "count": 4} | images
    job = page.client.post("/api/images", json=body).json()["id"]
    page.becomes(run, state)
    return run, job


def images(page: Page, job: str) -> Any:
    return page.client.get(f"/api/images/{job}").json()


def resumed(page: Page, run: str) -> None:
    until(lambda: page.events(run, "resumed"))
    assert len(page.events(run, "started")) == 2
    page.becomes(run, "running")


def test_a_run_that_was_paused_for_images_is_resumed_before_others(page: Page) -> None:
    run, job = paused_for_images(page, count=3)
    waiting = page.new()
    found = until(lambda: f if (f := images(page, job))["state"] == "done" else None)
    assert found["done"] == 3
    resumed(page, run)
    assert page.run(waiting)["state"] == "queued" and not page.run(run)["lent"]


def test_images_that_are_cancelled_during_the_checkpoint_do_not_leave_the_run_paused(
    page: Page,
) -> None:
    run, job = paused_for_images(page, "pausing")
    page.client.post(f"/api/images/{job}/cancel")
    assert images(page, job)["state"] == "canceled" and not page.events(run, "paused")
    resumed(page, run)


def test_a_server_that_ends_meanwhile_resumes_the_run_at_its_next_start(page: Page) -> None:
    run, job = paused_for_images(page)
    until(lambda: images(page, job)["done"])
    page.end()
    page.start()
    resumed(page, run)


def stopped(page: Page, run: str) -> None:
    page.do(run, "stop")


def deleted(page: Page, run: str) -> None:
    until(lambda: "delete" in page.run(run)["allowed"])
    trash = page.client.delete(f"/api/runs/{run}").json()["trash"]
    page.client.post(f"/api/trash/{trash}/restore")


@pytest.mark.parametrize("ends", [stopped, pytest.param(deleted, marks=pytest.mark.slow)])
def test_what_the_user_ends_meanwhile_is_not_resumed(
    page: Page, ends: Callable[[Page, str], None]
) -> None:
    run, job = paused_for_images(page)
    assert page.run(run)["lent"]
    ends(page, run)
    assert not page.run(run)["lent"]
    until(lambda: images(page, job)["state"] == "done")
    time.sleep(0.3)
    assert page.client.get("/api/queue").json()["order"] == []
    assert page.run(run)["state"] == "paused" and len(page.events(run, "started")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["pausing", "paused"])
def test_a_killed_server_resumes_the_run_at_its_next_start(tmp_path: Path, moment: str) -> None:
    server = Server(with_dataset(tmp_path), small=True)
    try:
        run = server.new("key", steps=1000, rank=16, placeholder_learning_rate=0.02)
        until(lambda: server.get(f"/api/runs/{run}")["step"])
        body = {"prompt": "a slow dog", "when": "pause", "count": 50}
        job = server.post("/api/images", **body)["id"]
        until(lambda: server.state(run) == moment)
        server.kill()
        server.start()
        until(lambda: server.get(f"/api/runs/{run}/series")["resumed"])
        assert server.state(run) == "running"
        assert server.get(f"/api/images/{job}")["state"] == "failed"
    finally:
        server.stop()
