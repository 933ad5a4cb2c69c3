"""Weights files that would cost more than they hold: what reading them takes, and what it leaves.

Limits are checked on the header, before a tensor is read, and so is whether the layers exist.
"""

import base64
import gc
import io
import json
import os
import struct
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from watched import watched

from adapters.archive import LORA, META, PLACEHOLDER, Archive, BrokenArchive, read_archive
from adapters.files import bounded_json, tensor_file
from adapters.files.tensor_file import TensorFile
from adapters.formats.deltas import bytes_of
from adapters.formats.factors import LoraMismatch
from adapters.formats.lora_file import BrokenLora, read_deltas
from adapters.formats.lora_header import Header
from families.registry import BASES, UnknownBase
from families.without_weights import transformer_without_weights
from inference.engine import Engine
from inference.fetch.disk_cache import DiskCache
from inference.fetch.sources import Sources
from inference.inputs import GenerationInputs

CPU = torch.device("cpu")
BASE = "zeroprior/miniature-turbo"
LAYER = "layers.0.attention.to_q"
WIDE = (64, 1 << 20)  # more than is unpacked at once
SMALL = {
    "prompt": "a cat",
    "width": 32,
    "height": 32,
    "num_inference_steps": 1,
    "seed": 1,
}


def headed(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in members.items():
            target.writestr(name, content)
    return file.getvalue()


def lora(layer: str = LAYER, rank: int = 1, size: tuple[int, int] | None = None) -> bytes:
    """A LoRA over one layer, of its size in the miniature if none is given."""
    transformer = transformer_without_weights(BASES["miniature-turbo"])
    rows, columns = size or transformer.get_submodule(layer).weight.shape
    tensors = {"A": torch.ones(rank, columns), "B": torch.ones(rows, rank)}
    return save({f"transformer.{layer}.lora_{name}.weight": t for name, t in tensors.items()})


def saved(folder: Path, content: bytes, name: str = "w.zip") -> Path:
    file = folder / name
    file.write_bytes(content)
    return file


# ---- What reading takes --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
@pytest.mark.parametrize("as_zip", [True, False])
def test_narrow_types_take_little_more_than_what_is_kept(
    dtype: torch.dtype, as_zip: bool, tmp_path: Path
) -> None:
    """40 MB are kept; the watch allows 128 MB beyond what the process had."""
    rank, wide = 1024, 9 << 10
    tensors = {
        "x.lora_A.weight": torch.zeros(rank, wide, dtype=dtype),
        "x.lora_B.weight": torch.zeros(1024, rank, dtype=dtype),
    }
    content = save(tensors)
    file = saved(tmp_path, zipped({LORA: content}, zipfile.ZIP_STORED) if as_zip else content)
    del tensors, content
    with watched(tmp_path / "own"):
        archive = read_archive(file)
    assert bytes_of(archive.deltas) == 4 * rank * (wide + 1024)


def test_many_layers_are_converted_one_at_a_time(tmp_path: Path) -> None:
    """As above, with 12 layers of 4 MB each."""
    tensors = {}
    for layer in range(12):
        tensors[f"x{layer}.lora_A.weight"] = torch.zeros(1000, 1000, dtype=torch.float8_e4m3fn)
        tensors[f"x{layer}.lora_B.weight"] = torch.zeros(100, 1000, dtype=torch.float8_e4m3fn)
    file = saved(tmp_path, save(tensors))
    del tensors
    with watched(tmp_path / "own"):
        assert len(read_archive(file).deltas) == 12


MANY = {
    f"layers.{n}.lora_{x}.weight": entry("U8", [1], 2 * n + i, 2 * n + i + 1)
    for n in range(10_001)
    for i, x in enumerate("AB")
}


def test_more_tensors_than_a_model_has_are_refused_before_they_are_made(tmp_path: Path) -> None:
    count = tensor_file.MAX_TENSORS + 1
    for header in (MANY, {str(number): None for number in range(60_000)}):
        file = saved(tmp_path, headed(header, bytes(count)))
        with watched(tmp_path / "own"), pytest.raises(BrokenArchive, match="20,000") as refused:
            read_archive(file)
        assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"__metadata__": {"a": "x" * (17 << 20)}}, "a header of 17,8"),
        ({"x.lora_A.weight": entry("F8_E4M3", [1 << 20, 1 << 20], 0, 1 << 40)}, "has .* bytes"),
        ({"x.lora_A.weight": entry("F4", [1, 1], 0, 1)}, "with the dtype F4; supported dtypes are"),
        ({"x.lora_A.weight": entry("F32", [1] * 9, 0, 4)}, "with 9 dimensions"),
        ({"x.lora_A.weight": entry("F32", [0, 1 << 62], 0, 0)}, "or too large ones"),
        ({"x.lora_A.weight": entry("F32", [-1, -1], 0, 4)}, "the entry of x.lora_A.weight"),
        ({"x.lora_A.weight": entry("F32", [True], 0, 4)}, "the entry of"),
        ({"x.lora_A.weight": entry("F32", [1], 4, 0)}, "the entry of"),
        ({"x.lora_A.weight": entry("F32", [2], 0, 4)}, "the entry of"),
        ({"x.lora_A.weight": entry("F32", [1], 4, 8)}, "a gap before x.lora_A.weight"),
        ({"x.lora_A.weight": []}, "the entry of"),
        ({"\x1b[31m": {}}, "the entry of"),
        ({"__metadata__": {"a": 1}}, "metadata that are not text"),
        ([], "its header is not a table"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_header_beyond_the_limits_is_refused_by_itself(
    header: Any, reason: str, tmp_path: Path
) -> None:
    file = saved(tmp_path, headed(header, bytes(4)), "w.safetensors")
    with watched(tmp_path / "own"), pytest.raises(BrokenArchive, match=reason) as refused:
        read_archive(file)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_what_would_take_too_much_in_float32_is_refused_by_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "MAX_FLOAT32_BYTES", 1000)
    header = {"x.lora_A.weight": entry("F8_E4M3", [1, 251], 0, 251)}
    file = saved(tmp_path, headed(header, bytes(251)))
    with pytest.raises(BrokenArchive, match="takes 1,004 bytes in float32; 1,000 is the limit"):
        read_archive(file)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * (8 << 20),
        b'{"a":' * 1_000_000,
        b"[" + b"[]," * 2_000_000 + b"1]",
        b'["' + b'\\"' * (4 << 20),
        b'"' * (8 << 20),
        b"\\" * (8 << 20),
        b"[" + b'"a",' * 2_000_000 + b"1]",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_json_that_takes_much_more_than_its_text_is_not_parsed(text: bytes, tmp_path: Path) -> None:
    with watched(tmp_path / "own"), pytest.raises(ValueError):
        bounded_json.loads(text, 200_000)


