"""Recognizes the kind of a file that was passed as a LoRA, by its first bytes or tensor names."""

import re
from collections.abc import Iterable, Mapping, Sequence

from families.registry import FAMILIES

Shapes = Mapping[str, Sequence[int]]

# Models that are not supported, by layer names in a LoRA or in a whole model. The first match
# counts; supported models are tried before the ambiguous names.
_OTHER_MODELS = tuple(
    (model, re.compile(pattern))
    for model, pattern in (
        ("HiDream", r"(?:double|single)_stream_blocks[._]\d"),
        ("FLUX", r"single_transformer_blocks[._]\d|(?:double|single)_blocks[._]\d"),
        ("Stable Diffusion 3", r"joint_blocks[._]\d"),
    )
)
_AMBIGUOUS = tuple(
    (model, re.compile(pattern))
    for model, pattern in (
        ("FLUX or Stable Diffusion 3", r"transformer_blocks[._]\d+[._]ff(?:_context)?[._]net"),
        (
            "Stable Diffusion XL",
            r"lora_te2_|text_encoder_2|add_embedding|label_emb"
            r"|(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks|middle_block)"
            r"[._].*transformer_blocks[._][1-9]",
        ),
        (
            "Stable Diffusion 1.5, 2 or XL",
            r"(?:down_blocks|up_blocks|input_blocks|output_blocks)[._]\d"
            r"|(?:mid_block|middle_block)[._]",
        ),
        ("LTX-Video, PixArt or Sana", r"transformer_blocks[._]\d+[._]attn[12][._]"),
        ("Cosmos", r"blocks[._]\d+[._](?:self_attn|cross_attn)[._](?:[qkv]_proj|output_proj)"),
        ("Wan", r"blocks[._]\d+[._](?:self_attn|cross_attn|attn[12])[._]"),
        (
            "Qwen-Image, Qwen-Image-2.1, FLUX or Stable Diffusion 3",
            r"transformer_blocks[._]\d+[._]attn[._]",
        ),
    )
)
_TEXT_ENCODER = re.compile(
    r"(?:^|[._])(?:lora_te\d?|text_encoders?(?:_?\d)?|text_model|t5xxl|language_model)(?:[._]|$)"
    r"|layers[._]\d+[._](?:self_attn|mlp)[._](?:[qkv]_proj|o_proj|out_proj|gate_proj|up_proj"
    r"|down_proj|fc[12])|SelfAttention|DenseReluDense|(?:embed_tokens|lm_head)\.weight"
)
_CONTROLNET = re.compile(
    r"^(?:control_model|controlnet)[._]|controlnet_|zero_convs|input_hint_block"
    r"|^control_(?:layers|noise_refiner|blocks)[._]|^controlnet_blocks"
)
_ADAPTER = re.compile(r"^(?:image_proj|ip_adapter)[._]")
_VAE = re.compile(
    r"^(?:first_stage_model\.|vae\.)?(?:encoder|decoder)\.(?:conv_in|conv_out|conv1|mid|mid_block"
    r"|down|up|down_blocks|up_blocks|downsamples|upsamples|middle)[._]|quant_conv\."
)
_MODEL_FRONT = re.compile(r"^(?:model\.)?diffusion_model\.")
_UPSCALER = re.compile(r"RRDB_trunk|^body\.\d+\.rdb|^model\.1\.sub\.")
_EMBEDDING = re.compile(r"^(?:emb_params|clip_[lg]|t5xxl|string_to_param.*|\*|<.+>|qwen.*)$")
_OPTIMIZER = re.compile(r"exp_avg|(?:^|\.)momentum_buffer|^optimizers?\.")

# Adapters of other kinds than LoRA, LoKr and LoHa, by the names of their tensors.
OTHER_ADAPTERS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("an OFT adapter", r"\.b?oft_\w+"),
        ("an IA3 adapter", r"\.(?:on_input$|ia3_l\b)"),
        ("a GLoRA adapter", r"\.(?:a1|a2|b1|b2)\.weight$"),
        ("a VeRA adapter", r"(?:^|\.)vera_(?:lambda_[bd]|[AB])\b"),
        ("an AdaLoRA adapter", r"\.(?:lora_E|ranknum)\b"),
        ("an X-LoRA adapter", r"xlora_"),
        ("a VB-LoRA adapter", r"(?:^|\.)vblora_"),
        ("a RandLoRA adapter", r"(?:^|\.)randlora_"),
        ("a FourierFT adapter", r"\.fourierft_"),
        ("an HRA adapter", r"\.hra_u\b"),
        ("a Bone or MiSS adapter", r"\.(?:bone|miss)_\w+"),
        ("a SHiRA adapter", r"\.shira_\w+"),
        ("a C3A adapter", r"\.c3a_\w+"),
        ("a RoAd adapter", r"\.road_\w+"),
        ("an adapter of tuned layer norms", r"\.ln_tuning_layers\b"),
    )
)
_ANY_LORA = re.compile(r"lora|lokr|hada", re.IGNORECASE)

