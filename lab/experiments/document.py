"""The measured parts of a document: Markdown between two marks, written by a script."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def rewrite(document: Path, parts: Mapping[str, str]) -> Path:
    """Puts texts in the place of what stood between the marks of their parts.

    Returns the folder of the document's images. Raises ValueError where it lacks the marks.
    """
    text = document.read_text(encoding="utf-8")
    for part, written in parts.items():
        begin, end = marks(part)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{document} lacks the lines {begin} and {end}")
        text = f"{before}{begin}\n{written}\n{end}{after}"
    document.write_text(text, encoding="utf-8")
    images = document.parent / "images"
    images.mkdir(exist_ok=True)
    return images


def marks(part: str) -> tuple[str, str]:
    """Where a part begins and ends."""
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table under a title in bold."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)])