def test_json_within_the_limits_is_the_same_as_everywhere() -> None:
    value = {'a"[[[\\': ["{", "[,]", "é\u2028😀", {"b": [1.5, None, True]}], "c": "\\"}
    text = json.dumps(value).encode()
    assert bounded_json.loads(text, 12) == value
    assert bounded_json.loads(json.dumps(value, ensure_ascii=False).encode(), 12) == value
    deep = b"[" * 50 + b"]" * 50
    assert bounded_json.loads(deep, 50) == json.loads(deep)
    for text, limit in ((b"[" + deep + b"]", 100), (b"[0,0,0,0]", 3)):
        with pytest.raises(bounded_json.TooLarge):
            bounded_json.loads(text, limit)


# ---- Names, kinds and strength come from the header ----------------------------------------------


class Counted(TensorFile):
    """Counts how often each tensor is read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), len(content))
        self.read: list[str] = []

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.append(name)
        return super().__getitem__(name)


PAIR = {"x.lora_A.weight": torch.ones(4, 8), "x.lora_B.weight": torch.ones(8, 4)}


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({}, {"r": 8, "lora_alpha": 8}, "x has rank 4, but adapter_config.json says 8"),
        (
            {"x.alpha": torch.tensor(2.0)},
            {"r": 8, "lora_alpha": 8},
            "x has rank 4, but adapter_conf",
        ),
        ({}, {"r": 4, "lora_alpha": 8, "use_dora": True}, "has no lora_magnitude_vector"),
        ({}, {"target_modules": ["to_q"]}, "it belongs to another file"),
        ({"y.lora_A.weight": torch.ones(4, 8)}, {}, "y has lora_A but no lora_B"),
        ({"x.set_weight": torch.ones(1)}, {}, "x.set_weight is a weight that replaces"),
        ({"x.lora_A.b.weight": torch.ones(4, 8), "x.lora_B.c.bias": torch.ones(8)}, {}, "2 adapt"),
    ],
)
def test_a_wrong_name_or_strength_is_refused_before_a_tensor_is_read(
    more: dict, config: dict, reason: str
) -> None:
    tensors = Counted(save(PAIR | more))
    with pytest.raises(BrokenLora, match=reason):
        read_deltas(tensors, "file", None, json.dumps(config))
    assert tensors.read == []


def test_each_tensor_is_read_once_and_alpha_is_held_against_the_config_then() -> None:
    tensors = Counted(save(PAIR | {"x.alpha": torch.tensor(2.0)}))
    seen: list[Any] = []
    assert read_deltas(tensors, "file", seen.append, '{"r": 4, "lora_alpha": 2}').keys() == {"x"}
    assert sorted(tensors.read) == sorted(tensors)
    assert all(tensor.is_meta for tensor in seen[0]["x"].tensors())
    with pytest.raises(BrokenLora, match=r"x has alpha 2, adapter_config.json says 8"):
        read_deltas(tensors, "file", None, '{"r": 4, "lora_alpha": 8}')


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F4"])
def test_a_whole_model_is_told_to_be_one_whatever_its_size_and_types(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "MAX_FLOAT32_BYTES", 1000)
    header = {"layers.0.attention.to_q.weight": entry(dtype, [1, 251], 0, 251)}
    content = headed(header, bytes(251))
    for file in (saved(tmp_path, content), saved(tmp_path, zipped({"a.safetensors": content}))):
        with pytest.raises(BrokenArchive, match=r"is a whole model of Z-Image \(1 tensors\)"):
            read_archive(file)


@pytest.mark.parametrize("name", ["a.", "down_blocks.0.", ".oft_a", "lora_", "<zwx>"])
def test_a_tensor_with_an_endless_name_is_refused(name: str, tmp_path: Path) -> None:
    endless = {(name * (8 << 20))[: 8 << 20] + ".lora_A.weight": entry("F32", [1, 1], 0, 4)}
    file = saved(tmp_path, headed(endless, bytes(4)))
    with watched(tmp_path / "own"), pytest.raises(BrokenArchive, match="1,000 is the limit") as no:
        read_archive(file)
    assert len(str(no.value)) < 400


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"[" + b"[]," * 1_000_000 + b"1]", "is not valid JSON .*more than 100,000 val"),
        (b"[" * 1_000_000, "is not valid JSON"),
        (b" " * (5 << 20), "has more than 4,194,304 bytes"),
        (b'{"peft_type": "\\u001b[31m' + b"x" * 100_000 + b'"}', "has peft_type '"),
        (b'{"r": ' + b"9" * 4000 + b', "lora_alpha": 1}', "has r 9999"),
        (b"{\xff}", "is not valid JSON"),
    ],
    ids=lambda value: str(value[:20]),
)
@pytest.mark.parametrize("as_zip", [True, False])
def test_an_adapter_config_that_takes_too_much_is_refused(
    config: bytes, reason: str, as_zip: bool, tmp_path: Path
) -> None:
    members = {"a.safetensors": lora(), "adapter_config.json": config}
    if as_zip:
        members = {"w.zip": zipped(members, zipfile.ZIP_STORED)}
    file, *_ = [saved(tmp_path, content, name) for name, content in members.items()]
    with watched(tmp_path / "own"), pytest.raises(BrokenArchive, match=reason) as refused:
        read_archive(file)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400


def test_a_config_with_many_targets_for_many_layers_takes_little_time() -> None:
    layers = [f"layers.{number}.attention.to_q" for number in range(10_000)]
    config = Header(targets=tuple(f"x{number}.to_q" for number in range(90_000)))
    start = time.perf_counter()
    assert config.without(layers) == layers
    assert time.perf_counter() - start < 5


# ---- What the model does not have ----------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASE_MODEL", "miniature-turbo")
        patch.delenv("MODEL_VAULT", raising=False)
        yield Engine(CPU, torch.float32, Sources(cache=DiskCache(tmp_path_factory.mktemp("disk"))))


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("meta", [{"base_model": BASE}, {}, {"base_model": "miniature"}])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: lora("layers.99.attention.to_q", size=WIDE), "do not exist in miniature"),
        (lambda: lora(size=WIDE), "have another size in miniature"),
    ],
)
def test_layers_that_the_model_lacks_are_refused_before_they_are_read(
    content: Any, reason: str, meta: dict[str, str], loaded: bool, engine: Engine, tmp_path: Path
) -> None:
    """The values are damaged, which is only found when they are read."""
    whole = content()
    length = 8 + int.from_bytes(whole[:8], "little")
    packed = bytearray(zipped({META: json.dumps(meta).encode(), LORA: whole}, zipfile.ZIP_STORED))
    at = packed.index(whole[:length]) + len(whole)
    packed[at - 100 : at] = bytes(100)  # so the archive's checksum is wrong
    file = saved(tmp_path, bytes(packed))
    with pytest.raises(BrokenArchive, match="damaged"):
        read_archive(file)
    if loaded:
        engine.predict(GenerationInputs(**SMALL), output_dir=None)
    for inputs in ({"replicate_weights": file}, {"extra_lora": file}):
        with pytest.raises(LoraMismatch, match=reason):
            engine.predict(GenerationInputs(**SMALL, **inputs), output_dir=None)


def test_an_extra_lora_without_a_base_is_held_to_the_default_weights(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of the request is theirs, not the default model."""
    meta = json.dumps({"base_model": BASE}).encode()
    own = saved(tmp_path, zipped({LORA: lora(), META: meta}), "own.zip")
    extra = saved(tmp_path, lora(rank=2), "extra.safetensors")
    monkeypatch.setenv("BASE_MODEL", "qwen-image")
    monkeypatch.setattr(engine, "_default", engine.read(own))
    assert engine.predict(GenerationInputs(**SMALL, extra_lora=extra), output_dir=None)
    assert engine.predict(
        GenerationInputs(**SMALL, extra_lora=extra, replicate_weights=own), output_dir=None
    )