CHECKPOINT_HEADER = "zeroprior.checkpoint"
_MOST_VECTORS = 128  # of an embedding


def family_of(names: Iterable[str]) -> str | None:
    """The model family with these layer names, or None."""
    names = list(names)
    ours = [
        (family.title, re.compile(family.layer_names))
        for family in FAMILIES.values()
        if family.layer_names
    ]
    for model, pattern in (*_OTHER_MODELS, *ours, *_AMBIGUOUS):
        if any(pattern.search(name) for name in names):
            return model
    return None


def is_text_encoder(name: str) -> bool:
    """Whether a layer's name belongs to a text encoder."""
    return bool(_TEXT_ENCODER.search(name))


def other_kind(shapes: Shapes, metadata: Mapping[str, str], wanted: str = "a LoRA") -> str | None:
    """The kind of a safetensors file that is not `wanted`, as the end of "FILE is …", or None.

    Of a file without LoRA tensors, unless `wanted` is another kind.
    """
    if CHECKPOINT_HEADER in metadata:
        return (
            "a training checkpoint, not weights; resume from it with resume_from, "
            "or use the weights.zip of the run"
        )
    names, count = list(shapes), f"{len(shapes):,} tensors"

    def has(pattern: re.Pattern[str]) -> bool:
        return any(pattern.search(name) for name in names)

    if not names:
        return f"a safetensors file without tensors, not {wanted}"
    if is_embedding(shapes):
        return f"an embedding (textual inversion), not {wanted}"
    if has(_OPTIMIZER):
        return f"the state of an optimizer ({count}), not {wanted}"
    if has(_CONTROLNET):
        return f"a ControlNet ({count}), not {wanted}"
    if has(_ADAPTER):
        return f"an IP-Adapter ({count}), not {wanted}"
    for adapter, pattern in OTHER_ADAPTERS:
        if has(pattern):
            return f"{adapter} ({count}), which is not supported"
    if has(_ANY_LORA):  # that wants one has an error that names its tensors
        return None if wanted == "a LoRA" else f"a LoRA ({count}), not {wanted}"
    checkpoint = has(_MODEL_FRONT)  # may also contain a VAE and a text encoder
    if has(_VAE) and not checkpoint:
        return f"a VAE ({count}), not {wanted}"
    if has(_TEXT_ENCODER) and not checkpoint:
        return f"a text encoder ({count}), not {wanted}"
    family = family_of(names)
    if family is not None or checkpoint:
        of = f" of {family}" if family else ""
        return f"a whole model{of} ({count}), not {wanted}"
    if has(_UPSCALER):
        return f"an upscaler ({count}), not {wanted}"
    return None


def is_embedding(shapes: Shapes) -> bool:
    """Whether the tensors of a file are the embedding of a token (textual inversion)."""
    return 1 <= len(shapes) <= 3 and all(_is_embedding(*each) for each in shapes.items())


def _is_embedding(name: str, shape: Sequence[int]) -> bool:
    small = len(shape) == 1 or (len(shape) == 2 and shape[0] <= _MOST_VECTORS)
    return small and bool(_EMBEDDING.match(name) or "." not in name)


def other_format(start: bytes, wanted: str = "a LoRA") -> str | None:
    """The kind of a file by its first bytes, as the end of "FILE is …"; None if maybe safetensors.

    A safetensors file has the length of its header before "{" and may begin with any byte.
    """
    if not start:
        return "empty (0 bytes); download it again"
    if start.startswith(b"version https://git-lfs"):
        return "a Git-LFS pointer, not the file itself; run `git lfs pull`"
    if start[8:9] == b"{":
        return None
    if start.lstrip()[:1] == b"<":
        return f"a web page, not {wanted}; is the link public?"
    if start[:1] == b"\x80":
        return "a pickle, which may run code; convert it to safetensors"
    for magic, what in _MAGIC:
        if start.startswith(magic):
            return what.format(wanted=wanted)
    if start.lstrip()[:1] in (b"{", b"["):
        return f"JSON text, not {wanted}; is it an index or a server's error message?"
    if (
        len(start) >= 8
        and start.isascii()
        and start.decode("ascii").replace("\n", "").isprintable()
    ):
        return f"a text file, not {wanted}"
    return None


_MAGIC = (
    (b"GGUF", "a GGUF file, which contains a whole quantized model, not {wanted}"),
    (b"\x89PNG", "an image (PNG), not {wanted}"),
    (b"\xff\xd8\xff", "an image (JPEG), not {wanted}"),
    (b"RIFF", "an image (WebP) or a sound, not {wanted}"),
    (b"%PDF", "a PDF, not {wanted}"),
    (b"PK\x03\x04", "a zip archive, not {wanted}"),
    (b"\x1f\x8b", "a gzip archive, not {wanted}"),
    (b"Rar!", "a RAR archive; unpack it and pass the .safetensors"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it and pass the .safetensors"),
    (b"ggml", "a GGML file, which contains a whole quantized model, not {wanted}"),
)
