"""A LoRA extracted from a whole transformer, or why there is none."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.tools.extract import extract
from adapters.tools.low_rank import leading_singular
from adapters.tools.opened import ToolError
from families.registry import BASES
from families.repository import transformer_source

TURBO = BASES["miniature-turbo"]


def test_an_extraction_names_what_no_lora_can_contain(tmp_path: Path) -> None:
    source = transformer_source(TURBO) / "diffusion_pytorch_model.safetensors"
    tensors = load_file(source)
    tensors["layers.0.attention_norm1.weight"] += 1
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(ToolError, match="does not differ from miniature-turbo"):
        extract(tmp_path / "tuned.safetensors", TURBO, rank=2)
    tensors["layers.0.attention.to_q.weight"] += torch.eye(192)
    save_file(tensors, tmp_path / "tuned.safetensors")
    found = extract(tmp_path / "tuned.safetensors", TURBO, rank=48)
    assert [each.layer for each in found.changed.layers] == ["layers.0.attention.to_q"]
    assert found.explained == pytest.approx(48 / 192, abs=0.01)  # all singular values are 1
    assert "layers.0.attention_norm1.weight" in found.changed.notes[0]


def test_the_fast_decomposition_is_within_a_hundredth_of_the_best() -> None:
    random = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(400, 400, generator=random)).Q
    right = torch.linalg.qr(torch.randn(900, 400, generator=random)).Q
    for decay in (0.5, 1.0):
        values = torch.arange(1, 401) ** -decay
        matrix = (left * values) @ right.T
        best = float(values[32:].norm())
        for each in (matrix, matrix.T):
            down, up = leading_singular(each, 32).factors(32)
            assert best * 0.999 < float((each - up @ down).norm()) < 1.01 * best


def with_entry(key: str, dtype: str, shape: list[int], data: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        entry = {key: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}
        text = json.dumps(entry).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    return write


def changed_source(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        tensors = load_file(transformer_source(TURBO) / "diffusion_pytorch_model.safetensors")
        change(tensors)
        save_file(tensors, path)

    return write


TO_Q = "layers.0.attention.to_q.weight"


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(b"\0" * 100), "header"),
        (with_entry(TO_Q, "BF16", [1 << 40, 1 << 40], b""), "too large ones"),
        (with_entry(TO_Q, "BF16", [2, 2], bytes(8)), "another size in miniature-turbo"),
        (with_entry("x" * 2000, "BF16", [1], bytes(2)), "a name of 2,000 characters"),
        (with_entry("x.scale_weight", "F32", [], bytes(4)), "is a quantized model"),
        (with_entry(TO_Q, "I64", [], bytes(8)), "is a quantized model"),
        (with_entry("x", "I64", [], bytes(8)), "118 of 118 weights of miniature-turbo are not in"),
        (with_entry("lora_A.weight", "F32", [], bytes(4)), "is a LoRA .*, not a transformer of"),
        (lambda path: path.write_bytes(b"PK\3\4" + bytes(600)), "is an archive .*, not a trans"),
        (lambda path: path.write_bytes(b"\x89PNG" + bytes(600)), "is an image .*, not a trans"),
        (lambda path: path.write_text("a list of things"), "is a text file, not a transformer"),
        (lambda path: path.write_bytes(b""), "is empty .*; give a transformer's folder"),
        (lambda path: path.mkdir(), "contains no .safetensors file; give a transformer's folder"),
        (changed_source(lambda t: t.pop(TO_Q)), f"1 of 118 weights .*{TO_Q}"),
        (changed_source(lambda t: t[TO_Q].fill_(float("nan"))), f"{TO_Q} contains NaN"),
        (changed_source(lambda t: t.update({f"model.{TO_Q}": t[TO_Q].clone()})), "the second"),
    ],
)
def test_a_hostile_model_is_refused(write: Any, reason: str, tmp_path: Path) -> None:
    write(tmp_path / "tuned.safetensors")
    with pytest.raises(ToolError, match=reason):
        extract(tmp_path / "tuned.safetensors", TURBO, rank=2)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"x": "../../etc/passwd"}}, "outside of its folder"),
        ({"weight_map": {"x": "missing.safetensors"}}, "lacks missing.safetensors"),
        ({"weight_map": [[]]}, "not the index of a model"),
        ([{}] * 100, "not the index of a model"),
    ],
)
def test_a_hostile_index_is_refused(index: Any, reason: str, tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps(index))
    with pytest.raises(ToolError, match=reason):
        extract(tmp_path, TURBO, rank=2)
