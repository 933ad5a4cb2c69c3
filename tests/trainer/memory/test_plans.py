"""Plans for a page: the figures of `plan`, counted once for all settings that they do not need."""

from collections.abc import Callable
from typing import Any

import pytest

from trainer.memory import plan_data, plans
from trainer.memory.plan import Figures
from trainer.memory.plans import Plans
from trainer.settings.fields import Settings


def test_a_plan_has_the_figures_of_the_command_and_counts_them_once(
    small: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, page = small(base_model="miniature-turbo"), Plans()
    first, wanted = page.plan(settings), plan_data(settings)
    assert [each["mode"] for each in first["modes"]] == [m["mode"] for m in wanted["modes"]]
    parts = {each["name"]: each["bytes"] for each in first["parts"]}
    assert parts == wanted["modes"][0]["bytes"]
    assert first["fits"] is None and first["gpu_bytes"] is None  # there is no GPU
    assert first["peak_bytes"] > sum(parts.values()) * 0.99
    saving = page.plan(small(base_model="miniature-turbo", steps=9, weights_every=4))
    saved = 2 * wanted["lora_file_bytes"]
    assert saving["disk_bytes"] == first["disk_bytes"] + saved

    counted: list[Settings] = []
    known, _ = next(iter(page._figures.values()))

    def count(each: Settings) -> Figures:
        counted.append(each)
        return known

    monkeypatch.setattr(plans, "count", count)
    same: list[dict[str, Any]] = [{"learning_rate": 1e-3}, {"seed": 1}, {"steps": 9}]
    for changes in same:
        assert page.plan(small(base_model="miniature-turbo", **changes)) == first
    assert not counted
    others: list[dict[str, Any]] = [{"rank": 8}, {"resolution": "128"}, {"ema_decay": 0.5}]
    for number, changes in enumerate([*others, {"batch_size": 2}], start=1):
        page.plan(small(base_model="miniature-turbo", **changes))
        assert len(counted) == number, changes
    page.plan(settings.replace(pairs=1))
    assert len(counted) == 5


def test_a_resolution_between_the_sizes_of_the_model_is_planned_as_the_next_smaller_one(
    small: Callable[..., Settings],
) -> None:
    odd, even = (
        plan_data(small(base_model="miniature-turbo", resolution=each)) for each in ("60", "56")
    )
    assert odd["modes"] == even["modes"]
