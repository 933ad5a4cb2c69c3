"""No prompt and no token breaks out of a model card."""

import ast
import re
import shlex
from itertools import cycle
from typing import Any

import pytest
import yaml
from cards import code_of

from trainer.result.model_card import model_card

CANARY = "Zqxv"  # in every text below, and in nothing else
HOSTILE = [
    *("'{0}' \"{0}\" \\\\{0}", "{0}`{0}", "``{0}``", "```{0}", "{0}````````{0}", "`{0}`", "\\`{0}"),
    *("{0}|{0}", "|---|{0}|", "[{0}](https://x.example)", "![{0}](x)", "<b>{0}</b>", "<!--{0}"),
    *("<script>{0}</script>", "--- {0}", "{0} ---", "{0}: {{a: *b}} #", "%{0}", "&{0};", "~~~{0}"),
    *("{{}}{0}{{text}}", "%s{0}", "${{{0}}}$(ls)", "{0}\u202e", "#{0}", "{0}\\"),
]
LINE_ENDS = ["\n", "\r", "\r\n", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\0", "\n\n"]
PROMPTS = [text.format(CANARY) for text in HOSTILE] + [
    f"{CANARY}{end}{line}{end}# {CANARY}{end}[{CANARY}](https://x.example)"
    for end in LINE_ENDS
    for line in ("```", "---", "</x>", "````", "~~~", "    x")
]
TOKENS = ["<zwx>"] + [
    token for text in HOSTILE if (token := text.format(CANARY).replace(" ", "")).isprintable()
]


def card_of(prompt: str, word: str | None, base_model: str) -> str:
    meta: dict[str, Any] = {
        "base_model": base_model,
        "settings": {
            "sample_prompts": [prompt],
            "sample_options": {"negative_prompt": prompt, "guidance_scale": 4.0},
            "seed": 1,
        },
        "rank": 1,
        "steps": 1,
    }
    if word is not None:
        meta["placeholder_token"] = word
    return model_card("me/fox", meta, [(prompt, "samples/00.png")])


def outline(markdown: str) -> list[str]:
    """What a Markdown text is made of, without its code; asserts that the canary is only there."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    found = []
    for block in parser.parse(markdown):
        for token in [block, *(block.children or [])]:
            found.append(token.type)
            if token.type not in ("fence", "code_inline", "inline"):
                assert CANARY not in f"{token.content} {token.attrs}", (token.type, token.content)
    return found


def test_no_prompt_and_no_token_breaks_out_of_the_card() -> None:
    pairs: list[tuple[str, str | None]] = list(zip(PROMPTS, cycle([*TOKENS, None]), strict=False))
    pairs += [("a photo", word) for word in TOKENS]
    bases = cycle(["Qwen/Qwen-Image", "Tongyi-MAI/Z-Image-Turbo"])
    for (prompt, word), base_model in zip(pairs, bases, strict=False):
        card = card_of(prompt, word, base_model)
        assert re.match(r"---\n", card)
        _, front, body = card.split("---\n", 2)  # as careless readers do it
        parsed = yaml.safe_load(front)
        assert parsed["widget"][0]["text"] == " ".join(prompt.split())
        assert parsed.get("instance_prompt") == word
        # The Python compiles, and says what was asked for.
        code = code_of(card)
        tree = ast.parse(code)
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert prompt in texts and (word is None or word in texts)
        [shell] = re.findall(r"```sh\n(.*?)```", card, re.DOTALL)
        if "\0" not in prompt:
            assert shlex.split(shell)[-1] == prompt
        # And everything else is as it is for harmless texts.
        plain = card_of("a photo", "<zwx>" if word else None, base_model).split("---\n", 2)[2]
        if word is not None and "|" in word:  # has no row in the table
            plain = re.sub(r"\n\| placeholder token \|.*", "", plain)
        assert outline(body) == outline(plain), (prompt, word)
