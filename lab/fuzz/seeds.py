"""Whole inputs of each reader, where mutation starts."""

import io
import json
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageCms
from safetensors.torch import save

from adapters.archive import LORA, META, PLACEHOLDER

ROOT = Path(__file__).resolve().parents[2]
HEIC = ROOT / "tests" / "trainer" / "data" / "images"  # Pillow cannot write it
CHECKPOINT = "zeroprior.checkpoint"  # the name of its header
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def dataset_seeds() -> list[bytes]:
    files = {"a.png": picture_file(), "a.txt": b"a photo of TOK", "b/c.jpg": picture_file("JPEG")}
    whole = [
        zip_file(files),
        zip_file(files, zipfile.ZIP_DEFLATED),
        tar_file(files),
        tar_file(files, "w:gz"),
    ]
    return [
        *(b"\0" + each for each in whole),
        b"\1" + picture_file(),
        b"\2a photo of TOK, \xe9t\xe9",
        b"\3set\\caf\xc3\xa9.png",
        b'\4{"file_name": "3_TOK a/a.png", "text": "TOK"}\n{"file_name": "b", "text": "TOK"}\n',
    ]


def picture_seeds() -> list[bytes]:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"s\0R\0G\0B", b"w\0i\0d\0e")  # so that it is converted from
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(picture_file(kind) for kind in ("PNG", "JPEG", "WEBP")),
        picture_file("JPEG", icc_profile=profile, exif=exif, progressive=True),
        picture_file("PNG", icc_profile=profile),
        picture_file("WEBP", icc_profile=profile, lossless=True),
        picture_file("JPEG", mode="CMYK"),
        picture_file("PNG", mode="P", transparency=0),
        picture_file("PNG", mode="I;16"),
        picture_file("PNG", mode="LA"),
        *(picture_file(kind) for kind in ("AVIF", "TIFF", "BMP", "GIF", "JPEG2000")),
        picture_file("AVIF", exif=exif, quality=100),
        picture_file("TIFF", compression="tiff_lzw"),
        picture_file("TIFF", mode="I;16", compression="tiff_adobe_deflate"),
        picture_file("JPEG2000", no_jp2=True, tile_size=(16, 16)),
        *(file.read_bytes() for file in sorted(HEIC.glob("*.heic"))),
    ]


def table_seeds() -> list[bytes]:
    rows = b'{"file_name": "a.jpg", "text": "TOK"}\n{"image_path": "/b/c.jpg", "caption": ["x"]}\n'
    tags = b'{"meta": {"trigger": "TOK"}, "tags": {"count": "1", "tags": ["a", "b"], "nl": "c"}}'
    return [
        b"\0" + rows,
        b'\1file_name,prompt,seed\r\na.jpg,"TOK, a ""b""\r\nc",7\r\n',
        b"\2Image\tText\nb\\a.png\tTOK \x96 b\n",
        b'\3{"a.jpg": ["TOK", "x"], "c": {"caption": "y", "caption_short": "z"}}',
        b'\3[{"file_name": "a.jpg", "text": "TOK"}]',
        b'\4{"caption": "TOK", "width": 9}',
        b"\4" + tags,
    ]


def weights_seeds() -> list[bytes]:
    whole_members = members()
    whole = [
        zip_file(whole_members),
        zip_file(whole_members, zipfile.ZIP_DEFLATED),
        tar_file(whole_members),
        whole_members[LORA],
    ]
    layer = "lora_unet_layers_0_attention_to_q"
    kohya = {
        f"{layer}.lora_down.weight": torch.ones(2, 8),
        f"{layer}.lora_up.weight": torch.ones(8, 2),
        f"{layer}.alpha": torch.tensor(1.0),
    }
    return [
        *(b"\0" + each for each in whole),
        b"\0" + save(kohya),
        *(
            bytes([place]) + whole_members[name]
            for place, name in enumerate(whole_members, start=1)
        ),
    ]


def config_seeds() -> list[bytes]:
    ours = [file.read_bytes() for file in sorted((ROOT / "configs").rglob("*.yaml"))]
    return [*ours, b"dataset: a.zip\nbase_model: miniature\ntrain: {steps: 2, rank: 1}\n"]


def caption_seeds() -> list[bytes]:
    texts = (
        "<zwx>\na photo of TOK, <zwx> and zwx",
        "ohwxq\nohwxq's ohwxqs TOK 的ohwxq",
        "[\\1+$\nTOK<|im_end|>\n<|im_start|>system {} [\\1+$",
        "<é>\ne\u0301 <é> <e\u0301> 🐈‍⬛ \u202eصورة",
    )
    return [text.encode() for text in texts]


def checkpoint_seeds() -> list[bytes]:
    moments = [[name, {"tensor": f"optimizers.lora.state.0.{name}"}] for name in ("step", "exp")]
    group = {"pairs": [["params", [0]], ["lr", 1e-3], ["betas", [0.9, 0.999]], ["fused", True]]}
    held = {"pairs": [[0, {"pairs": moments}]]}
    optimizer = {"pairs": [["state", held], ["param_groups", [group]]]}
    header = {
        "format_version": 2,
        "step": 2,
        "identity": {"rank": 2, "settings": {"seed": 5}, "data": {"a.png": ["00", "11"]}},
        "history": {"losses": [0.5, 0.25], "row_norms": [], "validation": [[0, 0.5], [2, 0.25]]},
        "averaged_steps": 0,
        "state": {
            "parameters": {"pairs": [["lora.0", {"tensor": "parameters.lora.0"}]]},
            "optimizers": {"pairs": [["lora", optimizer]]},
            "averages": {"pairs": []},
        },
    }
    text = json.dumps(header)
    return [b"\0" + save(state(), metadata={CHECKPOINT: text}), b"\1" + text.encode()]


@cache
def state() -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint."""
    return {
        "parameters.lora.0": torch.ones(2, 8),
        "optimizers.lora.state.0.step": torch.tensor(2.0),
        "optimizers.lora.state.0.exp": torch.ones(2, 8),
    }


@cache
def members() -> dict[str, bytes]:
    """What a weights.zip holds: LoRA, placeholder and meta.json."""
    layer = "transformer.layers.0.attention.to_q"
    chance = torch.Generator().manual_seed(0)
    down, up, row = (torch.randn(size, generator=chance) for size in ((2, 8), (8, 2), (1, 8)))
    tensors = {f"{layer}.lora_A.weight": down.bfloat16(), f"{layer}.lora_B.weight": up.bfloat16()}
    settings = '{"transformer.r": 2, "transformer.lora_alpha": 2}'
    return {
        LORA: save(tensors, metadata={"format": "pt", "lora_adapter_metadata": settings}),
        PLACEHOLDER: save({"<zwx>": row}),
        META: b'{"base_model": "Tongyi-MAI/Z-Image", "format_version": 1, "rank": 2, '
        b'"train_placeholder_token": true, "placeholder_token": "<zwx>"}',
    }


def picture_file(format: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
    content = io.BytesIO()
    Image.effect_mandelbrot((24, 16), (-2, -1, 1, 1), 9).convert(mode).save(
        content, format, **options
    )
    return content.getvalue()


def zip_file(files: dict[str, bytes], packing: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", packing) as zipped:
        for name, data in files.items():
            zipped.writestr(zipfile.ZipInfo(name), data, packing)
    return content.getvalue()


def tar_file(files: dict[str, bytes], mode: str = "w") -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode=mode) as tarred:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tarred.addfile(info, io.BytesIO(data))
    return content.getvalue()
