"""Writes what was measured into docs/zero_prior.md, between its marks."""

from pathlib import Path

from experiments.document import rewrite
from experiments.zero_prior.compare import Results, compare, metrics

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "zero_prior.md"


def parts(results: Results) -> dict[str, str]:
    """What was measured, as Markdown, by the document's part."""
    return {"metrics": metrics(results), "compare": compare(results)}


def write_report(published: Path, folder: Path | None, document: Path) -> None:
    """Rewrites the measured parts of the document and its plot.

    The picture grid needs the pictures in the `folder` of a run; without one it stays.
    """
    from experiments.zero_prior.figures import draw_metrics, draw_pictures

    results = Results.read(published)
    for part, text in parts(results).items():
        rewrite(document, part, text)
    images = document.parent / "images"
    images.mkdir(exist_ok=True)
    draw_metrics(results, images / "zero_prior_metrics.png")
    if folder is not None:
        draw_pictures(results, folder, images / "zero_prior_pictures.png")
