"""What the demo ships and shows."""

from pathlib import Path

from demo.subject import SCENES, draw_scenes, photographs, scenes
from trainer.dataset import read_dataset


def test_the_shipped_dataset_is_what_the_world_draws(tmp_path: Path) -> None:
    drawn = draw_scenes(tmp_path / "subject.zip")
    ours, shipped = (read_dataset(path, "", "<zwx>") for path in (drawn, SCENES))
    assert [(each.name, each.caption) for each in ours] == [
        (each.name, each.caption) for each in shipped
    ]
    for one, other in zip(ours, shipped, strict=True):
        assert one.image().tobytes() == other.image().tobytes(), one.name
    assert 10 <= len(shipped) <= 20
    assert all("<zwx>" in each.caption for each in shipped)


def test_every_prompt_of_the_demo_holds_the_new_word(tmp_path: Path) -> None:
    for subject in (scenes(), photographs(tmp_path)):
        assert all("<zwx>" in prompt for prompt in subject.prompts)
        assert len(read_dataset(subject.dataset, "", "<zwx>")) >= len(subject.prompts)
