"""Captions: what is asked, which answers are refused, what is kept, and where it is written.

The answers here are written by hand, as models with trained weights give them; random weights
answer noise. `tests/families/test_vision_language.py` asks real classes.
"""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from families.captioners import Answer, Question
from families.registry import find_base
from trainer.captions import captioning
from trainer.captions.captioning import caption_dataset
from trainer.captions.checks import clean_part, faults, tidy, with_token
from trainer.captions.log import Log
from trainer.captions.questions import (
    STYLE_SET,
    SUBJECT_SET,
    Identity,
    caption_question,
    read_identity,
)
from trainer.captions.words import found_in
from trainer.captions.writing import Wishes, Writer
from trainer.data import DatasetError

ROBOT = Identity("robot", ("red", "round head", "antenna", "wheels"))
GOOD = "TOK stands on a wooden table next to a blue cup, seen from the side in evening light."


class Scripted:
    """A model that answers by a function of the question; keeps the questions."""

    def __init__(self, answer: Callable[[str, int], str | Answer]) -> None:
        self.questions: list[str] = []
        self._answer = answer

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        found = []
        for each in questions:
            given = self._answer(each.text, len(self.questions))
            self.questions.append(each.text)
            found.append(given if isinstance(given, Answer) else Answer(given, True))
        return found


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str, int], Any]], Scripted]:
    """Replaces the loaded model by a script."""

    def use(answer: Callable[[str, int], Any]) -> Scripted:
        model = Scripted(answer)

        def scripted(log: Log, wishes: Wishes, name: str, load: Any, progress: Any) -> Any:
            return Writer(log, wishes, name, lambda: (model, 2), progress)

        monkeypatch.setattr(captioning, "Writer", scripted)
        return model

    return use


def folder_of(path: Path, captions: dict[str, str | None]) -> Path:
    path.mkdir()
    for number, (name, caption) in enumerate(captions.items()):
        Image.new("RGB", (40, 30), (number * 20, 90, 120)).save(path / f"{name}.png")
        if caption is not None:
            (path / f"{name}.txt").write_text(caption)
    return path


def answers(text: str, number: int) -> str:
    if "features:" in text:
        return "**kind:** robot\n**features:** red, a round head, antenna, wheels"
    return f"TOK stands on table number {number} in a bright room, seen from above."


# ---- Words and questions -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Its wheel touches two red-hot plates.", ["red", "wheels"]),
        ("a ROUND-HEADED robot's shadow", ["robot", "round head"]),
        ("several robots with antennas", ["robot", "antenna"]),
        ("a reddish ring of morning light on a wheelbarrow", []),
    ],
)
def test_a_word_is_found_in_all_its_forms_and_not_inside_others(
    text: str, found: list[str]
) -> None:
    assert found_in(text, ROBOT.avoid) == found
    assert found_in(
        "glasses, boxes, ponies, running, sliced", ("glass", "box", "pony", "run", "slice")
    )


def test_the_identity_is_read_from_the_answer() -> None:
    for text in (
        "kind: robot\nfeatures: red, round head, antenna, wheels",
        "Sure!\n- **Kind**: A robot.\n- **Features**: Red; a round head, an antenna and wheels.",
    ):
        assert read_identity(text) == ROBOT
    assert read_identity("It is a red robot with a round head.") is None
    assert read_identity("kind: robot\nfeatures: none") is None
    assert read_identity("kind: machine\nfeatures: red", "robot") == Identity("robot", ("red",))


def test_the_question_forbids_the_words_and_names_the_faults() -> None:
    text = caption_question(SUBJECT_SET, ROBOT, ["it mentioned red"])
    assert "Never use these words: robot, red, round head, antenna, wheels." in text
    assert "it mentioned red" in text and "TOK" in text
    assert "TOK" not in caption_question(STYLE_SET, Identity())


# ---- Checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "finished", "fault"),
    [
        (GOOD, True, None),
        (f'"{GOOD}"', True, None),
        (f"This image shows {GOOD}", True, None),
        ('TOK waits beside a shop with a sign that reads "RED ROBOT 赤い", at night.', True, None),
        (GOOD, False, "it did not end"),
        ("", True, "it was empty"),
        ("TOK on a table.", True, "it had 4 words"),
        (f"{GOOD}\n\nThe light is soft.", True, "it was not one line of plain text"),
        (f"**Caption** {GOOD}", True, "it was not one line of plain text"),
        (f"<think>A table.</think>{GOOD}", True, "it contained thoughts"),
        ("I'm sorry, but I cannot describe the people here.", True, "it refused"),
        ("TOK on a table, on a table, on a table, on a table.", True, "it repeated itself"),
        ("TOK stands at the sea!!!!!!!!!", True, "it repeated itself"),
        ("TOK 站在木桌上，旁边有一个杯子, on a table today", True, "it was not in English"),
        ("TOK appears to wait beside a cup on a table.", True, "it was not certain (appear)"),
        ("The red robots roll over wet sand at dawn.", True, "it mentioned robot, red"),
        ("TOK, TOK and TOK stand on a long table.", True, "it used TOK more than twice"),
    ],
)
def test_an_answer_is_checked(answer: str, finished: bool, fault: str | None) -> None:
    found = faults(tidy(answer), finished, SUBJECT_SET, ROBOT)
    assert fault in found if fault else found == []


