"""Changes the rank of a LoRA with the smallest possible error."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from adapters.tools.low_rank import Singular, rank_for, shares, singular_of
from adapters.tools.merge import Changed, Exchanged, measured, meta_of
from adapters.tools.opened import Opened, ToolError, how_to_make_plain

_BYTES = 2  # of a bfloat16 number


@dataclass(frozen=True)
class Goal:
    """Exactly one of three ways to choose the ranks."""

    rank: int | None = None  # of every layer
    energy: float | None = None  # share of the squared norm that every layer keeps, 0 to 1
    megabytes: float | None = None  # of the file, 1e6 bytes; the ranks with the least total error

    def __post_init__(self) -> None:
        given = [self.rank, self.energy, self.megabytes]
        if sum(each is not None for each in given) != 1:
            raise ToolError("give one of --rank, --energy and --size")
        if self.rank is not None and self.rank < 1:
            raise ToolError("--rank must be at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ToolError("--energy is a share between 0 and 1, such as 0.95")
        if self.megabytes is not None and not 0 < self.megabytes < math.inf:
            raise ToolError("--size is in megabytes and must be positive")


def resize(opened: Opened, goal: Goal) -> Changed:
    """The LoRA at other ranks: by QR and a small SVD of each layer, so exact to rounding.

    Also of LoKr and LoHa, which become plain LoRAs. Raises `ToolError` for a size that not even
    rank 1 reaches, and for changes that have no rank (biases, norms, DoRA).
    """
    try:
        parts = {name: singular_of(name, delta) for name, delta in opened.deltas.items()}
    except ToolError as error:
        raise ToolError(f"{error}; {how_to_make_plain(opened)}") from error
    energies = {name: shares(each.s) for name, each in parts.items()}
    ranks = _ranks(parts, goal)

    def layers() -> Iterator[Exchanged]:
        for name, delta in opened.deltas.items():
            found = parts.pop(name)
            exact = delta if isinstance(delta, tuple) else found.factors(len(found.s))
            keep = ranks[name] >= len(exact[0])
            yield name, exact, exact if keep else found.factors(ranks[name])

    before = max(map(len, energies.values()))
    facts = {"resized": {"name": opened.name, "rank_before": before}}
    changed = measured(layers(), opened.archive.placeholders, {**meta_of(opened), **facts})
    return replace(changed, energies=energies)


def _ranks(parts: dict[str, Singular], goal: Goal) -> dict[str, int]:
    if goal.rank is not None:
        return dict.fromkeys(parts, goal.rank)
    if goal.energy is not None:
        return {name: rank_for(shares(each.s), goal.energy) for name, each in parts.items()}
    assert goal.megabytes is not None
    return _ranks_for_size(parts, goal.megabytes * 1e6)


def _ranks_for_size(parts: dict[str, Singular], size: float) -> dict[str, int]:
    """Takes the singular values with the most squared norm for their bytes, until the size."""
    cost = {name: _BYTES * (len(each.u) + each.vh.shape[1]) for name, each in parts.items()}
    ranks = dict.fromkeys(parts, 1)
    left = size - sum(cost.values())
    if left < 0:
        least = math.ceil(sum(cost.values()) / 1e5) / 10
        raise ToolError(f"--size {size / 1e6:g}: rank 1 in every layer takes {least} MB")
    values = {name: (each.s.double() ** 2).tolist() for name, each in parts.items()}
    queue = [(-v[1] / cost[name], name) for name, v in values.items() if len(v) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if cost[name] > left:
            continue
        left -= cost[name]
        ranks[name] += 1
        if ranks[name] < len(values[name]):
            heapq.heappush(queue, (-values[name][ranks[name]] / cost[name], name))
    return ranks
