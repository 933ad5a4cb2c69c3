"""Adapters are read once for as long as there is room, by what is in the file."""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapters.archive import Archive, BrokenArchive, write_archive
from adapters.cache import BYTES_PER_TENSOR, MOST_NOTES, AdapterCache
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from adapters.placeholder import Placeholder
from lab.benchmarks.models import MODELS, block_linears

SIZE = 4 * (4 * 64 + 64 * 4) * 3  # bytes of one adapter's factors
AROUND = 6 * BYTES_PER_TENSOR + sys.getsizeof({"format_version": 1}) + 200  # and of what is around


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    names = [f"layers.0.attention.to_{x}" for x in "qkv"]
    assert set(names) <= set(block_linears(MODELS["Z-Image"]()))
    return [
        write_archive(
            Archive({n: (torch.randn(4, 64), torch.randn(64, 4)) for n in names}, (), {}),
            tmp_path / f"{number}.zip",
        )
        for number in range(3)
    ]


def test_the_same_content_is_the_same_adapter_whatever_its_name(
    files: list[Path], tmp_path: Path
) -> None:
    cache = AdapterCache()
    found = cache.get(files[0])
    copy = shutil.copy(files[0], tmp_path / "other name")
    assert cache.get(copy) is found
    assert cache.get(files[1]) is not found
    assert 2 * SIZE < cache.size < 2 * (SIZE + AROUND)


def test_a_file_that_was_replaced_is_read_anew(files: list[Path]) -> None:
    cache = AdapterCache()
    first, times = cache.get(files[0]), os.stat(files[0])
    os.replace(files[1], files[0])
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copiers do
    assert cache.get(files[0]) is not first


def test_the_longest_unused_leaves_first(files: list[Path]) -> None:
    cache = AdapterCache(budget=2 * (SIZE + AROUND))
    kept = [cache.get(file) for file in files[:2]]
    assert cache.get(files[0]) is kept[0]
    cache.get(files[2])
    assert 2 * SIZE < cache.size <= cache.budget
    assert cache.get(files[0]) is kept[0]
    assert cache.get(files[1]) is not kept[1]


def test_one_larger_than_the_budget_is_kept_alone(files: list[Path]) -> None:
    cache = AdapterCache(budget=10)
    assert cache.get(files[0]) is cache.get(files[0])
    cache.get(files[1])
    assert SIZE < cache.size < SIZE + AROUND


def test_the_budget_counts_meta_and_placeholder(files: list[Path], tmp_path: Path) -> None:
    cache = AdapterCache()
    bare = cache.get(files[0])
    before = cache.size
    vectors = torch.zeros(100, 2560)
    notes = {"notes": ["x" * 1000 + str(number) for number in range(1000)], "empty": [[]] * 50_000}
    rich = Archive(bare.deltas, (Placeholder("<zwx>", vectors),), notes)
    cache.get(write_archive(rich, tmp_path / "rich.zip"))
    assert cache.size - 2 * before > vectors.nbytes + 1000 * 1000 + 50_000 * 56


def test_notes_are_kept_and_counted_and_names_are_as_well(
    files: list[Path], tmp_path: Path
) -> None:
    cache = AdapterCache()
    archive, before = cache.get(files[0]), cache.size
    note = ["layer" * 100]
    taken = sys.getsizeof(list(note)) + sys.getsizeof(note[0])
    for _ in range(2):
        assert cache.noted(archive, 0, lambda: list(note)) == note
        assert cache.size == before + taken
    # As an engine knows it, by one more name.
    known = replace(archive, names=(*archive.names, "w.zip"))
    assert cache.noted(known, 0, lambda: pytest.fail("found again")) == note
    for key in range(1, 2 * MOST_NOTES):
        cache.noted(known, key, lambda: list(note))
    assert cache.size <= before + MOST_NOTES * taken
    cache.drop(known)
    assert cache.size == 0
    tensors = {f"x.lora_{part}.weight": torch.ones(1, 1) for part in "AB"}
    sizes = []
    for title in ("", "t" * 150):
        save_file(tensors, tmp_path / "w.safetensors", {"modelspec.title": title})
        cache = AdapterCache()
        assert cache.get(tmp_path / "w.safetensors").names == (() if not title else (title,))
        sizes.append(cache.size)
    assert sizes[1] >= sizes[0] + 150


def test_an_archive_that_was_refused_is_dropped_unless_it_has_been_used(files: list[Path]) -> None:
    cache = AdapterCache()
    archive = cache.get(files[0])
    cache.drop(archive)
    assert cache.size == 0
    archive = cache.get(files[0])
    cache.fit(archive, Layout.of(MODELS["Z-Image"](), "Z-Image"))
    cache.drop(archive)
    assert cache.get(files[0]) is archive


def test_a_broken_or_missing_file_is_refused_and_not_kept(files: list[Path]) -> None:
    cache = AdapterCache()
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-99])
    for _ in range(2):
        with pytest.raises(BrokenArchive, match="0.zip is a truncated zip"):
            cache.get(files[0])
    assert cache.size == 0
    files[0].write_bytes(whole)
    assert cache.get(files[0]).factors
    with pytest.raises(BrokenArchive, match="gone.zip: no such file"):
        cache.get(files[0].with_name("gone.zip"))


def test_the_same_weights_again_are_fitted_and_laid_only_once(files: list[Path]) -> None:
    cache, transformer = AdapterCache(), MODELS["Z-Image"]()
    layout, merger = Layout.of(transformer, "Z-Image"), LoraMerger(transformer)

    def request(file: Path, scale: float) -> None:
        merger.apply([(cache.fit(cache.get(file), layout), scale)])

    def writes() -> int:
        return sum(parameter._version for parameter in transformer.parameters())

    request(files[0], 1.0)
    before = writes()
    request(files[0], 1.0)
    assert writes() == before
    request(files[0], 0.5)
    request(files[1], 0.5)
    assert writes() > before
    # Another model of the same layers has a layout of its own.
    other = Layout.of(MODELS["Z-Image"](seed=1), "other")
    archive = cache.get(files[0])
    assert cache.fit(archive, other) is cache.fit(archive, other)
    assert cache.fit(archive, layout) is not cache.fit(archive, other)
