"""The model card: what a stranger needs to draw with a LoRA, with diffusers alone or with us.

Everything it says comes from the archive's `meta.json`. The examples repeat the first sample, so a
reader can hold the picture against the one that is shown.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import yaml

from families.base import Base
from families.registry import FAMILIES, UnknownBase, by_hub_id, family_of, find_base, undistilled

LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for first
PLACEHOLDER = "placeholder.safetensors"
WEIGHTS = "weights.zip"

_LOAD = """\
import torch
from diffusers import {imports}
{more_imports}
repository{word_name} = {repository!r}{word_value}
device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
{pipeline}
pipeline.load_lora_weights(repository)
"""

_VECTORS = """\
vectors = load_file(hf_hub_download(repository, "placeholder.safetensors"))[word]


@torch.no_grad()
def encode(prompt):
    \"\"\"What the text encoder makes of a prompt, with the new word's vectors in it.\"\"\"
{template}
    embed, rows = pipeline.text_encoder.get_input_embeddings(), []
    for number, part in enumerate(text.split(word)):
        rows += [vectors] if number else []
        ids = pipeline.tokenizer(part, add_special_tokens=False).input_ids
        rows.append(embed(torch.tensor(ids, dtype=torch.long, device=device)))
    embeds = torch.cat([row.to(device, dtype) for row in rows])[None]
{encode}
"""

_DRAW = """\

image = pipeline(
{arguments}
).images[0]
image.save("picture.png")
"""


def model_card(repository: str, meta: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> str:
    """README.md for the Hub: front matter, the samples, the code, the training.

    `meta` is the archive's; `samples` are prompts with the paths of their pictures in the
    repository. No licence is stated, since only who trained it can give one.
    """
    base = _base(meta)
    word = meta.get("placeholder_token")
    name = repository.split("/")[-1]
    front = yaml.dump(
        _front_matter(base, word, samples),
        **{"Dumper": _Dumper, "sort_keys": False, "allow_unicode": True, "width": math.inf},
    )
    about = (
        f"A LoRA for {base.hub_id} with the placeholder token {_span(word)} for its subject. The "
        "token's embedding started near zero and was trained with the LoRA, so it carries no "
        "meaning from pre-training. The token is not part of the tokenizer: the code below inserts "
        "its embedding where the token stands in the prompt."
        if word
        else f"A LoRA for {base.hub_id}. Prompts are plain text, worded as the training's captions."
    )
    parts = [
        f"---\n{front}---\n\n# {name}\n\n{about}\n",
        "<Gallery />\n" if samples else "",
        f"## With diffusers\n\nWritten with diffusers {version('diffusers')}. A private repository "
        f"needs `hf auth login` first.\n\n```python\n{diffusers_example(repository, meta)}```\n",
        f"## With zeroprior\n\n```sh\n{_zeroprior_example(repository, meta)}```\n",
        f"## Training\n\n{_table(base, meta)}\n",
        _files(word),
    ]
    return "\n".join(part for part in parts if part)


def diffusers_example(repository: str, meta: Mapping[str, Any]) -> str:
    """Python that draws the first sample with diffusers, and without anything of ours."""
    base = _base(meta)
    word = meta.get("placeholder_token")
    family = family_of(base)
    pipeline, transformer = family.classes.pipeline, family.classes.transformer
    where = base.hub_id
    load = f"pipeline = {pipeline}.from_pretrained({where!r}, dtype=dtype).to(device)"
    imports = pipeline
    if base.completed_by:
        imports = f"{pipeline}, {transformer}"
        load = (
            f"transformer = {transformer}.from_pretrained(\n"
            f'    {where!r}, subfolder="transformer", dtype=dtype\n)\n'
            f"pipeline = {pipeline}.from_pretrained(\n"
            f"    {base.completed_by.hub_id!r}, transformer=transformer, "
            "dtype=dtype\n).to(device)"
        )
    extra = "from huggingface_hub import hf_hub_download\nfrom safetensors.torch import load_file\n"
    code = _LOAD.format(
        imports=imports,
        more_imports=extra if word else "",
        word_name=", word" if word else "",
        repository=repository,
        word_value=f", {_literal(word)}" if word else "",
        pipeline=load,
    )
    if word:
        code += _VECTORS.format(
            template=family.card_code.template, encode=family.card_code.features
        )
    arguments = "\n".join(f"    {line}," for line in _arguments(base, meta))
    return code + _DRAW.format(arguments=arguments)


def _arguments(base: Base, meta: Mapping[str, Any]) -> list[str]:
    """The call that draws the first sample, guidance as the pipeline counts it."""
    settings = meta["settings"]
    options = settings.get("sample_options") or {}
    options = options | next(iter(settings.get("sample_overrides") or ()), {})
    word = meta.get("placeholder_token")
    prompt = next(iter(settings.get("sample_prompts") or ()), f"a photo of {word or 'TOK'}")
    guidance = options.get("guidance_scale")
    guidance = base.guidance_scale if guidance is None else guidance
    family = family_of(base)
    negative = options.get("negative_prompt") or family.empty_prompt
    plain = not word
    prompt, negative = _literal(prompt), _literal(negative)
    lines = [f"prompt={prompt}" if plain else f"prompt_embeds=encode({prompt})"]
    if guidance > 1:
        lines.append(
            f"negative_prompt={negative}" if plain else f"negative_prompt_embeds=encode({negative})"
        )
    code = family.card_code
    comment = "" if code.guidance_off == 1 else f",  # {code.guidance_off} is off here"
    lines.append(f"{code.guidance}={guidance - 1 + code.guidance_off:g}{comment}")
    size = options.get("width") or base.default_resolution
    lines += [
        f"width={size}",
        f"height={options.get('height') or base.default_resolution}",
        f"num_inference_steps={options.get('num_inference_steps') or base.inference_steps}",
        f"generator=torch.Generator().manual_seed({options.get('seed', settings.get('seed', 0))})",
    ]
    return lines


def _zeroprior_example(repository: str, meta: Mapping[str, Any]) -> str:
    prompts = meta["settings"].get("sample_prompts") or ()
    prompt = next(iter(prompts), f"a photo of {meta.get('placeholder_token') or 'TOK'}")
    return (
        f"hf download {repository} {WEIGHTS} --local-dir .\n"
        f"python -m inference --weights {WEIGHTS} --prompt {_shell(prompt)}\n"
    )


def _base(meta: Mapping[str, Any]) -> Base:
    """The base that the weights were trained on; for a folder, one with its family's settings."""
    try:
        return find_base(meta["base_model"])
    except UnknownBase:
        family = FAMILIES.get(meta.get("base_family", ""))
        if family is None:
            raise
        return replace(undistilled(family), name=meta["base_model"], hub_id=meta["base_model"])


