"""Special text in prompts: TOK for the subject's token, and syntax of other programs.

Options such as `--w 64` after sample prompts are supported (`read_options`). Syntax of other
programs that is not supported is found by `foreign_syntax` and read as plain text.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from families.text_limit import cut
from families.tokens import SUBJECT, mentions, name_subject
from inference.request import Request, ResolvedRequest

if TYPE_CHECKING:
    from torch import Tensor

    from families.family import Family

log = logging.getLogger(__name__)

# Options of kohya's scripts, ai-toolkit and Midjourney -> fields of a request.
OPTIONS: dict[str, tuple[str, type] | None] = {
    "w": ("width", int),
    "h": ("height", int),
    "s": ("num_inference_steps", int),
    "d": ("seed", int),
    "n": ("negative_prompt", str),
    "l": ("guidance_scale", float),
    "g": ("guidance_scale", float),
    "ar": ("aspect_ratio", str),
    "seed": ("seed", int),
    "steps": ("num_inference_steps", int),
    "width": ("width", int),
    "height": ("height", int),
    "no": ("negative_prompt", str),
    **dict.fromkeys(("neg", "negative", "negative_prompt"), ("negative_prompt", str)),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale"), ("guidance_scale", float)),
    # Those without a counterpart.
    **dict.fromkeys(("am", "c", "cn", "ci", "ctrl_img", "f", "fps", "fs", "i", "il", "is", "m")),
    **dict.fromkeys(("network_multiplier", "num_frames", "of", "ow", "r", "sd", "ss", "v")),
    **dict.fromkeys(("style", "stylize", "chaos", "q", "iw", "niji", "tile", "weird")),
}
_OPTION = re.compile(r"(?:^|\s)--([a-z_]\w*)(?=[\s=]|$)", re.IGNORECASE)

_FOREIGN = (
    re.compile(r"<(?:lora|lyco|hypernet|embedding):[^<>]{1,200}>", re.IGNORECASE),
    re.compile(r"[(\[][^()\[\]]{1,200}:\s*\d*\.?\d+[)\]]"),  # (word:1.2), [from:to:0.5]
    re.compile(r"\[(?:trigger|name|filewords)\]"),
    re.compile(r"\{[^{}|]{0,200}\|[^{}]{0,200}\}"),  # {red|blue}
    re.compile(r"\b__[\w/-]{1,60}__\b"),
    re.compile(r"(?<!\S)BREAK(?!\S)"),
    re.compile(r"^Negative prompt:", re.MULTILINE),
    re.compile(r"(?<!\S)--[a-z_]+(?=[\s=]|$)", re.IGNORECASE),
)


def foreign_syntax(text: str) -> list[str]:
    """The parts of a text that are special syntax in other programs."""
    found = [match[0].strip() for pattern in _FOREIGN for match in pattern.finditer(text)]
    return list(dict.fromkeys(found))


def read_options(prompt: str) -> tuple[str, dict[str, Any], list[str]]:
    """Splits a prompt into text, fields of a request by its options, and unsupported options.

    The options begin with the first known one. Raises ValueError for an option with an invalid
    value.
    """
    found = list(_OPTION.finditer(prompt))
    starts = list(dropwhile(lambda match: match[1].lower() not in OPTIONS, found))
    if not starts:
        return prompt, {}, []
    fields: dict[str, Any] = {}
    unread = []
    ends = [match.start() for match in starts[1:]] + [len(prompt)]
    for match, end in zip(starts, ends, strict=True):
        name, value = match[1].lower(), prompt[match.end() : end].strip().removeprefix("=").strip()
        option = OPTIONS.get(name)
        if option is None or (name == "g" and "guidance_scale" in fields):
            unread.append(f"--{name} {value}".strip())
            continue
        field, kind = option
        try:
            fields[field] = kind(value)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"--{name} is {value!r}; it must be {wanted}") from None
        if field == "guidance_scale":
            fields[field] = max(1.0, fields[field])  # below 1 is off there, as 1 is here
    return prompt[: starts[0].start()].strip(), fields, unread


def place_subject(request: Request, by_lora: Sequence[Sequence[str]]) -> Request:
    """The request with TOK in its prompts replaced by the token of the first LoRA that has one.

    `by_lora` are the tokens of each LoRA. Logs the replacement. Raises ValueError if that LoRA has
    several subjects.
    """
    tokens = [token for each in by_lora for token in each]
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt or ""}
    placed = {name: name_subject(text, (*tokens, SUBJECT)[0]) for name, text in texts.items()}
    # A token such as <TOK> itself is not replaced.
    containing = [
        name
        for name, text in texts.items()
        if (text != placed[name] if tokens else mentions(text, SUBJECT))
    ]
    if not containing:
        return request
    where = " and ".join(containing)
    if not tokens:
        log.warning("TOK in %s is read as plain text: the weights have no placeholder token", where)
        return request
    first = next(each for each in by_lora if each)
    if len(first) > 1:
        raise ValueError(
            f"TOK in {where} may be any of the {len(first)} subjects of these weights; write the "
            f"token instead: {', '.join(first)}"
        )
    log.info("TOK in %s is replaced by %s", where, tokens[0])
    if len(tokens) > 1:
        log.warning(
            "TOK is replaced by %s, the token of the first LoRA; write %s for the other",
            *(tokens[0], ", ".join(tokens[1:])),
        )
    return request.replace(prompt=placed["prompt"], negative_prompt=placed["negative_prompt"])


def check_syntax(name: str, text: str) -> None:
    """Warns of syntax of other programs in a prompt, which is read as plain text."""
    if found := foreign_syntax(text):
        log.warning(
            "%s contains syntax of other programs, which is read as plain text: %s",
            *(name, ", ".join(found[:5])),
        )


def check_length(
    family: "Family",
    texts: Mapping[str, str],
    vectors: "Mapping[str, Tensor] | None" = None,
    word: str | None = None,
) -> None:
    """Warns of each text that is longer than the text encoder's limit, by its name.

    Trained tokens that are cut off are named first; `word` is a trigger word, also named.
    """
    words = [*(vectors or {}), *([word] if word else [])]
    for name, text in texts.items():
        found = cut(family, text, vectors)
        if found is None:
            continue
        gone = [each for each in words if mentions(text, each) and not found.keeps(each)]
        log.warning(
            "%s%s is longer than the limit of %d tokens; cut off from: %r",
            f"{', '.join(gone)} is cut off: " if gone else "",
            *(name, family.max_text_tokens, found.first_lost()),
        )


def prompts_of(resolved: ResolvedRequest) -> dict[str, str]:
    """The texts that are encoded for a request, by their names."""
    texts = {"prompt": resolved.prompt}
    if resolved.negative_prompt and resolved.guidance_scale > 1:
        texts["negative_prompt"] = resolved.negative_prompt
    return texts
