"""What is written of the presets is what they are."""

import re

from root import ROOT

from inference.input_fields import Interface
from trainer.settings.inputs import INPUTS
from trainer.settings.presets import PRESETS, Preset

GUIDE = ROOT / "docs" / "training.md"
REFERENCE = ROOT / "docs" / "settings.md"


def row(name: str, preset: Preset) -> list[str]:
    """The preset's row in the guide."""
    dropout = "base" if preset.caption_dropout is None else f"{preset.caption_dropout:g}"
    return [
        f"`{name}`",
        preset.purpose,
        *(f"x{share:g}" for share in (preset.rank, preset.steps, preset.learning_rate)),
        str(preset.most_resolution or "base"),
        preset.timestep_sampling or "base",
        dropout,
        f"{preset.ema_decay:g}",
    ]


def test_the_guides_table_of_presets_is_theirs() -> None:
    table = re.search(r"\| preset \|.*?\n\n", GUIDE.read_text(encoding="utf-8"), re.S)
    assert table is not None
    _, _, *rows = table[0].strip().splitlines()
    written = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert written == [row(name, preset) for name, preset in PRESETS.items()]


def test_the_reference_names_every_setting() -> None:
    prose = re.sub(r"```.*?```", "", REFERENCE.read_text(encoding="utf-8"), flags=re.S)
    code = " ".join(re.findall(r"`([^`]+)`", prose))
    named = set(re.findall(r"\w+", code))
    in_yaml = {n: each for n, each in INPUTS.items() if Interface.YAML in each.on}
    assert {each.key or name for name, each in in_yaml.items()} - named == set()
