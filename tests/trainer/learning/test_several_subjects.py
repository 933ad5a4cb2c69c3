"""Several subjects in one run: each token has an embedding of its own, which alone it trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dataset_files import make_zip, picture
from loops import make_loop

from adapters.archive import Archive, read_archive, write_archive
from adapters.placeholder import Placeholder
from inference.engine import Engine
from inference.image_metadata import JSON
from inference.request import Request
from trainer.learning.checkpoint import read_checkpoint, write_checkpoint
from trainer.learning.history import History
from trainer.learning.resume import continue_weights, read_resume
from trainer.learning.saving import state_of
from trainer.learning.step_weights import describe_weights
from trainer.learning.zero_prior import ZeroPriorBroken
from trainer.monitor.default_previews import default_prompts
from trainer.monitor.validation import _spare
from trainer.result.evaluation import without_subject
from trainer.run import train
from trainer.settings.fields import Settings, SettingsError

Small = Callable[..., Settings]
TOKENS = ("<zwx>", "<kul>")
CAPTIONS = ["a photo of <zwx>", "a photo of <kul>", "<zwx> beside <kul>"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of each subject, in folders, and one of both."""
    files = {"zwx/a.png": picture(64, 64), "kul/b.png": picture(64, 64, color=(0, 0, 255))}
    files |= {"c.png": picture(64, 64, color=(0, 255, 0)), "c.txt": CAPTIONS[2].encode()}
    return make_zip(tmp_path_factory.mktemp("two") / "two.zip", files)


@pytest.fixture
def two(small: Small, pictures: Path) -> Small:
    given: dict[str, Any] = {"dataset": pictures, "subjects": ",".join(TOKENS), "steps": 4}
    given |= {"caption_dropout": 0.0, "validation_every": 0}
    return lambda **changes: small(**given | changes)


