"""Tokenizes prompts with new tokens that the tokenizer does not know.

The tokenizer is never changed. New tokens are cut out of the text first; the text between them is
tokenized as it would be around a registered `AddedToken` (`lstrip`, `rstrip`, `single_word` and
`normalized` all off), so the ids equal those of a tokenizer with the token added. A new token that
begins or ends with a letter is matched as a whole word only.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SUBJECT = "TOK"  # replaced by the subject's token in captions and prompts

_PROMPT = "\x00prompt\x00"

# Characters that continue a word. Not \w: Chinese and Japanese put no spaces between words.
_LETTER = r"[0-9A-Za-z_\u00C0-\u024F]"


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt inside its chat template."""

    text: str  # the whole templated text
    ids: tuple[int, ...]  # L ids; those of new tokens are beyond the tokenizer's last
    new: tuple[tuple[int, str, int], ...]  # (position in ids, new token, index of its vector)
    template_length: int  # number of ids before the first of the prompt
    prompt_end: int  # number of ids up to the last of the prompt

    def explain(self) -> str:
        """Text, ids and positions of new tokens, one line each."""
        names = dict.fromkeys(name for _, name, _ in self.new)
        places = {each: [at for at, name, _ in self.new if name == each] for each in names}
        new = "; ".join(f"{name} at {at}" for name, at in places.items()) or "none"
        return f"  text: {self.text!r}\n  ids: {list(self.ids)}\n  new tokens: {new}"


@dataclass(frozen=True)
class Cut:
    """A prompt that is longer than the text encoder's limit."""

    kept: str  # the part that is encoded
    lost: str  # the rest, which has no effect; a word across the limit is in here whole

    def keeps(self, word: str) -> bool:
        """Whether the part that is encoded contains the word."""
        return mentions(self.kept, word)

    def first_lost(self, most: int = 60) -> str:
        """The first words that are cut off, at most `most` characters."""
        words = " ".join(self.lost.split())
        return words if len(words) <= most else words[:most].rsplit(" ", 1)[0] + " …"


def ids_wanted() -> bool:
    """Whether to log how prompts are tokenized (LOG_PROMPT_IDS=1)."""
    return os.environ.get("LOG_PROMPT_IDS", "").lower() in ("1", "true", "yes", "on")


class PromptTokenizer:
    """A Qwen tokenizer with a chat template.

    `template` is the templated text with `{}` in place of the prompt. Template tokens such as
    `<|im_end|>` inside a prompt stay plain text: a prompt cannot close the template.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        self.tokenizer = tokenizer
        self.template = template
        before, after = template.split("{}")
        self._pieces = self._split_specials(before + _PROMPT + after)
        self.known = len(tokenizer)  # the id of the first new token

    def _split_specials(self, text: str) -> list[str | int]:
        """The template as alternating text and ids of special tokens."""
        specials = sorted(self.tokenizer.get_added_vocab(), key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, specials))})", text)
        vocabulary = self.tokenizer.get_added_vocab()
        return [vocabulary.get(part, part) for part in parts if part]

    def tokenize(self, prompt: str, new: Mapping[str, int] | None = None) -> TokenizedPrompt:
        """Ids of the templated prompt; `new` maps each new token to its number of vectors."""
        new = new or {}
        ids: list[int] = []
        found: list[tuple[int, str, int]] = []
        template_length = prompt_end = 0
        for piece in self._pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif _PROMPT not in piece:
                ids += self._plain(piece)
            else:
                before, after = piece.split(_PROMPT)
                template_length = len(ids) + len(self._plain(before))
                for part in split_words(piece.replace(_PROMPT, prompt), new):
                    if part in new:
                        found += [(len(ids) + k, part, k) for k in range(new[part])]
                        ids += [self.known + list(new).index(part)] * new[part]
                    else:
                        ids += self._plain(part)
                prompt_end = len(ids) - len(self._plain(after))
        text = self.template.replace("{}", prompt)
        return TokenizedPrompt(text, tuple(ids), tuple(found), template_length, prompt_end)

    def cut(self, prompt: TokenizedPrompt, limit: int) -> Cut | None:
        """The parts of a prompt before and after its first `limit` ids; None if it fits."""
        if prompt.prompt_end <= limit:
            return None
        kept = self._text(prompt, prompt.template_length, limit)
        lost = self._text(prompt, limit, prompt.prompt_end)
        half = re.search(f"{_LETTER}+$", kept) if re.match(_LETTER, lost) else None
        if half is not None:
            kept, lost = kept[: half.start()], half[0] + lost
        return Cut(kept, lost)

    def _text(self, prompt: TokenizedPrompt, start: int, end: int) -> str:
        """The text of a prompt's ids from `start` to `end`, new tokens included."""
        parts, at = [], start
        for place, token, index in prompt.new:
            if start <= place < end:
                parts += [self.tokenizer.decode(prompt.ids[at:place]), "" if index else token]
                at = place + 1
        return "".join((*parts, self.tokenizer.decode(prompt.ids[at:end])))

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]


def check_unicode(name: str, text: str) -> None:
    """Raises ValueError for lone surrogates, which no tokenizer and no UTF-8 file accepts.

    They come from a JSON escape such as \\ud83d without its other half, or from a command line that
    is not UTF-8.
    """
    half = re.search("[\ud800-\udfff]", text)
    if half is not None:
        raise ValueError(
            f"{name} contains half a character ({half[0]!r} at {half.start()}); write it as UTF-8"
        )


def split_words(text: str, words: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Splits `text` at every occurrence of a word, words included; the longest match wins."""
    if not words:
        return [text]
    longest_first = sorted(words, key=len, reverse=True)
    pattern = "|".join(map(whole_word, longest_first))
    return [part for part in re.split(f"({pattern})", text) if part]


def name_subject(text: str, subject: str) -> str:
    """Replaces every whole word TOK by the subject's token (case-sensitive).

    The brackets of <TOK> and [TOK] are replaced too.
    """
    # The token is matched first, so that the TOK within a token such as <TOK1 TOK> stays.
    pattern = rf"{whole_word(subject)}|<{SUBJECT}>|\[{SUBJECT}\]|{whole_word(SUBJECT)}"
    return re.sub(pattern, lambda _: subject, text)


def mentions(text: str, word: str) -> bool:
    """Whether the text contains the word as a whole word."""
    return re.search(whole_word(word), text) is not None


def whole_word(word: str) -> str:
    """The regular expression that matches a word, but not within a longer one.

    Only letters, digits and underscores continue a word: `<zwx>` matches anywhere, `zwx` not in
    `zwxs`.
    """
    before = f"(?<!{_LETTER})" if re.match(_LETTER, word[:1]) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, word[-1:]) else ""
    return before + re.escape(word) + after
