"""The setting `subjects`: what it means, and what is refused before anything is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.settings.config import read_config
from trainer.settings.fields import Settings
from trainer.settings.preservation import sort_prompts
from trainer.settings.request_cost import too_much
from trainer.settings.subjects import Subject

Small = Callable[..., Settings]


def test_a_text_and_a_list_name_the_same_subjects(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text('dataset: a.zip\ntrain:\n  subjects: ["<zwx>=people/robot", "<kul>"]\n')
    for settings in (small(subjects="<zwx>=people/robot/, <kul>"), read_config(file)):
        assert settings.tokens == ("<zwx>", "<kul>")
        assert settings.named_subjects == (Subject("<zwx>", "people/robot"), Subject("<kul>"))
        assert settings.subject == settings.placeholder_token == "<zwx>"
        assert settings.replace(steps=7).tokens == settings.tokens


def test_the_usual_subject_is_one_of_one(small: Small) -> None:
    assert small(placeholder_token="<abc>").tokens == ("<abc>",)
    assert small(train_placeholder_token=False).tokens == ()
    assert small(subjects="<abc>").tokens == ("<abc>",) and small(subjects="").subjects == ()


def test_tok_in_a_preview_is_the_only_subjects_token(small: Small) -> None:
    settings = small(subjects="<kul>", sample_prompts=["a TOK at sea"])
    assert settings.sample_prompts == ("a <kul> at sea",)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"subjects": []}, "subjects is empty; remove it, or list the tokens"),
        ({"subjects": "<a>,<b>", "train_placeholder_token": False}, "train_placeholder_token is"),
        ({"subjects": "<a>,<b>", "placeholder_token": "<c>"}, "is <c>, but subjects lists"),
        ({"subjects": "<a>,<b>", "trigger_word": "fox"}, r"trained \(<a>, <b>\).*remove trigger_"),
        ({"subjects": "<a>,<A>"}, "two subjects have the placeholder token '<a>'"),
        ({"subjects": "<a>,<a>s"}, "'<a>' is part of '<a>s'; choose another"),
        ({"subjects": "<a>,b c"}, "'b c' is not one token; put a comma between two"),
        ({"subjects": "<a>=b,<b>"}, "two of them have the folder b"),
        ({"subjects": "<a>=.,<b>"}, "names no folder of the dataset"),
        ({"subjects": "<a>=x\x1b[1m,<b>"}, "names no folder of the dataset"),
        ({"subjects": "<a>,<TOK>"}, "<TOK> contains TOK, which means another token"),
        ({"subjects": "<a>=,<b>"}, "names no folder of the dataset; write TOKEN=FOLDER"),
        ({"subjects": "<a>=../x,<b>"}, "names no folder of the dataset"),
        ({"subjects": "<a>=x,<b>=x"}, "two of them have the folder x"),
        ({"subjects": [f"<{k}>" for k in range(9)]}, "there are 9 placeholder tokens; at most 8"),
        ({"subjects": {"<a>": "x"}}, "subjects is .*; it must be text or a list"),
        (
            {"subjects": "<a>,<b>", "sample_prompts": ["TOK at sea"]},
            "sample prompt 1 'TOK at sea': TOK may be any of the 2 subjects.*instead: <a>, <b>",
        ),
    ],
)
def test_subjects_that_make_no_sense_are_refused(
    given: dict[str, Any], said: str, small: Small
) -> None:
    with pytest.raises(ValueError, match=said):
        small(**given)


def test_prompts_for_preservation_have_none_of_the_tokens(small: Small) -> None:
    settings = small(subjects="<zwx>,<kul>")
    prompts = ["a <KUL> at sea", "a boat at sea", "TOK", "a [trigger]", "<TOK>"]
    others, of_subject = sort_prompts(prompts, settings)
    assert others == ["a boat at sea"]
    assert of_subject == ["a <KUL> at sea", "<kul>", "a <zwx>", "<kul>"]


def test_default_previews_of_every_subject_count_in_a_request(small: Small) -> None:
    options: dict[str, Any] = {"sample_prompts": None, "sample_every": 1, "steps": 200}
    (two,) = too_much(small(**options, subjects="<a>,<b>"))
    assert two.startswith("4 sample_prompts every 1 of 200 steps are 808 images")
    assert not too_much(small(**options))