def same(one: Archive, other: Archive) -> bool:
    pairs = zip(one.factors.values(), other.factors.values(), strict=True)
    return one.tokens == other.tokens and all(
        map(torch.equal, one.vectors.values(), other.vectors.values())
    ) & all(torch.equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


def test_two_subjects_are_trained_saved_and_generated(two: Small) -> None:
    path = train(two(batch_size=2, ema_decay=0.5))
    archive = read_archive(path)
    assert archive.tokens == TOKENS
    meta = archive.meta
    assert meta["placeholder_tokens"] == [*TOKENS] and meta["placeholder_token"] == "<zwx>"
    for number, token in enumerate(TOKENS):
        facts = meta["zero_priors"][token]
        assert facts["moved"] and facts["steps_with_placeholder"] > 0
        assert facts["placeholder_token_id"] == 151669 + number
    assert meta["zero_prior"] == meta["zero_priors"]["<zwx>"]
    checks = {each["name"]: each["state"] for each in meta["checks"]}
    assert checks["<zwx> was trained"] == checks["<kul> was trained"] == "passed"
    assert [each["caption"] for each in meta["dataset"]["pictures"]] == [
        CAPTIONS[2], CAPTIONS[1], CAPTIONS[0]
    ]  # fmt: skip
    page = (path.parent / "report.html").read_text()
    assert "&lt;zwx&gt;, &lt;kul&gt;" in page and "the tokens" in page

    engine = Engine(torch.device("cpu"), torch.float32)
    asked = Request(prompt="-", width=32, height=32, seed=1, num_inference_steps=1)
    images = [
        engine.generate(asked.replace(prompt=prompt), archive)[0]
        for prompt in ("<zwx> at sea", "<kul> at sea", "<zwx> and <kul> at sea")
    ]
    assert len({each.tobytes() for each in images}) == 3
    (applied,) = json.loads(images[0].info[JSON])["weights"]
    assert applied["placeholder"] == "<zwx>" and [*applied["other_placeholders"]] == ["<kul>"]
    with pytest.raises(ValueError, match="TOK in prompt may be any of the 2 subjects.*<zwx>, <kul"):
        engine.generate(asked.replace(prompt="a TOK"), archive)


def test_a_step_changes_only_the_embeddings_of_its_tokens(two: Small) -> None:
    loop = make_loop(two(batch_size=1))
    seen = set()
    for step in range(6):
        before = [each.vectors.detach().clone() for each in loop.placeholders]
        tokens = loop.captions.tokens_in(loop.batch(step)[3])
        loop.step(step)
        moved = {
            each.token
            for each, old in zip(loop.placeholders, before, strict=True)
            if not torch.equal(each.vectors, old)
        }
        assert moved == tokens
        seen.add(frozenset(tokens))
    assert seen == {frozenset(["<zwx>"]), frozenset(["<kul>"]), frozenset(TOKENS)}
    assert [len(each) for each in loop.history.row_norms] == [4, 4]
    kinds = {each.vectors.flatten()[0].item() for each in loop.placeholders}
    assert len(kinds) == 2


def test_a_token_without_a_gradient_is_named(two: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = make_loop(two(steps=12, batch_size=3))
    features = loop.captions.features

    def without(captions: list[str], *more: Any) -> Any:
        """The second token has no effect."""
        loop.captions.vectors["<kul>"] = loop.placeholders[1].vectors.detach()
        return features(captions, *more)

    monkeypatch.setattr(loop.captions, "features", without)
    with pytest.raises(ZeroPriorBroken, match="the gradient of <kul> was zero in every step"):
        loop.run()


def test_a_run_with_one_of_subjects_equals_one_with_the_usual_token(
    small: Small, pictures: Path
) -> None:
    given: dict[str, Any] = {"dataset": pictures, "default_caption": "<zwx>", "batch_size": 3}
    loops = [make_loop(small(**given | one)) for one in ({}, {"subjects": "<zwx>"})]
    for loop in loops:
        loop.step(0)
    one, other = (Archive(*loop.final_weights(), {}) for loop in loops)
    assert same(one, other) and one.tokens == ("<zwx>",)
    assert describe_weights(loops[1].settings).keys() == describe_weights(loops[0].settings).keys()


def test_a_resumed_run_with_two_subjects_is_the_same(two: Small, tmp_path: Path) -> None:
    whole, again = make_loop(two()), make_loop(two())
    for step in range(4):
        if step == 2:
            checkpoint = write_checkpoint(state_of(whole), tmp_path)
        whole.step(step)
    state = read_checkpoint(checkpoint)
    assert {"placeholder.0", "placeholder.1"} <= state.parameters.keys()
    again.restore(state)
    for step in (2, 3):
        again.step(step)
    one, other = (Archive(*loop.final_weights(), {}) for loop in (whole, again))
    assert same(one, other)
    assert whole.history.plain() == again.history.plain()
    assert whole.history.plain()["other_row_norms"] != [[]]

    with pytest.raises(SettingsError, match=r"has subjects \['<zwx>', '<kul>'\], but this run has"):
        read_resume(two(subjects="<zwx>", resume_from=checkpoint), [])
    weights = write_archive(one, tmp_path / "weights.zip")
    with pytest.raises(
        SettingsError, match="placeholder '<zwx>' and '<kul>', but this run has '<z"
    ):
        read_resume(two(subjects="<zwx>", resume_from=weights), [])
    assert isinstance(read_resume(two(resume_from=weights), []), Archive)


def test_finished_weights_are_continued_by_their_tokens(two: Small) -> None:
    loop = make_loop(two())
    rows = (Placeholder(token, torch.full((1, 64), float(k))) for k, token in enumerate(TOKENS))
    assert loop.lora is not None
    archive = Archive(loop.lora.deltas(), tuple(rows)[::-1], {})
    continue_weights(archive, loop.lora, loop.placeholders)
    assert [each.vectors.mean().item() for each in loop.placeholders] == [0.0, 1.0]


def test_an_old_history_is_that_of_one_token() -> None:
    old = {"losses": [1.0, 2.0], "row_norms": [0.5], "validation": [[0, 1.0]]}
    assert History.of(old, 1).plain() == old
    assert History.of(old, 0).row_norms == [] and History.of(old, 2).row_norms == [[0.5], []]


# ---- Prompts and held-out images -----------------------------------------------------------------


def test_default_previews_show_each_subject_two_and_none(two: Small) -> None:
    settings = two(sample_prompts=None)
    far = settings.base.preview_prompt_without_subject
    assert default_prompts(settings, CAPTIONS) == (*CAPTIONS, far)
    assert default_prompts(settings, ["a <zwx>", "a <zwx> and a hat"]) == (
        "a <zwx>",
        "a photo of <kul> on a beach",
        "a photo of <zwx> and <kul> on a beach",
        far,
    )


def test_the_prompt_for_drift_has_none_of_the_tokens() -> None:
    assert without_subject("a <zwx> and a <kul>", *TOKENS) == "something and something"
    assert without_subject("a cat", *TOKENS) == "a landscape"


def test_the_last_image_of_a_subject_is_not_held_out() -> None:
    class Shown:
        def __init__(self, name: str, caption: str) -> None:
            self.name, self.caption = name, caption

    samples: Any = [Shown(name, f"a {name[:-1]}") for name in ("<zwx>1", "<zwx>2", "<kul>1")]
    order = ["<kul>1", "<zwx>2", "<zwx>1"]
    assert _spare(samples, order, TOKENS) == ["<zwx>2"]
    assert _spare(samples, order, ["<zwx>"]) == order
