"""The miniature's bases are what the Hub's are: the stock pipeline loads and draws them."""

import hashlib
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from transformers import AutoModel, AutoTokenizer, Qwen2Tokenizer, Qwen3Model

from miniature.batched import batched_forward
from miniature.models import EMBEDDING_ROWS, write_random
from miniature.sampling import Base, encode_prompts, noise_for, sample_latents, shifted_sigmas
from miniature.tokenizer import PLAIN_ADDED_TOKENS, SPECIAL_TOKENS
from miniature.weights import TURBO, UNDISTILLED, WEIGHTS, load_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bases") / "random"
    write_random(path, dtype=torch.float32)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> ZImagePipeline:
    loaded = ZImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _digest(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return sha.hexdigest()


def test_a_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_random(tmp_path / name, seed)
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b") != _digest(tmp_path / "c")


def test_the_stock_pipeline_draws_with_and_without_guidance(pipeline: ZImagePipeline) -> None:
    for guidance in (0.0, 2.0):
        picture = pipeline(
            "a red star at sea", height=64, width=64, num_inference_steps=2,
            guidance_scale=guidance,
        ).images[0]  # fmt: skip
        assert picture.size == (64, 64)


def test_the_tokenizer_keeps_qwens_tokens_and_template(folder: Path) -> None:
    for kind in (AutoTokenizer, Qwen2Tokenizer):
        tokenizer = kind.from_pretrained(folder / "tokenizer")
        added = [tokenizer.added_tokens_decoder[i] for i in sorted(tokenizer.added_tokens_decoder)]
        assert [(str(t), t.special) for t in added] == [
            *((t, True) for t in SPECIAL_TOKENS), *((t, False) for t in PLAIN_ADDED_TOKENS)
        ]  # fmt: skip
        assert len(tokenizer) == 1024 < EMBEDDING_ROWS
        messages = [{"role": "user", "content": "a <zwx> at sea"}]
        for thinking, ending in ((True, ""), (False, "<think>\n\n</think>\n\n")):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
            head = "<|im_start|>user\na <zwx> at sea<|im_end|>\n<|im_start|>assistant\n"
            assert text == head + ending
        assert tokenizer.decode(tokenizer("naïve, 12 <zwx>\n").input_ids) == "naïve, 12 <zwx>\n"


def test_the_text_encoder_loads_by_its_class_and_has_spare_rows(folder: Path) -> None:
    for kind in (AutoModel, Qwen3Model):
        encoder = kind.from_pretrained(folder / "text_encoder")
        assert isinstance(encoder, Qwen3Model)
        assert encoder.get_input_embeddings().weight.shape[0] == EMBEDDING_ROWS


def test_the_batched_forward_is_the_classes_own(pipeline: ZImagePipeline) -> None:
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, transformer.config.in_channels, 16, 16, generator=generator)
    time = torch.rand(4, generator=generator)
    captions = [torch.randn(n, 128, generator=generator) for n in (9, 20, 31, 32)]
    text, mask = torch.zeros(4, 32, 128), torch.zeros(4, 32, dtype=torch.bool)
    for row, features in enumerate(captions):
        text[row, : len(features)], mask[row, : len(features)] = features, True
    with torch.no_grad():
        expected = torch.stack(transformer(list(latents[:, :, None]), time, captions).sample)
        given = batched_forward(transformer, latents, time, text, mask)
    torch.testing.assert_close(given, expected.squeeze(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_the_batched_sampler_draws_what_the_pipeline_draws(
    pipeline: ZImagePipeline, guidance: float
) -> None:
    base = Base(pipeline.transformer, pipeline.text_encoder, pipeline.tokenizer, pipeline.vae, 3.0)
    prompts = ["a red star at sea", "two words"]
    noise = noise_for([5, 6], 8)
    given = sample_latents(
        base, noise, encode_prompts(base, prompts), 4, encode_prompts(base, [""]), guidance
    )
    expected = pipeline(
        list(prompts), height=64, width=64, num_inference_steps=4, guidance_scale=guidance,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)


def test_eight_steps_have_the_published_noise_levels() -> None:
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert [round(s, 4) for s in shifted_sigmas(8, 3.0).tolist()] == expected


@pytest.mark.skipif(not (WEIGHTS / TURBO).exists(), reason="no trained weights yet")
@pytest.mark.parametrize("name", [TURBO, UNDISTILLED])
def test_the_shipped_bases_load(name: str) -> None:
    base = load_base(name)
    assert len(base.tokenizer) == 1024
    assert all(torch.isfinite(p).all() for p in base.transformer.parameters())