def test_a_caption_of_a_style_does_not_mention_it() -> None:
    text = "A watercolor painting of a boat on a calm lake, in a whimsical style."
    assert faults(tidy(text), True, STYLE_SET, Identity()) == ["it mentioned style, whimsical"]
    kept = clean_part(text, True, STYLE_SET, Identity())
    assert with_token(kept, STYLE_SET, Identity()) == ("a boat on a calm lake, in the style of TOK")


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        (GOOD, GOOD),
        ("The robot waits in a bright hall.", "TOK waits in a bright hall."),
        ("Standing on a beach at dusk.", "TOK standing on a beach at dusk."),
        ("On a beach at dusk.", "TOK on a beach at dusk."),
        ("A beach at dusk, empty.", "TOK. A beach at dusk, empty."),
    ],
)
def test_the_token_is_put_in_by_code(text: str, placed: str) -> None:
    assert with_token(text, SUBJECT_SET, ROBOT) == placed


@pytest.mark.parametrize(
    ("text", "finished", "kept"),
    [
        (
            "TOK stands on a wooden table, its red body shining, beside a blue cup.",
            True,
            "TOK stands on a wooden table, beside a blue cup",
        ),
        (
            "**Caption:** TOK rests on a shelf in the shade. It seems to sleep.",
            True,
            "TOK rests on a shelf in the shade",
        ),
        (
            "TOK rests on a shelf in the shade, next to a",
            False,
            "TOK rests on a shelf in the shade",
        ),
        ("I'm sorry, but I cannot help with that.", True, ""),
        ("a red robot", True, ""),
    ],
)
def test_the_clean_part_of_a_wrong_answer_is_kept(text: str, finished: bool, kept: str) -> None:
    assert clean_part(text, finished, SUBJECT_SET, ROBOT) == kept


# ---- Writing -------------------------------------------------------------------------------------


def test_a_folder_gets_the_missing_captions_and_own_ones_are_never_changed(
    tmp_path: Path, asked: Any
) -> None:
    folder = folder_of(tmp_path / "imgs", {"a": "TOK by hand", "b": None, "c": "", "d": None})
    model = asked(answers)
    path, found = caption_dataset(folder)
    assert (path, found.kept, found.marked) == (folder, ["a.png"], {})
    assert found.identity == ROBOT and found.captions.keys() == {"b.png", "c.png", "d.png"}
    assert len(model.questions) == 4 and "These 4 images" in model.questions[0]
    assert (folder / "a.txt").read_text() == "TOK by hand"
    first = (folder / "b.txt").read_text()
    assert first.startswith("TOK stands on table number") and (folder / "d.txt").is_file()
    assert caption_dataset(folder)[1].captions == {} and len(model.questions) == 4

    (folder / "c.txt").write_text("TOK, edited")
    wishes = Wishes(avoid=("blue",), replace=True)
    again = caption_dataset(folder, wishes=wishes)[1]
    assert again.captions.keys() == {"b.png", "d.png"}  # not the edited one
    assert (folder / "c.txt").read_text() == "TOK, edited"
    assert (folder / "b.txt").read_text() != first


def test_what_nearly_all_written_captions_say_is_named(
    tmp_path: Path, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "imgs", dict.fromkeys("abcd"))
    asked(lambda text, number: answers(text, number).replace("seen from above", "two glowing eyes"))
    caption_dataset(folder)
    assert any("two glowing eyes” is in all 4 captions" in each for each in caplog.messages)


def test_the_name_of_a_folder_is_not_a_caption_of_its_own(tmp_path: Path, asked: Any) -> None:
    (tmp_path / "imgs").mkdir()
    folder = folder_of(tmp_path / "imgs" / "10_robot", {"a": "TOK by hand", "b": None})
    asked(answers)
    assert caption_dataset(folder.parent)[1].captions.keys() == {"10_robot/b.png"}
    assert (folder / "b.txt").is_file()
    assert caption_dataset(folder.parent)[1].captions == {}


