"""The project's documents as data: their pages, their text, and the commands that they teach."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from root import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    *("python", "make", "cog", "curl", "docker", "accelerate", "pip", "printf", "tensorboard"),
    *("wandb", "hf", ".", "zeroprior", "uv"),
)
_READER = MarkdownIt("commonmark").enable("table")
_PUNCTUATION = "&|;<>()"


@dataclass(frozen=True)
class Command:
    """One command as a shell reads it."""

    page: str
    text: str  # as it is written
    environment: dict[str, str]  # the variables before it
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.text[:90]}"


def tokens(page: Path) -> list[Token]:
    return _READER.parse(page.read_text(encoding="utf-8"))


def inline(page: Path) -> Iterator[Token]:
    """Every piece of text, code or link inside the paragraphs, headings and cells of a page."""
    for block in tokens(page):
        yield from block.children or ()


def anchors(page: Path) -> set[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    blocks = tokens(page)
    names: list[str] = []
    for opening, heading in zip(blocks, blocks[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(each.content for each in heading.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


def blocks(page: Path, *languages: str) -> list[str]:
    """The contents of the code blocks in one of the languages."""
    return [
        each.content
        for each in tokens(page)
        if each.type in ("fence", "code_block") and each.info.strip() in languages
    ]


def commands() -> list[Command]:
    """Every command of every page: those in blocks, and those inside the text."""
    found = []
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        for block in blocks(page, "sh", "bash"):
            found += [command(name, line) for line in lines(block)]
        for block in blocks(page, ""):  # output, trees and commands
            found += [c for line in lines(block) if is_command(c := command(name, line))]
        found += [
            c
            for each in inline(page)
            if each.type == "code_inline"
            and len((c := command(name, each.content)).words) > 1
            and is_command(c)
        ]
    return found


def lines(block: str) -> list[str]:
    """The lines of a block, those that end in a backslash joined with the next."""
    joined = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


def command(page: str, line: str) -> Command:
    """A line as a command, up to the first `>`, `|` or `&` outside of quotes."""
    reader = shlex.shlex(line, posix=True, punctuation_chars=_PUNCTUATION)
    reader.whitespace_split = True
    words: list[str] = []
    try:
        for word in reader:
            if word and set(word) <= set(_PUNCTUATION):
                break
            words.append(word)
    except ValueError:  # text with an apostrophe: no command
        words = words or [line]
    environment = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        key, _, value = words.pop(0).partition("=")
        environment[key] = value
    return Command(page, line, environment, tuple(words))


def is_command(given: Command) -> bool:
    return bool(given.words) and given.words[0] in PROGRAMS
