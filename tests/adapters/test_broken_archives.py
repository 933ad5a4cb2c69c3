"""An archive with a fault is refused by name."""

import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from archives import LAYERS, Members, pack
from safetensors.torch import load, save

from adapters.archive import (
    LORA,
    META,
    PLACEHOLDER,
    BrokenArchive,
    read_archive,
)


def with_meta(**changes: object) -> Callable[[Members], None]:
    def change(members: Members) -> None:
        members[META] = json.dumps(json.loads(members[META]) | changes).encode()

    return change


def with_lora(change_tensors: Callable[[dict[str, torch.Tensor]], None]) -> Callable:
    def change(members: Members) -> None:
        tensors = load(members[LORA])
        change_tensors(tensors)
        members[LORA] = save(tensors)

    return change


def with_placeholder(**tensors: torch.Tensor) -> Callable[[Members], None]:
    named = {"<zwx>" if name == "zwx" else name: value for name, value in tensors.items()}
    return lambda members: members.update({PLACEHOLDER: save(named)})


A, B = (f"diffusion_model.{LAYERS[0]}.lora_{matrix}.weight" for matrix in "AB")
ROW = torch.zeros(1, 64)
REFUSED: dict[str, tuple[Callable[[Members], object], str]] = {
    "a later format": (with_meta(format_version=2), "format version 2 is unknown"),
    "an odd format": (with_meta(format_version="new"), "format version 'new' is unknown"),
    "no LoRA": (lambda m: m.pop(LORA), f"expected {LORA} or exactly one .*found none"),
    "two LoRAs": (
        lambda m: m.update({"a.safetensors": m[LORA], "b.safetensors": m.pop(LORA)}),
        "found a.safetensors, b.safetensors",
    ),
    "meta cut short": (lambda m: m.update({META: m[META][:40]}), "meta.json is not JSON"),
    "meta in another encoding": (lambda m: m.update({META: b"\xff{}"}), "meta.json is not JSON"),
    "meta nested without end": (
        lambda m: m.update({META: b"[" * 99999}),
        "meta.json is too large: it is nested more than 50 levels deep",
    ),
    "meta of a million lists": (
        lambda m: m.update({META: b'{"a":[' + b"[]," * 999_999 + b"0]}"}),
        "meta.json is too large: it has more than 200,000 values",
    ),
    "meta a list": (lambda m: m.update({META: b"[]"}), "meta.json is not a JSON object"),
    "a base that is no name": (with_meta(base_model=3), "base_model that is not a name"),
    "a promised placeholder": (
        lambda m: m.pop(PLACEHOLDER),
        "names the placeholder '<zwx>', but .* is missing",
    ),
    "another placeholder": (with_meta(placeholder_token="<abc>"), "'<abc>', .* contains '<zwx>'"),
    "a placeholder of NaN": (with_placeholder(zwx=ROW * torch.nan), "contains NaN or infinity"),
    "a placeholder without rows": (with_placeholder(zwx=ROW[:0]), r"not \[vectors, hidden\]"),
    "a flat placeholder": (with_placeholder(zwx=ROW[0]), r"shape \(64,\) is not"),
    "two placeholders": (
        with_placeholder(zwx=ROW, abc=ROW + 1),
        "contains 2 tensors; one is expected",
    ),
    "a placeholder of integers": (with_placeholder(zwx=ROW.int()), "not floating point"),
    "a placeholder with space": (
        with_placeholder(**{"a b": ROW}),
        f"{PLACEHOLDER}: .*'a b' contains white space",
    ),
    "a damaged placeholder": (
        lambda m: m.update({PLACEHOLDER: m[PLACEHOLDER][:-9]}),
        f"{PLACEHOLDER} is not a whole safetensors file",
    ),
    "a missing lora_B": (with_lora(lambda t: t.pop(B)), f"{LAYERS[0]} has lora_A but no lora_B"),
    "a missing lora_A": (with_lora(lambda t: t.pop(A)), f"{LAYERS[0]} has lora_B but no lora_A"),
    "NaN": (with_lora(lambda t: t[A].view(-1)[3].fill_(torch.nan)), "contains NaN or infinity"),
    "infinity": (
        with_lora(lambda t: t[B].view(-1)[3].fill_(torch.inf)),
        "contains NaN or infinity",
    ),
    "ranks that do not meet": (with_lora(lambda t: t.update({A: t[A][:3]})), r"shapes \(3, 16\)"),
    "a vector": (with_lora(lambda t: t.update({A: t[A][0]})), r"shapes \(16,\)"),
    "rank 0": (with_lora(lambda t: t.update({A: t[A][:0], B: t[B][:, :0]})), r"shapes \(0, 16\)"),
    "an unknown key": (
        with_lora(lambda t: t.update({"x.oft_diag": t[A] + 1})),
        "x.oft_diag is a part of an OFT adapter, which is not supported",
    ),
    "no tensors": (
        with_lora(lambda t: t.clear()),
        "a safetensors file without tensors, not a LoRA",
    ),
    "a damaged LoRA": (
        lambda m: m.update({LORA: m[LORA][:-9]}),
        f"{LORA} is not a whole safetensors file",
    ),
    "a pointer in place of the LoRA": (
        lambda m: m.update({LORA: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"}),
        f"{LORA} is a Git-LFS pointer",
    ),
    "too many members": (lambda m: m.update({f"{i}": b"" for i in range(1000)}), "more than 1,000"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_an_archive_with_a_fault_is_refused_by_name(
    change: Callable[[Members], object],
    message: str,
    members: Members,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(members)
    file = pack(members, tmp_path / "broken.zip")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    with pytest.raises(BrokenArchive, match=message) as caught:
        read_archive(file)
    assert str(caught.value).startswith("broken.zip")
    assert not any(scratch.iterdir())


def _pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({A: torch.ones(1, 16)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a zip cut short": (lambda whole: whole[: len(whole) // 2], "is a truncated zip"),
    "a zip with a changed byte": (
        lambda whole: whole[:700] + bytes([whole[700] ^ 1]) + whole[701:],
        "is damaged .*CRC",
    ),
    "a web page": (lambda _: b"<!DOCTYPE html><title>Sign in</title>", "is a web page"),
    "a Git-LFS pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n",
        "is a Git-LFS pointer",
    ),
    "a pickle": (lambda _: _pickled(True), "is a pickle, which may run code"),
    "an old pickle": (lambda _: _pickled(False), "is a pickle, which may run code"),
    "an empty file": (lambda _: b"", r"is empty \(0 bytes\)"),
    "an error in JSON": (lambda _: b'{"error": "gated"}', "is JSON text, not a LoRA"),
    "a gzip cut short": (lambda _: b"\x1f\x8b\x08\x00", "is damaged"),
}


@pytest.mark.parametrize(("change", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_archive_is_refused_by_name(
    change: Callable[[bytes], bytes], message: str, weights: Path
) -> None:
    weights.write_bytes(change(weights.read_bytes()))
    with pytest.raises(BrokenArchive, match=f"weights.zip {message}"):
        read_archive(weights)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(BrokenArchive, match="gone.zip: no such file"):
        read_archive(tmp_path / "gone.zip")


def test_a_bomb_is_refused_by_the_size_it_states(
    members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights.zip"
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(LORA, members[LORA])
        zipped.getinfo(LORA).file_size = 9 << 30
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nothing may be written"))
    with pytest.raises(BrokenArchive, match=f"{LORA} unpacks to 9,663,676,416 bytes from"):
        read_archive(file)


def test_a_bomb_that_understates_its_size_is_cut_off_there(
    members: Members, tmp_path: Path
) -> None:
    file = tmp_path / "weights.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr(LORA, members[LORA] + bytes(50 << 20))
        zipped.getinfo(LORA).file_size = len(members[LORA])
    with pytest.raises(BrokenArchive, match="is damaged"):
        read_archive(file)


def test_a_link_in_a_tar_leads_nowhere(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(save({A: torch.ones(1, 16), B: torch.ones(24, 1)}))
    file = tmp_path / "weights.tar"
    with tarfile.open(file, "w") as tarred:
        link = tarfile.TarInfo(LORA)
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        tarred.addfile(link)
    with pytest.raises(BrokenArchive, match=f"{LORA} is a link"):
        read_archive(file)
