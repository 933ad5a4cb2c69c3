"""A thousand damaged LoRA files: each is refused with a reason or applied; the base survives."""

import json
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from adapters.archive import BrokenArchive, read_archive
from adapters.formats.factors import LoraMismatch
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from lab.benchmarks.format_cases import CASES, Case
from lab.benchmarks.formats import ORIGINAL_NAMES
from lab.benchmarks.models import MODELS

FILES = 1000
SEEDS = (
    "`transformer.` A/B",
    "LoHa",
    "LoKr `lycoris_`",
    "DoRA `lora_unet_`",
    "`.diff`",
    "fused qkv",
)
Header = dict[str, dict]


def split(whole: bytes) -> tuple[Header, bytes]:
    length = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def joined(header: Header, data: bytes, stated: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if stated is None else stated) + text + data


def cut_short(whole: bytes, chance: random.Random) -> bytes:
    return whole[: chance.randrange(len(whole))]


def grown(whole: bytes, chance: random.Random) -> bytes:
    return whole + chance.randbytes(chance.randint(1, 99))


def flipped_anywhere(whole: bytes, chance: random.Random) -> bytes:
    changed = bytearray(whole)
    for _ in range(chance.choice((1, 1, 8, 64))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def flipped_in_the_header(whole: bytes, chance: random.Random) -> bytes:
    changed = bytearray(whole)
    end = 8 + struct.unpack("<Q", whole[:8])[0]
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def shuffled(whole: bytes, chance: random.Random) -> bytes:
    """The names keep their order, and get each other's tensors."""
    header, data = split(whole)
    entries = list(header.values())
    chance.shuffle(entries)
    return joined(dict(zip(header, entries, strict=True)), data)


def other_length(whole: bytes, chance: random.Random) -> bytes:
    header, data = split(whole)
    return joined(header, data, chance.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1)))


def other_entry(whole: bytes, chance: random.Random) -> bytes:
    """One tensor's type, shape or place says something else."""
    header, data = split(whole)
    entry = header[chance.choice(list(header))]
    field, values = chance.choice(
        (
            ("dtype", ("F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", 3, None)),
            ("shape", ([], [0], [-1], [2**40, 2**40], entry["shape"][::-1], [4, 4], "x", None)),
            ("data_offsets", ([0, 0], [4, 0], [0, 2**63], [-4, 0], [0, 16], [0], None)),
        )
    )
    entry[field] = chance.choice(values)
    return joined(header, data)


def other_type_of_the_same_size(whole: bytes, chance: random.Random) -> bytes:
    header, data = split(whole)
    entry = header[chance.choice(list(header))]
    width, dtype = chance.choice(((1, "I32"), (1, "U32"), (2, "F16"), (2, "BF16"), (4, "F8_E5M2")))
    entry["dtype"] = dtype
    if width > 1:
        entry["shape"] = [*entry["shape"][:-1], (entry["shape"] or [1])[-1] * width]
    return joined(header, data)


def other_keys(whole: bytes, chance: random.Random) -> bytes:
    header, data = split(whole)
    key = chance.choice(list(header))
    odd = (key[:-1], f"{key}.weight", "a" * 5000, "\x1b[31m\n", "", "..", key.replace(".", "_"))
    header[chance.choice(odd)] = header.pop(key)
    return joined(header, data)


def other_metadata(whole: bytes, chance: random.Random) -> bytes:
    header, data = split(whole)
    peft = ("{", "[]", '{"transformer.r": 1e999}', '{"r": 4, "lora_alpha": "x"}', "[" * 9999)
    odd = ({"lora_adapter_metadata": chance.choice(peft)}, {"x": 1}, "x", {"x": {}}, None)
    return joined({"__metadata__": chance.choice(odd), **header}, data)  # type: ignore[dict-item]


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(cut_short, grown, flipped_anywhere, flipped_in_the_header, shuffled, other_length),
    *(other_entry, other_type_of_the_same_size, other_keys, other_metadata),
)


def bits(transformer: nn.Module) -> bytes:
    return b"".join(
        p.detach().view(torch.uint8).numpy().tobytes() for p in transformer.parameters()
    )


def test_no_damaged_file_crashes_or_changes_the_base(tmp_path: Path) -> None:
    transformer = MODELS["Z-Image"]()
    layout = Layout.of(transformer, "Z-Image", ORIGINAL_NAMES["Z-Image"])
    merger = LoraMerger(transformer)
    weights = {n.removesuffix(".weight"): p for n, p in transformer.named_parameters()}
    seeds = [seed_file(case, weights) for case in CASES if case.layout.startswith(SEEDS)]
    assert len(seeds) >= len(SEEDS)
    before = bits(transformer)
    file = tmp_path / "lora.safetensors"
    chance = random.Random(0)
    ends: Counter[tuple[str, str]] = Counter()
    for _ in range(FILES):
        damage = chance.choice(DAMAGES)
        file.write_bytes(damage(chance.choice(seeds), chance))
        try:
            deltas = layout.fit(read_archive(file).deltas, "file")
        except (BrokenArchive, LoraMismatch) as error:
            assert str(error).isprintable()
            assert len(str(error)) < 2000
            ends[damage.__name__, "refused"] += 1
        else:
            merger.apply([(deltas, 1.0)])
            assert all(p.isfinite().all() for p in transformer.parameters())
            merger.restore()
            ends[damage.__name__, "applied"] += 1
        assert bits(transformer) == before
    assert all(ends[damage.__name__, "refused"] for damage in DAMAGES)
    assert ends["flipped_anywhere", "applied"]  # else nothing but the header was reached


def seed_file(case: Case, weights: dict[str, torch.Tensor]) -> bytes:
    file = case.write(weights)
    whole = save({key: value.contiguous().clone() for key, value in file.tensors.items()})
    return whole
