"""A LoRA baked into a whole transformer, and a LoRA extracted from one."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.__main__ import main
from adapters.archive import Archive, read_archive, write_archive
from adapters.baked import baked_loras
from adapters.files import atomic
from adapters.files.tensor_writer import write_tensors
from adapters.formats import LoraMismatch, as_delta
from adapters.formats.layout import Layout
from adapters.merging import LoraMerger
from adapters.placeholder import Placeholder
from adapters.tools.bake import _IN_BLOCK, bake
from adapters.tools.checkpoint import open_checkpoint
from adapters.tools.extract import extract
from adapters.tools.opened import Opened, ToolError, layout_of, open_lora
from adapters.trained_model import read_weights
from families.parameters import FILE, published, transformer_parameters
from families.quantization import block_linears
from families.registry import BASES, FAMILIES, family_of, find_base_or_folder
from families.repository import transformer_source
from families.without_weights import transformer_without_weights
from inference.engine import Engine
from inference.fetch.sources import Sources
from inference.request import Request
from trainer.settings import SettingsError, TrainingInputs, resolve

TURBO = BASES["miniature-turbo"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the miniature with a token; it changes linear layers in blocks and outside."""
    draw = torch.Generator().manual_seed(1)
    shapes = {name: s for name, s in layout_of(TURBO).shapes.items() if len(s) == 2}
    factors = {
        name: (
            torch.randn(4, columns, generator=draw) / columns**0.5,
            torch.randn(rows, 4, generator=draw) / 100,
        )
        for name, (rows, columns) in shapes.items()
        if "to_k" not in name  # so that a fused layer has changed and unchanged rows
    }
    token = Placeholder("<zwx>", torch.randn(1, 128, generator=draw))
    meta = {"base_model": TURBO.hub_id, "placeholder_token": "<zwx>"}
    path = tmp_path_factory.mktemp("lora") / "lora.zip"
    return write_archive(Archive(factors, (token,), meta), path)


@pytest.fixture(scope="module")
def baked(lora: Path) -> Path:
    bake(open_lora(lora), lora.with_name("my-model"), scale=0.9)
    return lora.with_name("my-model")