def test_a_folder_of_the_server_cannot_be_named_as_the_base_in_a_file(
    engine: Engine, tmp_path: Path
) -> None:
    folder = BASES["miniature-turbo"].included
    for name in (str(folder), f"{folder}/", os.path.relpath(str(folder)), "~nobody/x", "a" * 5000):
        file = saved(
            tmp_path, zipped({META: json.dumps({"base_model": name}).encode(), LORA: lora()})
        )
        with pytest.raises(UnknownBase, match="is not a known base model") as refused:
            engine.predict(GenerationInputs(**SMALL, replicate_weights=file), output_dir=None)
        assert len(str(refused.value)) < 300
    with pytest.raises(UnknownBase, match="is not one of"):
        engine.predict(GenerationInputs(**SMALL, base_model=str(folder)), output_dir=None)


# ---- What is left --------------------------------------------------------------------------------


def refused_weights(number: int, megabytes: int) -> str:
    """A data URL of a small zip, different for each number, that takes much and fits no request."""
    notes = [[number + each] for each in range(9_000 * megabytes)]
    meta = {"base_model": BASE, "notes": notes, "text": "x" * (megabytes << 20)}
    wide = {"<zwx>": torch.randn(100, 9999)}  # of another model
    members = {LORA: lora(), PLACEHOLDER: save(wide), META: json.dumps(meta).encode()}
    return (
        "data:application/zip;base64,"
        + base64.b64encode(zipped(members, zipfile.ZIP_STORED)).decode()
    )


