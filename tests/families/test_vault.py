"""The vault is what it claims: Qwen's tokenizers, and models that the stock libraries load."""

import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
from diffusers import QwenImagePipeline, ZImagePipeline, ZImageTransformer2DModel
from transformers import (
    AddedToken,
    AutoModel,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from vault import models, tokenizers

PLACEHOLDER = AddedToken(
    "<zwx>", normalized=False, lstrip=False, rstrip=False, single_word=False, special=False
)
TEXTS = (
    "A photo of <zwx>, smiling; 35mm f/1.4 — 2024!",
    "café cafe\u0301 naïve Ω 北京的春天 🐈‍⬛  two  spaces\n\n\ttab's end ",
    "<|im_start|>user\n<think></think><|im_end|> <|vision_start|>x<tool_call>",
)


@pytest.mark.parametrize(
    ("build", "length"),
    [(tokenizers.qwen25_tokenizer, 151665), (tokenizers.qwen3_tokenizer, 151669)],
)
def test_a_new_token_takes_the_next_id_and_leaves_the_space_before_it(build, length):
    tokenizer = build()
    assert len(tokenizer) == length
    assert tokenizer.add_tokens([PLACEHOLDER]) == 1
    assert tokenizer("a photo of <zwx>").input_ids == [64, 6548, 315, 220, length]
    assert tokenizer("<zwx> smiling").input_ids == [length, 36063]


@pytest.mark.parametrize("name", ["qwen25", "qwen3"])
def test_both_ways_of_loading_a_tokenizer_give_the_same_ids(name, request):
    by_class = request.getfixturevalue(name)
    by_config = AutoTokenizer.from_pretrained(getattr(tokenizers, f"{name}_folder")())
    for text in TEXTS:
        assert by_config(text).input_ids == by_class(text).input_ids
    assert by_config.get_added_vocab() == by_class.get_added_vocab()
    assert by_config.pad_token_id == by_class.pad_token_id == 151643
    assert by_config.eos_token_id == by_class.eos_token_id == 151645


def test_the_tokenizer_merges_as_qwens_rank_file_says(qwen3):
    ranks = tokenizers.read_ranks(tokenizers.rank_file())
    reference = tiktoken.Encoding(
        "qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={}
    )
    for text in TEXTS[:2]:
        assert qwen3(text).input_ids == reference.encode(unicodedata.normalize("NFC", text))


def test_the_chat_template_renders_as_qwen3s(qwen3):
    def render(messages: list[dict[str, str]], **options: bool) -> str:
        return qwen3.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )

    user = [{"role": "user", "content": " a cat\n"}]
    rendered = "<|im_start|>user\n a cat\n<|im_end|>\n<|im_start|>assistant\n"
    assert render(user) == render(user, enable_thinking=True) == rendered
    assert render(user, enable_thinking=False) == rendered + "<think>\n\n</think>\n\n"
    system = [{"role": "system", "content": "Be brief."}]
    assert render(system + user) == "<|im_start|>system\nBe brief.<|im_end|>\n" + rendered


@pytest.mark.parametrize(
    ("pipeline", "name", "tokenizer", "guidance"),
    [
        (ZImagePipeline, models.Z_IMAGE_TURBO, "qwen3", {"guidance_scale": 0.0}),
        (ZImagePipeline, models.Z_IMAGE, "qwen3", {"guidance_scale": 3.0}),
        (QwenImagePipeline, models.QWEN_IMAGE, "qwen25", {"true_cfg_scale": 1.0}),
        (QwenImagePipeline, models.QWEN_IMAGE_2512, "qwen25", {"true_cfg_scale": 1.0}),
    ],
)
def test_the_stock_pipeline_draws_what_the_prompt_and_the_seed_say(
    vault, pipeline, name, tokenizer, guidance, request
):
    pipe = pipeline.from_pretrained(vault / name, tokenizer=request.getfixturevalue(tokenizer))

    def draw(prompt: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        size: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2}
        images = pipe(prompt, generator=generator, output_type="pt", **size, **guidance).images
        return images[0]

    cat = draw("a photo of a cat")
    assert cat.shape == (3, 64, 64)
    assert cat.std() > 0.05
    assert torch.equal(cat, draw("a photo of a cat"))
    assert not torch.allclose(cat, draw("a photo of a dog"), atol=1e-3)


def test_turbos_transformer_lies_in_several_shards(vault):
    shards = list((vault / models.Z_IMAGE_TURBO / "transformer").glob("*.safetensors"))
    assert len(shards) > 1


def test_de_turbos_single_file_is_its_folder_in_another_layout(vault, tmp_path):
    file = models.write_de_turbo_single_file(tmp_path, dtype=torch.float32)
    config = vault / models.Z_IMAGE_TURBO / "transformer"
    single = ZImageTransformer2DModel.from_single_file(str(file), config=str(config)).state_dict()
    folder = vault / models.Z_IMAGE_DE_TURBO / "transformer"
    expected = ZImageTransformer2DModel.from_pretrained(folder).state_dict()
    assert single.keys() == expected.keys()
    assert all(torch.equal(single[key], expected[key]) for key in expected)


def test_z_images_text_encoder_loads_whole_as_the_model_without_a_head(vault):
    folder = vault / models.Z_IMAGE_TURBO / "text_encoder"
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "Qwen3Model"
    assert not any(report.values()), report


@pytest.mark.parametrize(
    "write",
    [models.write_qwen_text_encoder_old_layout, models.write_qwen_text_encoder_new_layout],
)
def test_qwen_images_text_encoder_is_the_same_in_both_layouts(vault, tmp_path, write):
    def last_layer(folder: Path) -> torch.Tensor:
        load: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained
        encoder, report = load(folder, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            ids = torch.arange(1000, 1012)[None]
            return encoder(ids, output_hidden_states=True).hidden_states[-1]

    saved = last_layer(vault / models.QWEN_IMAGE / "text_encoder")
    assert torch.equal(saved, last_layer(write(tmp_path)))


def test_the_photos_are_an_ordinary_upload(photos):
    with zipfile.ZipFile(photos) as archive:
        endings = [Path(name).suffix for name in archive.namelist()]
    assert sum(ending in (".png", ".jpg") for ending in endings) == 6
    assert endings.count(".txt") == 4