def test_a_zip_gets_a_new_zip_and_an_interrupted_command_continues(
    tmp_path: Path, asked: Any
) -> None:
    source = tmp_path / "imgs.zip"
    with zipfile.ZipFile(source, "w") as made:
        for name in ("é/a", "é/b", "c", "d"):
            file = io.BytesIO()
            Image.new("RGB", (40, 30), (len(made.namelist()) * 30, 9, 9)).save(file, "png")
            made.writestr(f"{name}.png", file.getvalue())
        made.writestr("c.TXT", "")
        made.writestr("notes.md", "a" * 300)

    def killed(text: str, number: int) -> str:
        if number == 4:
            raise KeyboardInterrupt
        return answers(text, number)

    new = tmp_path / "imgs-captioned.zip"
    first = asked(killed)
    with pytest.raises(KeyboardInterrupt):
        caption_dataset(source)
    assert not new.exists() and len(first.questions) == 4
    with (tmp_path / "imgs-captioned.jsonl").open("a") as log:
        log.write('{"image": "cut o')
    rest = asked(answers)
    path, found = caption_dataset(source)
    assert path == new and found.captions.keys() == {"é/a.png", "é/b.png", "c.png", "d.png"}
    assert len(rest.questions) == 2  # the batch that was interrupted
    with zipfile.ZipFile(new) as made:
        names = {*made.namelist()} - {"notes.md"}
        assert names == {f"{n}.{s}" for n in ("é/a", "é/b", "c", "d") for s in ("png", "txt")}
        assert len(made.read("notes.md")) == 300
        assert made.read("é/a.txt").decode() == found.captions["é/a.png"] + "\n"
    with pytest.raises(DatasetError, match="is the dataset itself; give another --output"):
        caption_dataset(source, output=source)


@pytest.mark.parametrize(
    "images", [("a", "control/a"), ("a_end", "a_start")], ids=["folder", "start and end"]
)
def test_control_images_are_never_captioned(
    tmp_path: Path, asked: Any, images: tuple[str, str]
) -> None:
    (tmp_path / "set/control").mkdir(parents=True)
    for number, name in enumerate(images):
        Image.new("RGB", (40, 30), (number * 20, 90, 120)).save(tmp_path / f"set/{name}.png")
    model = asked(answers)
    for base in (None, "qwen-image-2.1"):
        with pytest.raises(DatasetError, match="set contains control images, and the captions of"):
            caption_dataset(tmp_path / "set", base and find_base(base))
    assert not model.questions and not list(tmp_path.rglob("*.txt"))
    if "control" in images[1]:  # _start means nothing to a model that does not edit
        _, found = caption_dataset(tmp_path / "set", find_base("z-image"))
        assert list(found.captions) == ["a.png"]


def test_a_linked_folder_gets_its_captions(tmp_path: Path, asked: Any) -> None:
    elsewhere = folder_of(tmp_path / "elsewhere", {"b": None})
    folder = folder_of(tmp_path / "set", {"a": "TOK on a table"})
    (folder / "linked").symlink_to(elsewhere)
    asked(answers)
    caption_dataset(folder)
    assert (elsewhere / "b.txt").read_text().startswith("TOK stands on table")


def test_a_wrong_answer_is_asked_once_more_and_then_kept_in_part(
    tmp_path: Path, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "The red robot stands on a wooden table, beside a small blue cup."

    def answer(text: str, number: int) -> str:
        mended = "An earlier caption was refused: it mentioned robot, red" in text
        if "features:" in text:
            return answers(text, number)
        return wrong if number in (1, 2, 4) or not mended else GOOD

    folder = folder_of(tmp_path / "imgs", {"a": None, "b": None})
    model = asked(answer)
    found = caption_dataset(folder)[1]
    assert len(model.questions) == 5  # pass 1, two captions, both once more
    assert found.captions == {"a.png": GOOD, "b.png": "TOK beside a small blue cup"}
    assert [*found.marked] == ["b.png"] and "b.png: look at its caption" in caplog.text
    rows = [json.loads(line) for line in (folder / ".captions.jsonl").read_text().splitlines()]
    assert rows[0]["features"] == ["red", "round head", "antenna", "wheels"]
    assert [(row["asked"], bool(row["faults"])) for row in rows[1:]] == [(2, False), (2, True)]


def test_without_the_two_lines_captions_are_written_with_a_warning(
    tmp_path: Path, asked: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of(tmp_path / "imgs", {"a": None})
    asked(lambda text, _: "It is a robot." if "features:" in text else GOOD)
    assert caption_dataset(folder)[1].captions == {"a.png": GOOD}
    assert "Give the words to avoid" in caplog.text
