"""Schema and plan: forms from the declarations, and a process that counts."""

import os
from pathlib import Path
from typing import Any

import pytest
from pages import DATASET, SHORT, Answer, Page, Server, until, with_dataset

from studio import planner
from studio.new_runs import FROM_JOBS, NOT_OFFERED
from trainer.settings import TrainingInputs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the planner's process is asked; its answers are made up."""
    found: list[dict[str, Any]] = []

    async def ask(_: planner.Planner, **request: Any) -> dict[str, Any]:
        found.append(request)
        facts: dict[str, Any] = {"fits": None, "warnings": [], "disk_bytes": 1 << 60, "steps": 100}
        return {**facts, "seconds_per_step": 0.5, "tokens": []}

    monkeypatch.setattr(planner.Planner, "ask", ask)
    return found


def plan(page: Page, **settings: Any) -> Any:
    body = {"settings": settings, "datasets": [{"name": DATASET, "token": "<abc>"}]}
    answer = page.client.post("/api/plan", json=body)
    return answer.json() | {"status": answer.status_code}


def test_the_form_has_every_field_that_may_be_set_here(
    page: Page, asked: list[dict[str, Any]]
) -> None:
    schema = page.client.get("/api/schema").json()
    fields = {each["name"]: each for each in schema["fields"]}
    missing = TrainingInputs.inputs().keys() - fields.keys()
    assert missing == NOT_OFFERED | FROM_JOBS | {"epochs"}
    assert set(schema["first"]) <= fields.keys()
    assert fields["rank"] == fields["rank"] | {"type": "integer", "minimum": 1, "maximum": 256}
    assert fields["preset"]["choices"] == [each["name"] for each in schema["presets"]]
    assert {each["group"] for each in fields.values()} <= {g["name"] for g in schema["groups"]}
    bases = {each["name"]: each for each in schema["bases"]}
    facts = [(bases[name]["license"], bases[name]["bytes"]) for name in ("qwen-image", "z-image")]
    assert facts == [("Apache-2.0", 55 * 10**9), ("Apache-2.0", 20 * 10**9)]
    takes = {"least": 1, "most": 3, "resolution": 1024, "name": "Picture {}"}
    assert bases["qwen-image-edit-2511"]["references"] == takes
    assert bases["qwen-image-2.1"]["references"]["name"] == "<image{}>"
    assert bases["z-image-de-turbo"]["bytes"] is None  # not known
    assert bases["miniature-turbo"]["here"] and schema["automatic"] == "miniature-turbo"


def test_a_plan_warns_of_captions_and_of_a_full_disk(
    page: Page, asked: list[dict[str, Any]]
) -> None:
    image = next((page.folder / "datasets" / DATASET).glob("*.txt"))
    image.write_text("a red circle")
    found = plan(page, **SHORT)
    assert found["images"] == 6 and found["seconds"] == 50
    texts = [each["text"] for each in found["warnings"]]
    assert "GB of disk space" in texts[0]
    assert texts[1] == "1 of 6 captions do not contain TOK or <abc>"
    assert found["warnings"][1]["image"].startswith(image.stem)
    assert found["settings"]["rank"] == 2 and "dataset" not in found["settings"]
    assert asked[-1]["settings"]["placeholder_token"] == "<abc>"


def test_a_plan_of_refused_settings_names_the_field(
    page: Page, asked: list[dict[str, Any]]
) -> None:
    found = plan(page, rank=1000)
    assert (found["status"], found["field"]) == (422, "rank")
    found = plan(page, rank="many")
    assert (found["status"], found["field"]) == (422, "rank")
    assert plan(page, rank="16")["status"] == 200  # as forms send numbers
    assert len([each for each in asked if each["do"] == "plan"]) == 1


@pytest.mark.slow
def test_the_planner_starts_again_and_ends_with_the_server(tmp_path: Path) -> None:
    server = Server(with_dataset(tmp_path))
    try:
        body: dict[str, Any] = {"datasets": [{"name": DATASET, "token": "<zwx>"}]}
        first = server.post("/api/plan", settings=SHORT, **body)
        texts = ["a dog", "", "<zwx>", "dog " * 600]
        counts = server.post("/api/tokens", base="miniature-turbo", token="<zwx>", texts=texts)
        assert counts["tokens"][0] > counts["tokens"][1] and counts["most"] > 100
        assert counts["tokens"][2] == counts["tokens"][1] + 1 and counts["tokens"][3] > 600
        assert counts["lost"][:3] == [None] * 3 and counts["lost"][3].startswith("dog dog")
        [pid] = children(server)
        os.kill(pid, 9)
        second = server.post("/api/plan", settings=SHORT | {"rank": 4}, **body)
        assert second["peak_bytes"] > 0 and first["modes"][0]["mode"] == "16 bits"
        with pytest.raises(Answer) as refused:
            server.post("/api/plan", settings=SHORT | {"lora_targets": "none_of_these"}, **body)
        assert refused.value.content["field"] == "lora_targets"
        with pytest.raises(Answer) as refused:  # before it is queued, in the same words
            server.new("key", lora_targets="none_of_these")
        assert refused.value.content["field"] == "lora_targets"
        [pid] = children(server)
        server.kill()
        until(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        server.stop()


def children(server: Server) -> list[int]:
    path = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    return [int(each) for each in path.read_text().split()]
