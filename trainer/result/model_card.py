"""The model card: how to generate images with a LoRA, with diffusers alone or with zeroprior.

diffusers does not read every LoKr and no LoHa: their card names the programs that do.

All data is from the archive's `meta.json`. The examples repeat the first sample, so a reader can
compare the images. The text is in `templates/model_card.md`.
"""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

import yaml

from adapters.archive_members import placeholder_name
from adapters.formats import PROGRAMS
from adapters.forms import Form
from families.base import Base
from families.registry import FAMILIES, UnknownBase, by_hub_id, family_of, find_base, undistilled
from trainer.result.headline import headlines
from trainer.result.meta import tokens_in
from trainer.result.result_checks import CheckResult
from trainer.templating import TEMPLATES

LORA = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for first
WEIGHTS = "weights.zip"


def model_card(repository: str, meta: Mapping[str, Any], samples: Sequence[tuple[str, str]]) -> str:
    """README.md for the Hub: front matter, samples, code, settings.

    `meta` is the archive's; `samples` are prompts and the paths of their images in the repository.
    The code repeats the first sample. No license is stated, since only the author can choose one,
    unless the base model's asks for it (`Base.terms`).
    """
    base, settings, tokens = _base(meta), meta["settings"], tokens_in(meta)
    family, form = family_of(base), Form.of(meta)
    programs = []
    if form.kind in ("lokr", "loha"):
        readers = {name: each for name, each in PROGRAMS.items() if name in family.lora_readers}
        programs = [each.title for each in readers.values() if form.title in each.forms]
    options = settings.get("sample_options") or {}
    options = options | next(iter(settings.get("sample_overrides") or ()), {})
    guidance = options.get("guidance_scale")
    subject = next(iter(tokens), "TOK")
    controls = _controls(meta)
    return TEMPLATES.get_template("model_card.md").render(
        repository=repository,
        name=repository.split("/")[-1],
        base=base,
        tokens=tokens,
        samples=samples,
        headlines=headlines([CheckResult(**each) for each in meta.get("checks") or ()]),
        front_matter=_front_matter(base, tokens, samples, controls > 0, programs),
        title=form.title if programs else "LoRA",
        programs=programs,
        edits=controls > 0,
        references=["image.jpg", *(f"image-{number + 2}.jpg" for number in range(controls - 1))],
        diffusers=version("diffusers"),
        classes=family.classes,
        pipeline=family.classes.editing_pipeline or family.classes.pipeline,
        code=family.card_code,
        prompt=next(iter(settings.get("sample_prompts") or ()), f"a photo of {subject}"),
        negative=options.get("negative_prompt") or family.empty_prompt,
        options=options,
        guidance=base.guidance_scale if guidance is None else guidance,
        seed=options.get("seed", settings.get("seed", 0)),
        training=_training(base, meta),
        files={"lora": LORA, "weights": WEIGHTS},
        placeholders=[placeholder_file(number) for number in range(len(tokens))],
        literal=_literal,
        quoted=_shell,
        span=_span,
        cell=_cell,
    )


def _controls(meta: Mapping[str, Any]) -> int:
    """The control images of the first pair, which the sample repeats; 0 for single images."""
    pictures = meta.get("dataset", {}).get("pictures") or [{}]
    return len(pictures[0].get("controls") or ())


def placeholder_file(number: int) -> str:
    """The file in the repository with the embedding of a token, by its number from 0."""
    return PurePosixPath(placeholder_name(number)).name


def _base(meta: Mapping[str, Any]) -> Base:
    """The base model of the weights; for a local folder, one with its family's settings."""
    try:
        return find_base(meta["base_model"])
    except UnknownBase:
        family = FAMILIES.get(meta.get("base_family", ""))
        if family is None:
            raise
        return replace(undistilled(family), name=meta["base_model"], hub_id=meta["base_model"])


def _front_matter(
    base: Base,
    tokens: Sequence[str],
    samples: Sequence[tuple[str, str]],
    edits: bool,
    programs: Sequence[str],
) -> str:
    """The metadata for the Hub, as YAML."""
    library = [] if programs else ["diffusers"]
    front: dict[str, Any] = {}
    if by_hub_id(base.hub_id) is not None:  # a base given as a folder is not on the Hub
        front |= {"base_model": base.hub_id, "base_model_relation": "adapter"}
    if base.terms is not None:
        front |= {"license": "other", "license_name": base.terms.hub_name}
        front["license_link"] = base.terms.url
    front |= {
        **({"library_name": library[0]} if library else {}),
        "pipeline_tag": (task := "image-to-image" if edits else "text-to-image"),
        "tags": [task, "lora", *library, "template:sd-lora"],
    }
    if tokens:
        front["instance_prompt"] = _Quoted(", ".join(tokens))
    if samples:
        front["widget"] = [
            # On one line: a line of dashes in a prompt would end the front matter.
            {"text": _Quoted(" ".join(prompt.split())), "output": {"url": path}}
            for prompt, path in samples
        ]
    return yaml.dump(
        front,
        **{"Dumper": _Dumper, "sort_keys": False, "allow_unicode": True, "width": math.inf},
    )


def _training(base: Base, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the table; rows without a value are omitted."""
    settings, training = meta["settings"], meta.get("training", {})
    adapter, tokens = meta.get("turbo_adapter"), tokens_in(meta)
    shown = ", ".join(_span(token) for token in tokens if "|" not in token)
    return {
        "base model": base.hub_id,
        "images": len(meta.get("dataset", {}).get("pictures", [])) or None,
        "control images": meta.get("dataset", {}).get("controls") or None,
        # A | would end the table cell.
        f"placeholder token{'s' * (len(tokens) > 1)}": shown or None,
        "adapter": str(Form.of(meta)),
        "steps": meta.get("steps"),
        "step of these weights": meta.get("shipped_step"),
        "ended early": meta.get("ended_early"),
        "batch size": settings.get("batch_size"),
        "optimizer": settings.get("optimizer"),
        "learning rate": settings.get("learning_rate"),
        "learning rate of the token": settings.get("placeholder_learning_rate") if tokens else None,
        "resolution": ", ".join(map(str, settings.get("resolutions") or ())) or None,
        "training adapter": adapter["name"] if adapter else None,
        "loss, first and last steps": (
            f"{training['loss_first']:.4f}, {training['loss_last']:.4f}" if training else None
        ),
        "seed": settings.get("seed"),
        "device": training.get("device"),
    }


# ---- Text from users -----------------------------------------------------------------------


class _Quoted(str):
    """Text that the front matter always contains in double quotes."""


class _Dumper(yaml.SafeDumper):
    """YAML that quotes `_Quoted`, so that no part of it can end the front matter."""


_Dumper.add_representer(
    _Quoted, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"')
)


def _literal(text: str) -> str:
    """A Python string on one line, without backticks, which could end the code block."""
    return repr(text).replace("`", r"\x60")


def _shell(text: str) -> str:
    """One shell word without three backticks in a row, which could end the code block."""
    return shlex.quote(text).replace("``", "`''`")  # the quotes end and begin again


def _span(text: str) -> str:
    """The text as inline code in Markdown, in more backticks than it contains in a row."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    padding = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def _cell(value: object) -> str:
    """A value as the text of one table cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
