"""Charts of a LoRA and of what a tool made of it, as SVG files."""

from collections.abc import Mapping, Sequence

from adapters.tools.merge import Changed
from charts import Line, chart, file_of


def result_figure(result: Changed) -> str:
    """The singular values' energy, and the rank and the error of each layer."""
    errors = [(number, each.error) for number, each in enumerate(result.layers, 1)]
    ranks = [(number, float(each.rank)) for number, each in enumerate(result.layers, 1)]
    title = "Error of each layer, in the order of the file"
    figures = [(title, chart([Line(errors, "main", dots=True)], "layer", title))]
    if len({rank for _, rank in ranks}) > 1:
        title = "Rank of each layer"
        figures.append((title, chart([Line(ranks, "mean", dots=True)], "layer", title)))
    if result.energies:
        title = "Share of the squared norm that each rank has, by layer"
        figures.insert(0, (title, chart(_energy(result.energies), "rank", title)))
    return file_of(figures)


def norms_figure(blocks: Mapping[str, float]) -> str:
    """The norm of the change by block, in the order of the file."""
    points = [(number, value) for number, value in enumerate(blocks.values())]
    title = f"Norm of the change by block, {' … '.join([*blocks][:: max(len(blocks) - 1, 1)])}"
    return file_of([(title, chart([Line(points, "main", dots=True)], "block", title))])


def _energy(energies: Mapping[str, Sequence[float]]) -> list[Line]:
    """The lowest, the median and the highest share of the layers at each rank."""
    most = max(map(len, energies.values()))
    columns = [
        sorted(shares[min(rank, len(shares)) - 1] for shares in energies.values())
        for rank in range(1, most + 1)
    ]

    def line(place: float, style: str, label: str) -> Line:
        points = [
            (rank, each[round(place * (len(each) - 1))]) for rank, each in enumerate(columns, 1)
        ]
        return Line(points, style, label)

    return [line(1, "raw", "highest"), line(0.5, "mean", "median"), line(0, "main", "lowest")]
