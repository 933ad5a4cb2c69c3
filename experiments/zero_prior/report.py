"""Writes what was measured into docs/zero_prior.md, between its marks."""

from pathlib import Path

from experiments.document import rewrite
from experiments.zero_prior.compare import Results, compare, metrics
from experiments.zero_prior.design import CONVERGED, PUBLISHED, ZERO_PRIOR
from experiments.zero_prior.study import UNTRAINED

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "zero_prior.md"


def parts(results: Results) -> dict[str, str]:
    """What was measured, as Markdown, by the document's part."""
    return {
        "answer": answer(results),
        "metrics": metrics(results),
        "compare": compare(results),
    }


def answer(results: Results) -> str:
    """The answer in five sentences, with its numbers."""
    metrics = {metric.name: metric for metric in results.metrics}

    def more(name: str, other: str) -> str:
        """What the placeholder has more of than another word."""
        pair = (CONVERGED.name, ZERO_PRIOR.name), (CONVERGED.name, other)
        found = results.difference(metrics[name], *pair).mean
        return ("+" if found.mean > 0 else "") + found.text(metrics[name].digits)

    def level(name: str, point: str) -> str:
        return (
            f"{results.mean(metrics[name], point, ZERO_PRIOR.name).mean:.{metrics[name].digits}f}"
        )

    wrong, rare, own = "wrong_prior", "rare_string", "class_word"
    return (
        f"1. Against a word with a wrong prior the placeholder helps: the likeness is the same "
        f"({more('fidelity', wrong)}), but prompts with the subject have "
        f"{more('adherence', wrong)} points more of their other attributes right, and prompts "
        f"without it {more('free', wrong)} points more.\n"
        f"2. Against a rare string it helps a little: as alike ({more('fidelity', rare)}), and "
        f"other prompts keep {more('free', rare)} points more.\n"
        f"3. Against the word that fits the subject it does not: likeness "
        f"{more('fidelity', own)}, attributes {more('adherence', own)}, other prompts "
        f"{more('free', own)}; the word itself takes on less of the subject "
        f"({more('bleed', own)}), which these runs cannot tell from chance where the interval "
        f"holds zero.\n"
        f"4. At the published point nothing is learned under any word (likeness of the "
        f"placeholder {level('fidelity', UNTRAINED.name)} untrained, "
        f"{level('fidelity', PUBLISHED.name)} there, {level('fidelity', CONVERGED.name)} "
        f"converged), so what differs there is what the words meant before.\n"
        f"5. The gains that were once reported are not found: against the fitting word diversity "
        f"is {more('diversity', own)}, sharpness {more('sharpness', own)}."
    )


def write_report(published: Path, folder: Path | None, document: Path) -> None:
    """Rewrites the measured parts of the document and its plot.

    The picture grid needs the pictures in the `folder` of a run; without one it stays.
    """
    from experiments.zero_prior.figures import draw_metrics, draw_pictures

    results = Results.read(published)
    images = rewrite(document, parts(results))
    draw_metrics(results, images / "zero_prior_metrics.png")
    if folder is not None:
        draw_pictures(results, folder, images / "zero_prior_pictures.png")