def resident() -> float:
    """Memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def refuse(engine: Engine, number: int, megabytes: int) -> LoraMismatch:
    with pytest.raises(LoraMismatch, match="<zwx> has 9999 values") as refused:
        engine.predict(
            GenerationInputs(**SMALL, replicate_weights=refused_weights(number, megabytes)),
            output_dir=None,
        )
    return refused.value


def test_refused_weights_are_not_kept_not_even_by_their_error(engine: Engine) -> None:
    def archives() -> int:
        gc.collect()
        return sum(type(each) is Archive for each in gc.get_objects())

    size, count = engine._adapters.size, archives()
    errors = [refuse(engine, number, 1) for number in range(2)]
    assert engine._adapters.size == size
    assert archives() == count
    assert errors


@pytest.mark.slow
def test_a_hundred_refused_weights_leave_the_memory_as_it_was(engine: Engine) -> None:
    for number in range(5):
        refuse(engine, number, 2)
    before = resident()
    for number in range(100):
        refuse(engine, 100 + number, 2)
    assert resident() < before + 100


def test_a_killed_reader_leaves_no_file(tmp_path: Path) -> None:
    """The child is killed in the middle of unpacking, when its file has some megabytes."""
    own = tmp_path / "own"
    own.mkdir()
    wide = save(
        {"x.lora_A.weight": torch.randn(1024, 4096), "x.lora_B.weight": torch.ones(1, 1024)}
    )
    file = saved(tmp_path, zipped({LORA: wide}, zipfile.ZIP_STORED))
    child = os.fork()
    if not child:
        tempfile.tempdir = str(own)
        written = 0

        def killed(packed: Any, count: int) -> bytes:
            nonlocal written
            written += count
            if written > 4 << 20:
                os.kill(os.getpid(), 9)
            return read(packed, count)

        read = zipfile.ZipExtFile.read
        zipfile.ZipExtFile.read = killed  # type: ignore[method-assign, assignment]
        try:
            read_archive(file)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert list(own.iterdir()) == []


def test_a_full_temporary_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill_the_disk: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wide = save({"x.lora_A.weight": torch.randn(64, 1024), "x.lora_B.weight": torch.ones(1, 64)})
    file = saved(tmp_path, zipped({LORA: wide}))
    fill_the_disk()
    with pytest.raises(OSError, match="no space for the unpacked weights .* set TMPDIR") as error:
        read_archive(file)
    assert str(tmp_path) in str(error.value)
