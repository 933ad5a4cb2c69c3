"""weights.zip holds what a training left behind, whole or not at all, and other tools read it."""

import io
import json
import os
import resource
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from adapters.archive import (
    LORA,
    META,
    PLACEHOLDER,
    Archive,
    BrokenArchive,
    read_archive,
    read_loose,
    write_archive,
)
from adapters.formats.factors import Factors
from adapters.placeholder import Placeholder
from families.loading import load_family
from families.registry import BASES
from inference.engine import Engine
from inference.request import Request

LAYERS = ("layers.0.attention.to_q", "layers.1.feed_forward.w1")
META_VALUES = {
    "base_model": "Tongyi-MAI/Z-Image-Turbo",
    "training_mode": "zero_prior",
    "train_placeholder_token": True,
    "placeholder_token": "<zwx>",
    "placeholder_token_id": 151669,
    "placeholder_init_std": 1e-5,
    "rank": 4,
    "steps": 100,
}
Members = dict[str, bytes]


def some_factors(rank: int = 4) -> Factors:
    """Values that bfloat16 holds exactly."""
    generator = torch.Generator().manual_seed(rank)
    return {
        layer: (
            torch.randn(rank, 16, generator=generator).bfloat16().float(),
            torch.randn(24, rank, generator=generator).bfloat16().float(),
        )
        for layer in LAYERS
    }


@pytest.fixture
def archive() -> Archive:
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 1e-5
    return Archive(some_factors(), (Placeholder("<zwx>", vectors),), META_VALUES)


@pytest.fixture
def weights(archive: Archive, tmp_path: Path) -> Path:
    return write_archive(archive, tmp_path / "weights.zip")


@pytest.fixture
def members(weights: Path) -> Members:
    with zipfile.ZipFile(weights) as zipped:
        return {name: zipped.read(name) for name in zipped.namelist()}


