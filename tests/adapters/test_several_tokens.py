"""An archive may have several placeholder tokens, each with an embedding file of its own."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from adapters.archive import Archive, BrokenArchive, read_archive, read_loose, write_archive
from adapters.cache import memory_of
from adapters.placeholder import Placeholder
from adapters.placeholder_token import MAX_TOKENS

FIRST, SECOND = "embeddings/placeholder.safetensors", "embeddings/placeholder-2.safetensors"
TOKENS = ("<zwx>", "<kul>")
FACTORS = {"layers.0.attention.to_q": (torch.ones(2, 8), torch.ones(8, 2))}
META = {"base_model": "Tongyi-MAI/Z-Image-Turbo", "train_placeholder_token": True}


def placeholders(*tokens: str) -> tuple[Placeholder, ...]:
    random = torch.Generator().manual_seed(1)
    return tuple(Placeholder(token, torch.randn(1, 8, generator=random)) for token in tokens)


def written(folder: Path, *tokens: str) -> Path:
    meta = META | {"placeholder_token": tokens[0]}
    meta |= {"placeholder_tokens": list(tokens)} if len(tokens) > 1 else {}
    return write_archive(Archive(FACTORS, placeholders(*tokens), meta), folder / "weights.zip")


def test_every_token_is_read_back_in_order(tmp_path: Path) -> None:
    path, wanted = written(tmp_path, *TOKENS), placeholders(*TOKENS)
    found = read_archive(path)
    assert found.tokens == TOKENS
    assert found.placeholder is not None and found.placeholder.token == "<zwx>"
    for one, other in zip(found.placeholders, wanted, strict=True):
        assert torch.equal(one.vectors, other.vectors)
        assert torch.equal(found.vectors[one.token], other.vectors)
    assert memory_of(found) > memory_of(Archive(found.deltas, found.placeholders[:1], found.meta))


def test_the_first_token_is_where_programs_look_for_the_only_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(written(tmp_path, *TOKENS)) as several:
        names, first = several.namelist(), load(several.read(FIRST))
        assert json.loads(several.read("meta.json"))["placeholder_token"] == "<zwx>"
    assert [*first] == ["<zwx>"] and SECOND in names
    with zipfile.ZipFile(written(tmp_path, "<zwx>")) as one:
        more = set(names) - set(one.namelist())
        assert more == {SECOND, f"comfyui/{TOKENS[1].strip('<>')}.safetensors"}
        assert load(one.read(FIRST))["<zwx>"].equal(first["<zwx>"])
        assert "placeholder_tokens" not in json.loads(one.read("meta.json"))


def test_a_loose_lora_is_read_with_all_tokens_next_to_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(written(tmp_path, *TOKENS)) as archive:
        archive.extractall(tmp_path / "unpacked")
    lora = tmp_path / "unpacked" / "lora" / "lora_weights.safetensors"
    for token in TOKENS:
        assert read_loose(lora, token).tokens == TOKENS
    with pytest.raises(BrokenArchive, match="contains the placeholder '<zwx>' and '<kul>', not"):
        read_loose(lora, "<abc>")


def embedding(token: str = "<kul>", width: int = 8, count: int = 1) -> bytes:
    return save({f"{token}{k or ''}": torch.ones(1, width) for k in range(count)})


def numbered(last: int) -> dict[str, bytes]:
    return {
        f"embeddings/placeholder-{number}.safetensors": embedding(f"<t{number:02d}>")
        for number in range(2, last + 1)
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m | {SECOND: embedding("<zwx>")}, "two subjects have the placeholder token"),
        (lambda m: m | {SECOND: embedding("<ZWX>")}, "two subjects have the placeholder token"),
        (lambda m: m | {SECOND: embedding("<zwx>s")}, "'<zwx>' is part of '<zwx>s'"),
        (lambda m: m | {SECOND: embedding(width=9)}, "different widths, 8 and 9"),
        (lambda m: m | {SECOND: embedding(count=2)}, "contains 2 tensors; one is expected"),
        (lambda m: m | {SECOND: embedding("a b")}, "white space"),
        (lambda m: m | {SECOND: b"no tensors"}, "placeholder-2.safetensors"),
        (lambda m: m | numbered(MAX_TOKENS + 1), "contains 9 placeholder tokens; at most 8"),
        (
            lambda m: (
                {n: v for n, v in m.items() if n != SECOND}
                | {"embeddings/placeholder-999999999.safetensors": embedding()}
            ),
            "placeholder-2.safetensors is missing",
        ),
        (
            lambda m: {n: v for n, v in m.items() if n != FIRST},
            "placeholder.safetensors is missing",
        ),
        (lambda m: {n: v for n, v in m.items() if n != SECOND}, r"names the placeholders \['<zwx>"),
        (lambda m: m | {SECOND: embedding("<abc>")}, r"the embeddings are those of \['<zwx>', '<a"),
    ],
)
def test_tokens_that_do_not_go_together_are_refused(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], said: str, tmp_path: Path
) -> None:
    with zipfile.ZipFile(written(tmp_path, *TOKENS)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "changed.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in change(members).items():
            archive.writestr(name, content)
    with pytest.raises(BrokenArchive, match=said):
        read_archive(path)


@pytest.mark.parametrize("listed", ["<zwx>", 3, {"<zwx>": 1}, [["<zwx>"]], ["<kul>", "<zwx>"]])
def test_a_list_of_tokens_of_another_kind_is_refused(listed: Any, tmp_path: Path) -> None:
    archive = Archive(FACTORS, placeholders(*TOKENS), META | {"placeholder_tokens": listed})
    path = write_archive(archive, tmp_path / "weights.zip")
    with pytest.raises(BrokenArchive, match="meta.json names the placeholders"):
        read_archive(path)


def test_all_embeddings_together_have_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, *TOKENS)
    size = len(io.BytesIO(embedding()).getvalue())
    monkeypatch.setattr("adapters.archive_members.MAX_PLACEHOLDER_BYTES", 2 * size - 1)
    with pytest.raises(BrokenArchive, match="the embeddings have .* bytes; .* is the limit"):
        read_archive(path)
