"""The world: drawn from seeds, described in its own words, split so that tests are fair."""

import random

import pytest

from miniature.drawing import render
from miniature.lexicon import PRIOR_WORDS, world_words
from miniature.sampling import tokenize
from miniature.tokenizer import build_tokenizer
from miniature.world import (
    SUBJECTS,
    attributes,
    caption,
    describe,
    evaluation_prompts,
    held_out,
    sample_scene,
    subject_dataset,
    subject_scene,
)


def test_a_seed_draws_the_same_bytes_and_any_size() -> None:
    for seed in range(5):
        assert render(sample_scene(seed)).tobytes() == render(sample_scene(seed)).tobytes()
    assert render(sample_scene(0)).tobytes() != render(sample_scene(1)).tobytes()
    assert render(sample_scene(0), 128).size == (128, 128)


def test_training_never_sees_an_evaluation_combination_or_a_subject() -> None:
    for seed in range(2000):
        scene = sample_scene(seed)
        for thing in scene.things:
            assert not thing.is_subject
            assert not held_out(thing.shape, thing.colour, thing.texture, scene.place)
    for seed in range(300):
        scene = sample_scene(seed, "eval")
        for thing in scene.things:
            assert held_out(thing.shape, thing.colour, thing.texture, scene.place)


def test_a_caption_asks_only_for_what_the_picture_shows() -> None:
    for seed in range(500):
        scene = sample_scene(seed)
        said = describe(scene, random.Random(seed))
        assert said.asked.items() <= attributes(scene).items()
        assert said.text == caption(scene, random.Random(seed))


def test_evaluation_prompts_are_many_and_ask_for_everything() -> None:
    prompts = evaluation_prompts(500)
    assert len({p.text for p in prompts}) > 450
    for prompt in prompts:
        assert {"count", "place"} <= prompt.asked.keys()
        assert any(key.endswith("colour") for key in prompt.asked)
        assert any(key.endswith("shape") for key in prompt.asked)


@pytest.mark.parametrize("word", PRIOR_WORDS)
def test_a_word_with_a_prior_always_comes_with_its_look(word: str) -> None:
    scenes = [s for s in map(sample_scene, range(3000)) if s.things[0].word == word]
    assert len(scenes) > 20
    for scene in scenes:
        thing = scene.things[0]
        assert (thing.shape, thing.colour, thing.texture) == PRIOR_WORDS[word]
        assert word in caption(scene, random.Random(0)).split()


def test_every_word_of_the_world_is_one_token_and_captions_fit() -> None:
    tokenizer = build_tokenizer()
    for word in world_words():
        assert len(tokenizer(" " + word).input_ids) == 1, word
    captions = [caption(sample_scene(i), random.Random(i)) for i in range(1000)]
    assert tokenize(tokenizer, captions)[0].shape == (1000, 32)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_subject_comes_in_various_places_with_captions(subject: str) -> None:
    dataset = subject_dataset(subject, 16)
    assert len({scene.place for scene, _ in dataset}) >= 4
    assert any(len(scene.things) == 2 for scene, _ in dataset)
    assert all("TOK" in text.split() for _, text in dataset)
    recoloured = subject_scene(subject, 3, colour="pink", place="snow", company=True)
    assert "pink TOK" in caption(recoloured, random.Random(0))
    assert render(recoloured).tobytes() != render(subject_scene(subject, 3)).tobytes()