def pack(members: Members, file: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file


def assert_same(found: Archive, wanted: Archive) -> None:
    assert found.factors.keys() == wanted.factors.keys()
    for layer, matrices in wanted.factors.items():
        for ours, theirs in zip(found.factors[layer], matrices, strict=True):
            assert ours.dtype == torch.float32
            assert torch.equal(ours, theirs)
    assert found.placeholder is not None and wanted.placeholder is not None
    assert found.placeholder.token == wanted.placeholder.token
    assert found.placeholder.vectors.dtype == torch.float32
    assert torch.equal(found.placeholder.vectors, wanted.placeholder.vectors)


# What is written.


def test_what_is_written_is_what_is_read(archive: Archive, weights: Path) -> None:
    found = read_archive(weights)
    assert_same(found, archive)
    assert found.meta == {"format_version": 1, **META_VALUES}
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"


def test_the_layout_is_the_contract(archive: Archive, weights: Path) -> None:
    with zipfile.ZipFile(weights) as zipped:
        comfyui = ("comfyui/README.txt", "comfyui/zwx.safetensors")
        assert sorted(zipped.namelist()) == sorted((LORA, PLACEHOLDER, META, *comfyui))
        embedding = load(zipped.read("comfyui/zwx.safetensors"))["emb_params"]
        assert b"embedding:zwx," in zipped.read("comfyui/README.txt")
        assert all(info.compress_type == zipfile.ZIP_STORED for info in zipped.infolist())
        lora, placeholder = load(zipped.read(LORA)), load(zipped.read(PLACEHOLDER))
        file = weights.with_name("lora.safetensors")
        file.write_bytes(zipped.read(LORA))
        meta = json.loads(zipped.read(META))
    assert lora.keys() == {
        f"diffusion_model.{layer}.lora_{m}.weight" for layer in LAYERS for m in "AB"
    }
    assert {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    assert {len(t) for key, t in lora.items() if "lora_A" in key} == {4}
    assert {key: tuple(t.shape) for key, t in placeholder.items()} == {"<zwx>": (2, 64)}
    assert placeholder["<zwx>"].dtype == torch.float32
    assert torch.equal(placeholder["<zwx>"], embedding)
    assert meta == {"format_version": 1, **META_VALUES}
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    peft = json.loads(header["lora_adapter_metadata"])
    assert peft["transformer.r"] == peft["transformer.lora_alpha"] == 4
    assert peft["transformer.target_modules"] == sorted(LAYERS)
    assert header["format"] == "pt"
    assert header["zeroprior.base_model"] == "Tongyi-MAI/Z-Image-Turbo"


def test_without_a_placeholder_there_is_no_embedding(tmp_path: Path) -> None:
    meta = {"base_model": "Qwen/Qwen-Image", "train_placeholder_token": False}
    file = write_archive(Archive(some_factors(), (), meta), tmp_path / "weights.zip")
    assert sorted(zipfile.ZipFile(file).namelist()) == [LORA, META]
    assert read_archive(file).placeholder is None


def test_layers_of_unequal_rank_are_written_with_one(tmp_path: Path) -> None:
    low, high = some_factors(2), some_factors(4)
    mixed = {LAYERS[0]: low[LAYERS[0]], LAYERS[1]: high[LAYERS[1]]}
    found = read_archive(write_archive(Archive(mixed, (), {}), tmp_path / "weights.zip"))
    for layer, (down, up) in mixed.items():
        down_found, up_found = found.factors[layer]
        assert len(down_found) == 4
        assert torch.equal(up_found @ down_found, up @ down)


def test_a_failure_while_writing_leaves_what_was_there(archive: Archive, weights: Path) -> None:
    before = weights.read_bytes()
    unwritable = Archive(archive.factors, archive.placeholders, {"settings": object()})
    with pytest.raises(TypeError):
        write_archive(unwritable, weights)
    # A disk that is full in the middle of the LoRA, as far as this process can tell.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 3, limits[1]))
    try:
        with pytest.raises(OSError):
            write_archive(archive, weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert weights.read_bytes() == before
    assert os.listdir(weights.parent) == ["weights.zip"]


# What is read.


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_of_the_same_is_the_same(
    mode: str, archive: Archive, members: Members, tmp_path: Path
) -> None:
    folder = tmp_path / "unpacked"
    for name, content in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    file = tmp_path / "weights"  # the name says nothing
    with tarfile.open(file, mode) as tarred:  # type: ignore[call-overload]
        tarred.add(folder, ".")
    assert_same(read_archive(file), archive)


def test_a_deflated_zip_is_the_same(archive: Archive, members: Members, tmp_path: Path) -> None:
    assert_same(read_archive(pack(members, tmp_path / "x.zip", zipfile.ZIP_DEFLATED)), archive)


def test_a_bare_lora_says_what_it_was_trained_on(
    archive: Archive, members: Members, tmp_path: Path
) -> None:
    file = tmp_path / "anything.bin"
    file.write_bytes(members[LORA])
    found = read_archive(file)
    assert found.factors.keys() == archive.factors.keys()
    assert found.placeholder is None
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"
    # The archive holds values of its own: the file may change afterwards.
    values = {layer: down.clone() for layer, (down, _) in found.factors.items()}
    file.write_bytes(bytes(len(members[LORA])))
    assert all(torch.equal(found.factors[layer][0], down) for layer, down in values.items())


def test_a_lone_lora_is_found_wherever_it_lies(members: Members, tmp_path: Path) -> None:
    elsewhere = {"output/flux/my lora.safetensors": members[LORA], "config.yaml": b"x: 1"}
    found = read_archive(pack(elsewhere, tmp_path / "weights.zip"))
    assert set(found.factors) == set(LAYERS)
    assert found.base_model == "Tongyi-MAI/Z-Image-Turbo"  # by its header


def test_an_unpacked_archive_keeps_its_placeholder(
    archive: Archive, members: Members, tmp_path: Path
) -> None:
    for name, content in members.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert_same(read_loose(tmp_path / LORA, "<zwx>"), archive)
    with pytest.raises(BrokenArchive, match="contains the placeholder '<zwx>', not '<abc>'"):
        read_loose(tmp_path / LORA, "<abc>")
    (tmp_path / PLACEHOLDER).unlink()
    with pytest.raises(BrokenArchive, match="embedding of <zwx> was not found: neither"):
        read_loose(tmp_path / LORA, "<zwx>")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_large_meta_is_read_however_it_is_packed(
    compression: int, members: Members, tmp_path: Path
) -> None:
    captions = [os.urandom(500).hex() for _ in range(12_000)]
    members[META] = json.dumps(META_VALUES | {"captions": captions}).encode()
    assert 12 << 20 > len(members[META]) > 8 << 20
    found = read_archive(pack(members, tmp_path / "w.zip", compression))
    assert found.meta["captions"] == captions


# What is refused.


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


# What other tools make of it.


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("z-image-turbo", 64, {"num_inference_steps": 2, "guidance_scale": 0.0}),
        ("qwen-image", 32, {"num_inference_steps": 2, "true_cfg_scale": 1.0}),
    ],
)
def test_diffusers_loads_our_lora_and_draws_our_picture(
    name: str, size: int, options: dict, use_vault: Path, tmp_path: Path
) -> None:
    from diffusers import DiffusionPipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = BASES[name]
    family = load_family(base)
    weight = dict(family.transformer.named_modules())
    torch.manual_seed(0)
    factors = {}
    for target in family.lora_targets():
        out_size, in_size = weight[target].weight.shape
        factors[target] = (torch.randn(4, in_size) / in_size**0.5, torch.randn(out_size, 4) * 0.2)
    file = write_archive(Archive(factors, (), {"base_model": base.hub_id}), tmp_path / "w.zip")

    def ours(archive: Archive | None) -> np.ndarray:
        steps = options["num_inference_steps"]
        asked = Request(
            prompt="a red fox",
            width=size,
            height=size,
            num_inference_steps=steps,
            guidance_scale=1,
            seed=3,
        )
        return np.asarray(engine.generate(asked, archive, name)[0], np.int16)

    engine = Engine(torch.device("cpu"), torch.float32)
    with zipfile.ZipFile(file) as zipped:
        zipped.extract(LORA, tmp_path)
    stock = DiffusionPipeline.from_pretrained(
        use_vault / base.hub_id, torch_dtype=torch.float32, tokenizer=family.prompts.tokenizer
    )
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(tmp_path / "lora", weight_name=Path(LORA).name)
    adapted = [m for m in stock.transformer.modules() if isinstance(m, BaseTunerLayer)]
    generator = torch.Generator().manual_seed(3)
    theirs = stock("a red fox", width=size, height=size, generator=generator, **options).images[0]

    picture = ours(read_archive(file))
    assert len(adapted) == len(factors) + len(family.idle_layers())
    assert np.abs(picture - np.asarray(theirs, np.int16)).max() <= 1
    assert np.abs(picture - ours(None)).max() > 8  # the LoRA shows


def test_a_tar_from_memory_is_a_tar(archive: Archive, members: Members, tmp_path: Path) -> None:
    """Members in any order, with other files between them."""
    file = tmp_path / "trained_model.tar"
    with tarfile.open(file, "w") as tarred:
        for name in (META, "log.txt", PLACEHOLDER, LORA):
            content = members.get(name, b"steps")
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tarred.addfile(info, io.BytesIO(content))
    assert_same(read_archive(file), archive)