def _front_matter(
    base: Base, word: str | None, samples: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if by_hub_id(base.hub_id) is not None:  # a base given as a folder is not on the Hub
        front |= {"base_model": base.hub_id, "base_model_relation": "adapter"}
    front |= {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "diffusers", "template:sd-lora"],
    }
    if word:
        front["instance_prompt"] = _Quoted(word)
    if samples:
        front["widget"] = [
            # On one line: a line of dashes in a prompt would end the front matter.
            {"text": _Quoted(" ".join(prompt.split())), "output": {"url": path}}
            for prompt, path in samples
        ]
    return front


def _table(base: Base, meta: Mapping[str, Any]) -> str:
    settings, training = meta["settings"], meta.get("training", {})
    adapter, word = meta.get("turbo_adapter"), meta.get("placeholder_token")
    rows = {
        "base model": base.hub_id,
        "pictures": len(meta.get("dataset", {}).get("pictures", [])) or None,
        "placeholder token": _span(word)
        if word and "|" not in word
        else None,  # it would end the cell
        "LoRA rank": meta.get("rank"),
        "steps": meta.get("steps"),
        "batch size": settings.get("batch_size"),
        "optimizer": settings.get("optimizer"),
        "learning rate": settings.get("learning_rate"),
        "learning rate of the token": settings.get("placeholder_learning_rate") if word else None,
        "resolution": ", ".join(map(str, settings.get("resolutions") or ())) or None,
        "turbo adapter while training": adapter["name"] if adapter else None,
        "loss, first and last steps": (
            f"{training['loss_first']:.4f}, {training['loss_last']:.4f}" if training else None
        ),
        "seed": settings.get("seed"),
        "device": training.get("device"),
    }
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _files(word: str | None) -> str:
    rows = [
        f"- `{LORA}`: the LoRA as diffusers reads it",
        f"- `{PLACEHOLDER}`: the vectors of {_span(word)}" if word else "",
        f"- `{WEIGHTS}`: all of it for zeroprior, with every setting in its `meta.json`",
    ]
    return "## Files\n\n" + "\n".join(row for row in rows if row) + "\n"


# ---- Text that is not ours -----------------------------------------------------------------------


class _Quoted(str):
    """Text for the front matter, written in double quotes whatever it holds."""


class _Dumper(yaml.SafeDumper):
    """YAML that quotes `_Quoted`, so that no reader takes a part of it for the end."""


_Dumper.add_representer(
    _Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _literal(text: str) -> str:
    """A Python string on one line, without backticks, which could end the block of code."""
    return repr(text).replace("`", r"\x60")


def _shell(text: str) -> str:
    """One word for the shell, never with three backticks in a row, which could end the block."""
    return shlex.quote(text).replace("``", "`''`")  # the quotes end and begin again


def _span(text: str) -> str:
    """Markdown that shows the text as code: in more backticks than it holds in a row."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _cell(value: object) -> str:
    """A value in one cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
