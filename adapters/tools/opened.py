"""Opens a LoRA of any program for the tools: its base model, its changes, its tensors as stored."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from adapters.archive import Archive, read_archive
from adapters.archive_opening import open_archive
from adapters.formats import (
    Delta,
    Dora,
    Layout,
    LoraMismatch,
    StoredLayer,
    as_delta,
    stored_layers,
)
from adapters.placeholder import Placeholder
from families.base import Base
from families.parameters import text_width, transformer_parameters
from families.registry import (
    BASES,
    FAMILIES,
    UnknownBase,
    family_of,
    find_base,
    find_base_or_folder,
    undistilled,
)


class ToolError(ValueError):
    """A request that a tool cannot fulfil; the message says why, and what can be done."""


@dataclass(frozen=True)
class Opened:
    """A LoRA and the base model that it fits."""

    path: Path
    archive: Archive
    base: Base
    why: str  # the reason for `base`
    layout: Layout
    deltas: Mapping[str, Delta]  # by the base's layer names; alpha is multiplied in

    @cached_property
    def stored(self) -> "Stored":
        """The file's tensors as they are; only some tools need them."""
        return Stored.read(self.path)

    @property
    def name(self) -> str:
        """The file's name, for messages."""
        return self.path.name

    def factors(self, purpose: str) -> dict[str, tuple[Tensor, Tensor]]:
        """(A [rank, in], B [out, rank]) of all layers. Raises `ToolError` for other kinds."""
        other = [name for name, each in self.deltas.items() if not isinstance(each, tuple)]
        if other:
            name = type(self.deltas[other[0]]).__name__
            kind = {"Kronecker": "LoKr", "Hadamard": "LoHa", "Dora": "DoRA"}.get(name, name)
            raise ToolError(
                f"{self.name} is not a plain LoRA ({kind} in {len(other)} of {len(self.deltas)} "
                f"layers, such as {other[0]}), which {purpose} needs; {how_to_make_plain(self)}"
            )
        return {name: each for name, each in self.deltas.items() if isinstance(each, tuple)}


def how_to_make_plain(opened: Opened) -> str:
    """The commands that make a plain LoRA of one of another kind, for messages."""
    deltas = opened.deltas.values()
    if any(isinstance(each, Dora) or len(as_delta(each).shape) != 2 for each in deltas):
        base, rank = f"--base {opened.base.name}", opened.archive.meta.get("rank") or 32
        return (
            f"`bake {opened.path} {base} -o baked` and `extract baked {base} --rank {rank}` make "
            "one, for the linear layers"
        )
    return f"`resize {opened.path} --rank N` makes one"


@dataclass(frozen=True)
class Stored:
    """The layers of a LoRA file as they are stored."""

    layers: Mapping[str, StoredLayer]  # by the file's layer names
    dtypes: Mapping[str, str]  # of each tensor, by its name in the file
    metadata: Mapping[str, str]  # of the file's header

    @classmethod
    def read(cls, path: Path) -> "Stored":
        """Raises `BrokenArchive`."""
        with open_archive(path) as file:
            layers = stored_layers(file.tensors, file.source, file.config)
            planned = file.tensors.planned()
            metadata = dict(file.tensors.metadata)
        dtypes = {key: str(each.dtype).removeprefix("torch.") for key, each in planned.items()}
        return cls(layers, dtypes, metadata)


def open_lora(path: Path, base_name: str = "") -> Opened:
    """Reads a LoRA and finds its base model: the named one, the file's own, or the first that fits.

    Raises `BrokenArchive` for a file that cannot be read, `LoraMismatch` for one that fits no known
    model or has a token of another one, and `UnknownBase`.
    """
    archive = read_archive(path)
    named, why = _named_base(archive, base_name)
    base, layout = (named, layout_of(named)) if named else _first_that_fits(archive, path.name)
    deltas = layout.fit(archive.deltas, path.name)
    check_width(archive.placeholders, base, path.name)
    why = why or f"all {len(deltas)} layers fit"
    return Opened(path, archive, base, why, layout, deltas)


def check_width(placeholders: Sequence[Placeholder], base: Base, source: str) -> None:
    """Raises `LoraMismatch` for an embedding that the base's text encoder cannot take."""
    width = text_width(base)
    for each in placeholders:
        if each.vectors.shape[1] != width:
            raise LoraMismatch(
                f"{source}: the embedding of {each.token} has {each.vectors.shape[1]} values, but "
                f"the text encoder of {base.name} has {width}; it is of another model"
            )


def layout_of(base: Base) -> Layout:
    """The layers of a base's transformer; nothing is downloaded for a published one."""
    parameters = transformer_parameters(base)
    return Layout.of_parameters(parameters, base.name, family_of(base).original_names)


def _named_base(archive: Archive, named: str) -> tuple[Base | None, str]:
    if named:
        return find_base_or_folder(named), "named"
    try:
        return find_base(archive.base_model or ""), "the file names it"
    except UnknownBase:  # none, a fine-tune's name or a folder's: the shapes say the family
        return None, ""


def _first_that_fits(archive: Archive, source: str) -> tuple[Base, Layout]:
    reasons = []
    for base in _one_of_each_size():
        layout = layout_of(base)
        try:
            layout.fit(archive.deltas, source)
        except LoraMismatch as error:
            reasons.append(str(error))
            continue
        return base, layout
    raise LoraMismatch(f"{source} fits no known base model. " + " ".join(dict.fromkeys(reasons)))


def _one_of_each_size() -> Iterator[Base]:
    """An undistilled base of each family, then the included small ones."""
    published = [undistilled(family) for family in FAMILIES.values()]
    yield from published
    yield from (base for base in BASES.values() if base.included and not base.distilled)
