"""Writes what was measured into docs/zero_prior.md, between its marks."""

from pathlib import Path

from lab.experiments.document import rewrite
from lab.experiments.zero_prior.compare import Results, compare_choices, compare_words, metrics
from lab.experiments.zero_prior.design import CONVERGED, PUBLISHED, ZERO_PRIOR
from lab.experiments.zero_prior.study import UNTRAINED

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "zero_prior.md"


def parts(results: Results) -> dict[str, str]:
    """What was measured, as Markdown, by the document's part."""
    return {
        "answer": answer(results),
        "metrics": metrics(results),
        "compare": compare_words(results),
        "reasons": reasons(results),
        "choices": compare_choices(results),
    }


def answer(results: Results) -> str:
    """The answer in five sentences, with its numbers."""
    metrics = {metric.name: metric for metric in results.metrics}

    def more(name: str, other: str) -> str:
        """What the placeholder has more of than another word."""
        pair = (CONVERGED.name, ZERO_PRIOR.name), (CONVERGED.name, other)
        return results.difference(metrics[name], *pair).signed(metrics[name].digits)

    def level(name: str, point: str) -> str:
        return (
            f"{results.mean(metrics[name], point, ZERO_PRIOR.name).mean:.{metrics[name].digits}f}"
        )

    wrong, rare, own = "wrong_prior", "rare_string", "class_word"
    return (
        f"1. Against a word with a wrong prior, the placeholder token helps: the likeness is the "
        f"same ({more('fidelity', wrong)}), but prompts with the subject have "
        f"{more('adherence', wrong)} points more of their other attributes correct, and prompts "
        f"without it {more('free', wrong)} points more.\n"
        f"2. Against a rare string it helps a little: the same likeness "
        f"({more('fidelity', rare)}), and {more('free', rare)} points more in other prompts.\n"
        f"3. Against a class word that fits the subject it makes no difference: likeness "
        f"{more('fidelity', own)}, attributes {more('adherence', own)}, other prompts "
        f"{more('free', own)}. The class word itself changes less towards the subject "
        f"({more('bleed', own)}); where the interval contains zero, this may be chance.\n"
        f"4. At the published point nothing is learned under any word (likeness with the "
        f"placeholder {level('fidelity', UNTRAINED.name)} untrained, "
        f"{level('fidelity', PUBLISHED.name)} there, {level('fidelity', CONVERGED.name)} "
        f"converged). Differences there come from what the words meant before.\n"
        f"5. The gains that were reported elsewhere are not found: against the fitting word, "
        f"diversity is {more('diversity', own)}, sharpness {more('sharpness', own)}."
    )


def reasons(results: Results) -> str:
    """What `train` does with a placeholder, and why, with the numbers."""
    metrics = {metric.name: metric for metric in results.metrics}

    def more(name: str, choice: str) -> str:
        """What a choice has more of than the defaults."""
        return results.choice(metrics[name], choice).signed(metrics[name].digits)

    return (
        f"- **LoRA and embedding are trained together.** The embedding alone learns next to "
        f"nothing (likeness {more('fidelity', 'placeholder alone')}). The LoRA alone, with an "
        f"embedding that stays at its start, learns as much ({more('fidelity', 'LoRA alone')}): "
        f"what counts here is that the token is new. The embedding is trained all the same: at the "
        f"published sizes that is a small part of a step, and its effect there is not measured.\n"
        f"- **The embedding's learning rate** is five times the LoRA's. A tenth of that "
        f"({more('fidelity', 'rate 2e-3')}) and five times as much "
        f"({more('fidelity', 'rate 1e-1')}) give the same likeness, so it stays in the middle.\n"
        f"- **It starts** with a standard deviation of 1e-5. Exact zeros "
        f"({more('fidelity', 'start 0')}), 1e-3 ({more('fidelity', 'start 1e-3')}) and 1e-2 "
        f"({more('fidelity', 'start 1e-2')}) give the same likeness, so 1e-5 stays: near zero, "
        f"with a direction. A start with the class word's embedding learns no better "
        f"({more('fidelity', 'start class word')}) and harms the class word: "
        f"{more('class', 'start class word')} points of its own prompts' attributes.\n"
        f"- **One vector.** Two ({more('fidelity', '2 vectors')}) and four "
        f"({more('fidelity', '4 vectors')}) make no difference that these runs can tell from "
        f"chance, and every vector makes each prompt a token longer.\n"
        f"- **LoRA and embedding are clipped separately.** With one common norm the likeness is "
        f"the same ({more('fidelity', 'clipped together')}). Separately, neither can take the "
        f"other's share, whatever the base model's gradients are."
    )


def write_report(published: Path, folder: Path | None, document: Path) -> None:
    """Rewrites the measured parts of the document and its plot.

    The image grid needs the images in the `folder` of a run; without one it stays.
    """
    from lab.experiments.zero_prior.figures import draw_choices, draw_metrics, draw_pictures

    results = Results.read(published)
    images = rewrite(document, parts(results))
    draw_metrics(results, images / "zero_prior_metrics.png")
    draw_choices(results, images / "zero_prior_choices.png")
    if folder is not None:
        draw_pictures(results, folder, images / "zero_prior_pictures.png")