def merged(opened: Opened, scale: float, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights that generation has."""
    model: Any = family_of(TURBO).model_class("transformer")
    transformer = model.from_pretrained(transformer_source(TURBO), torch_dtype=dtype)
    LoraMerger(transformer).apply([(opened.deltas, scale)])
    return transformer.state_dict()


def test_a_baked_base_has_the_weights_and_images_of_the_base_with_the_lora(
    lora: Path, baked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = family_of(TURBO).model_class("transformer")
    loaded = model.from_pretrained(baked, subfolder="transformer", torch_dtype=torch.bfloat16)
    wanted = merged(open_lora(lora), 0.9, torch.bfloat16)
    assert all(torch.equal(each, wanted[name]) for name, each in loaded.state_dict().items())

    base = find_base_or_folder(str(baked))
    assert base.distilled and base.inference_steps == TURBO.inference_steps
    assert base.completed_by == TURBO
    archive = read_archive(lora)
    request = Request(prompt="a <zwx> in the desert", lora_scale=0.9, seed=3)
    engine = Engine(CPU, torch.bfloat16, Sources())
    wanted_image = numpy.asarray(engine.generate(request, archive, base_model=TURBO.name)[0])
    assert wanted_image.std() > 10
    for weights, name in ((None, str(baked)), (read_weights(baked), "auto")):
        image = engine.generate(request, weights, base_model=name)[0]
        assert numpy.array_equal(numpy.asarray(image), wanted_image)


def test_a_lora_is_not_applied_to_a_base_that_has_it(
    lora: Path, baked: Path, tmp_path: Path
) -> None:
    """Nor is another one for its token; whether it is baked into a folder or into one file."""
    file = tmp_path / "one-file" / "model.safetensors"
    bake(open_lora(lora), file, scale=0.9, layout="comfyui")
    assert file.with_name("zwx.safetensors").is_file()  # for ComfyUI
    index = {"_class_name": "ZImagePipeline", "_name_or_path": TURBO.hub_id}
    (file.parent / "model_index.json").write_text(json.dumps(index))
    renamed = write_archive(replace(read_archive(lora), placeholders=()), tmp_path / "same.zip")
    deltas = dict(read_archive(lora).deltas)
    deltas.popitem()
    retrained = replace(read_archive(lora), deltas=deltas)
    engine = Engine(CPU, torch.bfloat16, Sources())
    request = Request(prompt="a <zwx> in the desert", num_inference_steps=1, seed=3)
    wanted = r"has lora.zip baked in \(scale 0.9, token <zwx>\)"
    for base in (baked, file.parent):
        for archive in (
            *(read_archive(lora), read_archive(renamed)),
            replace(retrained, lora_sha256="another"),
        ):
            with pytest.raises(LoraMismatch, match=f"{base.name} {wanted}"):
                engine.generate(request, archive, base_model=str(base))
        with pytest.raises(ToolError, match=wanted):
            bake(open_lora(lora, str(base)), tmp_path / "twice")
        inputs = TrainingInputs(dataset="x", base_model=str(base), placeholder_token="<zwx>")
        with pytest.raises(SettingsError, match=f"<zwx> is part of base_model {base.name}"):
            resolve(inputs)
    # One file has no token: the LoRA supplies it at scale 0.
    images = [
        engine.generate(request.replace(lora_scale=0), archive, base_model=str(base))[0]
        for archive, base in ((None, baked), (read_archive(lora), file.parent))
    ]
    assert numpy.array_equal(*map(numpy.asarray, images))

    other = Placeholder("<other>", torch.ones(1, 128))
    second = replace(retrained, placeholders=(other,), meta={"base_model": TURBO.hub_id})
    added = write_archive(second, tmp_path / "second.zip")
    bake(open_lora(added, str(baked)), tmp_path / "both", scale=0.5)
    both = find_base_or_folder(str(tmp_path / "both"))
    assert both.completed_by == TURBO
    assert [(each.name, each.scale) for each in baked_loras(both)] == [
        *(("lora.zip", 0.9), ("second.zip", 0.5))
    ]
    assert read_weights(tmp_path / "both").tokens == ("<other>", "<zwx>")


def test_a_comfyui_file_is_read_by_the_converters_of_its_names(
    lora: Path, baked: Path, tmp_path: Path
) -> None:
    """Theirs is diffusers' reader of the original layout; ours reads it as a tuned model."""
    file = tmp_path / "model.safetensors"
    done = bake(open_lora(lora), file, scale=0.9, layout="comfyui")
    written = load_file(file)
    assert "layers.0.attention.qkv.weight" in written and "x_embedder.weight" in written
    assert [each.name for each in done.files] == ["model.safetensors", "zwx.safetensors"]
    assert done.error == pytest.approx(2**-9.2, rel=0.2)  # bfloat16 has 8 bits
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES["ZImageTransformer2DModel"]
    theirs = convert["checkpoint_mapping_fn"](checkpoint=dict(written))
    wanted = load_file(baked / "transformer" / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == wanted.keys()
    assert all(torch.equal(theirs[name], wanted[name]) for name in wanted)
    prefixed = {f"model.diffusion_model.{name}": each for name, each in written.items()}
    save_file(prefixed | {"vae.decoder.conv_in.weight": torch.ones(2)}, file)
    with open_checkpoint(file, TURBO) as again:
        assert again.unused == ("vae.decoder.conv_in.weight",)
        assert all(torch.equal(again.read(name), wanted[name]) for name in wanted)


def test_fp8_weights_times_their_scale_are_the_merged_weights(lora: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    done = bake(open_lora(lora), file, scale=0.9, dtype="fp8", layout="comfyui")
    written = load_file(file)
    assert written["scaled_fp8"].dtype == torch.float8_e4m3fn and len(written["scaled_fp8"]) == 2
    exact = merged(open_lora(lora), 0.9, torch.float32)
    for name in ("layers.0.feed_forward.w1", "layers.1.attention.out"):
        wanted = exact[f"{name.replace('.out', '.to_out.0')}.weight"]
        found = written[f"{name}.weight"].float() * written[f"{name}.scale_weight"]
        assert (found - wanted).norm() < 0.03 * wanted.norm()
        assert found.abs().max() == pytest.approx(float(wanted.abs().max()), rel=1e-3)
    assert done.error == pytest.approx(0.026, rel=0.1)
    quantized = {name for name, each in written.items() if each.dtype == torch.float8_e4m3fn}
    linears = list(block_linears(transformer_without_weights(TURBO)))
    assert len(quantized - {"scaled_fp8"}) == len(linears) - 2 * 7  # q, k and v of 7 blocks are one


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_shapes_and_names_of_the_published_models(family: Any) -> None:
    """The table of shapes is that of the classes, and fp8 quantizes what generation quantizes."""
    base = family.bases[0]
    model = transformer_without_weights(base)
    parameters = transformer_parameters(base)
    assert list(parameters) == list(model.state_dict())
    found = Layout.of_parameters(parameters, base.name, family.original_names)
    wanted = Layout.of(model, base.name, family.original_names)
    assert found.shapes == wanted.shapes
    assert found.names.spellings == wanted.names.spellings
    quantized = {n for n, s in parameters.items() if len(s) == 2 and _IN_BLOCK.fullmatch(n)}
    assert quantized == {f"{name}.weight" for name in block_linears(model)}
    assert json.loads(FILE.read_text()) == published()


def test_an_extracted_lora_is_the_one_that_was_baked(
    lora: Path, baked: Path, tmp_path: Path
) -> None:
    found = extract(baked, TURBO, rank=8)
    source, again = open_lora(lora), open_lora(_saved(found.changed.archive, tmp_path))
    assert again.deltas.keys() == source.deltas.keys()
    assert found.equal == 7  # the to_k of all blocks
    for name, delta in source.deltas.items():
        one, other = (torch.zeros(as_delta(delta).shape) for _ in range(2))
        as_delta(delta).add_to(one, one, 0.9)
        as_delta(again.deltas[name]).add_to(other, other, 1.0)
        assert (one - other).norm() < 0.2 * one.norm()  # weights were rounded to bfloat16
    assert 0.97 < found.explained < 1
    small = extract(baked, TURBO, rank=8, energy=0.5)
    assert max(each.rank for each in small.changed.layers) < 4
    assert 0.5 < small.explained < found.explained


def _saved(archive: Archive, folder: Path) -> Path:
    return write_archive(archive, folder / "extracted.zip")


def test_a_bake_leaves_all_or_nothing(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, output = open_lora(lora), tmp_path / "model"

    def interrupted(*given: Any) -> None:
        write_tensors(*given)
        raise KeyboardInterrupt

    modules = sys.modules[bake.__module__], sys.modules[write_tensors.__module__]

    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "write_tensors", interrupted)
        for layout, path in (("diffusers", output), ("comfyui", tmp_path / "m.safetensors")):
            with pytest.raises(KeyboardInterrupt):
                bake(opened, path, layout=layout)
        assert list(tmp_path.iterdir()) == []
        patch.setattr(atomic.shutil, "disk_usage", lambda _: type("", (), {"free": 1000})())
        with pytest.raises(OSError, match="0.01 GB are needed"):
            bake(opened, output)
    monkeypatch.setattr(modules[1], "MAX_SHARD_BYTES", 4_000_000)
    bake(opened, output)
    shards = list((output / "transformer").glob("*.safetensors"))
    assert len(shards) == 3
    headers = [8 + int.from_bytes(each.read_bytes()[:8], "little") for each in shards]
    assert [each % 64 for each in headers] == [0, 0, 0]
    with open_checkpoint(output, TURBO) as again:
        assert len(again.places) == 118
    with pytest.raises(ToolError, match="exists already"):
        bake(opened, output)
    bake(opened, output, overwrite=True)
    (output / "mine.txt").touch()
    with pytest.raises(ToolError, match="also contains mine.txt"):
        bake(opened, output, overwrite=True)


def test_a_result_takes_the_place_of_an_earlier_one_whatever_a_killed_run_left(
    tmp_path: Path,
) -> None:
    path = tmp_path / "model"
    for number in range(3):
        part = tmp_path / "model-unchecked"
        part.mkdir()
        (part / str(number)).touch()
        atomic.replace(part, path)
        assert [each.name for each in path.iterdir()] == [str(number)]
        (tmp_path / ".model.abcdefgh.part").mkdir(exist_ok=True)
    (tmp_path / "new.zip").write_bytes(b"2")
    (tmp_path / "weights.zip").write_bytes(b"1")
    atomic.replace(tmp_path / "new.zip", tmp_path / "weights.zip")
    assert (tmp_path / "weights.zip").read_bytes() == b"2"


def test_the_command_bakes_and_extracts(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["bake", f"{lora}:0.5", "-o", "model"])
    said = capsys.readouterr().out
    assert "Rounding to bf16" in said and "to generate with it: --base-model model" in said
    words = ["extract", "model", "--base", TURBO.name, "--rank", "4"]
    main([*words, "-o", "e.zip", "--chart", "e.svg"])
    assert "of the squared difference is explained" in capsys.readouterr().out
    assert (tmp_path / "e.svg").read_text().count("<svg class") == 2
    assert read_archive("e.zip").meta["extracted"]["explained_by_layer"]
    main(["inspect", "e.zip", "--chart", "norms.svg", "--json"])
    assert json.loads(capsys.readouterr().out)["base_model"] == TURBO.name
    assert read_archive("e.zip").tokens == ("<zwx>",)
    for wrong, reason in (
        (["bake", str(lora), "-o", "model"], "exists already"),
        (["bake", str(lora), "--dtype", "fp8"], "add --layout comfyui"),
        (["extract", "model", "--rank", "4"], "name the model that it was tuned from"),
        ([*words, "-o", "e2.zip", "--chart", "e.svg"], "e.svg exists already"),
        ([*words, "-o", "e2.zip", "--chart", "e2.zip"], "e2.zip: a chart is a .svg file"),
        (["inspect", "model"], "model: transformer/.* is a whole model of Z-Image"),
    ):
        with pytest.raises(SystemExit, match=reason):
            main(wrong)
