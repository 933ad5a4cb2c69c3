"""Drift compares predictions for prompts without the subject, which no run is trained on."""

from collections.abc import Callable

import pytest
from loops import make_loop

from trainer.learning import Captions
from trainer.learning.preservation import shipped_prompts
from trainer.result.drift import EDITS, PROMPTS, drift_prompts, velocity_drift
from trainer.settings.fields import Settings


@pytest.mark.parametrize("name", PROMPTS)
def test_no_prompt_of_drift_is_trained_on_by_preservation(name: str) -> None:
    assert len(set(PROMPTS[name])) == 8
    assert not set(PROMPTS[name]) & set(shipped_prompts(name))
    assert not set(EDITS) & set(shipped_prompts(f"{name}_edits"))


def test_the_prompts_of_drift_are_bounded_and_without_the_subject(
    small: Callable[..., Settings],
) -> None:
    assert len(drift_prompts(small(batch_size=1))) == 4
    assert len(drift_prompts(small(batch_size=4))) == 8
    horse = small(train_placeholder_token=False, trigger_word="Horse", batch_size=2)
    assert len(drift_prompts(horse)) == 7
    assert not [each for each in drift_prompts(horse) if "horse" in each]


def test_an_untrained_lora_has_no_drift_and_a_trained_one_has(
    small: Callable[..., Settings],
) -> None:
    settings = small(batch_size=2, learning_rate=1e-2)
    loop = make_loop(settings)
    prompts = drift_prompts(settings)[:3]
    captions = [sample.caption for sample in loop.samples]
    loop.captions = Captions(loop.family, captions, loop.captions.vectors, prompts)
    assert velocity_drift(loop, prompts) == 0
    loop.step(0)
    assert 0 < velocity_drift(loop, prompts) < 1
    with pytest.raises(ValueError, match="all prompts contain the subject"):
        velocity_drift(loop, [])
