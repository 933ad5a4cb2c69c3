"""Runs with DoRA, LoKr and LoHa: from the settings to images of weights.zip."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loops import make_loop

from adapters.archive import read_archive
from adapters.forms import TITLES
from adapters.tools.convert import convert
from adapters.tools.inspection import inspect
from adapters.tools.merge import merge
from adapters.tools.opened import ToolError, open_lora
from adapters.trained_layers import LAYERS
from trainer.learning.checkpoint import Checkpoint, write_checkpoint
from trainer.learning.resume import read_resume
from trainer.learning.saving import state_of
from trainer.run import train
from trainer.settings.fields import Settings
from trainer.settings.inputs import SettingsError

SIZE = {"width": 64, "height": 64, "num_inference_steps": 2}


@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_a_run_is_resumed_bit_for_bit_and_previews_are_what_is_generated(
    kind: str, small: Callable[..., Settings], tmp_path: Path
) -> None:
    rank = None if kind == "lokr" else 2
    given = {"adapter": kind, "rank": rank, "learning_rate": 1e-3, "lora_targets": "attention"}
    settings = small(**given, ema_decay=0.5)
    whole, resumed = make_loop(settings, 2), make_loop(settings, 2)
    for step in range(3):
        if step == 2:
            path = write_checkpoint(state_of(whole), tmp_path)
            kept = read_resume(settings.replace(resume_from=path), [])
            assert isinstance(kept, Checkpoint)
            resumed.restore(kept)
        whole.step(step)
    resumed.step(2)
    for name, parameter in whole.named.items():
        assert torch.equal(parameter, resumed.named[name]), name
    with pytest.raises(SettingsError, match=f"adapter '{kind}'|rank None"):
        read_resume(small(resume_from=path, lora_targets="attention"), [])

    # The base is quantized in training, which inference does not use.
    shown = {"sample_prompts": ("a <zwx>",), "sample_options": SIZE, "sample_every": 3}
    weights = train(small(**given, **shown, quantize="int8" if kind == "dora" else "auto"))
    archive = read_archive(weights)
    checks = {each["name"]: each for each in archive.meta["checks"]}
    for check in (
        *("every layer was trained", "the file can be read back"),
        *("<zwx> was trained", "the last preview can be reproduced"),
    ):
        assert checks[check]["state"] == "passed", checks[check]
    assert archive.meta["adapter"] == kind
    again = small(resume_from=weights, **given)
    assert read_resume(again, []) is not None
    with pytest.raises(SettingsError, match="has .* needs .*set adapter"):
        read_resume(small(resume_from=weights, lora_targets="attention"), [])

    opened = open_lora(weights)
    facts = inspect(opened)
    assert facts["kinds"] == {TITLES[kind]: len(archive.deltas)}
    reads = {name for name, answer in facts["read_by"].items() if answer == "yes"}
    assert (
        reads
        == {"dora": {"diffusers"}, "lokr": {"ComfyUI", "ai-toolkit"}, "loha": {"ComfyUI"}}[kind]
    )
    converted = convert(opened, "comfyui")
    if kind == "dora":
        norms = {key: each for key, each in converted.tensors.items() if "dora_scale" in key}
        assert len(norms) == len(archive.deltas)
        assert all(each.ndim == 2 and each.shape[1] == 1 for each in norms.values())
        assert "norms of the base's weight" in " ".join(converted.notes)
        assert any("lora_magnitude_vector" in key for key in convert(opened, "diffusers").tensors)
    else:
        with pytest.raises(ToolError, match="which diffusers does not read"):
            convert(opened, "diffusers")
    with pytest.raises(ToolError, match=f"not a plain LoRA \\({TITLES[kind]}"):
        merge([(opened, 1.0)])


def test_settings_that_do_not_go_with_a_form_are_named(small: Callable[..., Settings]) -> None:
    assert set(LAYERS) == set(TITLES)
    for given, message in (
        ({"adapter": "dora", "lokr_factor": 4}, "lokr_factor is 4, and adapter dora has none"),
        ({"adapter": "loha", "rank": 128}, "rank is 128, .*at most 64"),
        ({"adapter": "dora", "training": "full", "rank": None}, "adapter is dora"),
    ):
        with pytest.raises(SettingsError, match=message):
            small(**given)
