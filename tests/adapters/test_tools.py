"""The tools for LoRA files keep the change of every layer, and say what they cannot keep."""

import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from root import ROOT
from torch import Tensor

from adapters.__main__ import main
from adapters.archive import Archive, read_archive, write_archive
from adapters.archive_members import BrokenArchive
from adapters.formats import PROGRAMS, Dora, LoraMismatch, LowRank, as_delta
from adapters.formats.layout import Layout
from adapters.placeholder import Placeholder
from adapters.tools.convert import convert, write
from adapters.tools.inspection import inspect
from adapters.tools.merge import merge, with_training_adapter
from adapters.tools.opened import Opened, ToolError, open_lora
from adapters.tools.resize import Goal, resize
from families.base import LORA_STYLES
from families.loading import load_family
from families.parameters import text_width
from families.registry import BASES, FAMILIES
from inference.fetch.sources import Sources
from lab.benchmarks.format_cases import CASES, Case, Weights, low_rank
from lab.benchmarks.formats import ORIGINAL_NAMES, _weights
from lab.benchmarks.formats import _write as write_case
from lab.benchmarks.models import MODELS

FAMILY = {family.title: family for family in FAMILIES.values()}
MINIATURE = BASES["miniature"]
TURBO = BASES["miniature-turbo"]
LAYERS = {"layers.0.attention.to_q": (64, 64), "layers.1.feed_forward.w1": (170, 64)}
PLAIN = [case for case in CASES if "written nowhere" not in case.layout]


@pytest.fixture(scope="module")
def layouts() -> dict[str, tuple[Layout, Weights]]:
    found = {}
    for name, make in MODELS.items():
        model = make()
        found[name] = Layout.of(model, name, ORIGINAL_NAMES[name]), _weights(model)
    return found


def opened(path: Path, name: str, layout: Layout) -> Opened:
    """A file for one of the small models, whose shapes are no known base's."""
    archive = read_archive(path)
    base = next(base for base in FAMILY[name].bases if base.training_resolution > 64)
    deltas = layout.fit(archive.deltas, path.name)
    return Opened(path, archive, base, "", layout, deltas)


def dense(opened: Opened) -> dict[str, Tensor]:
    found = {}
    for name, delta in opened.deltas.items():
        found[name] = torch.zeros(as_delta(delta).shape)
        as_delta(delta).add_to(found[name], found[name], 1.0)
    return found


def close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> bool:
    return one.keys() == other.keys() and all(
        (one[name] - other[name]).norm() <= tolerance * one[name].norm() for name in one
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", PLAIN, ids=[case.layout for case in PLAIN])
def test_a_lora_of_any_layout_converts_to_every_layout_and_back(
    case: Case, name: str, layouts: Any, tmp_path: Path
) -> None:
    if case.only not in (None, name):
        return
    layout, weights = layouts[name]
    source = opened(write_case(case.write(weights), tmp_path), name, layout)
    if not all(isinstance(each, tuple) for each in source.deltas.values()):
        check_other_kind(source, name, layout)
        return
    for program in ("diffusers", "comfyui", "musubi"):
        file = tmp_path / program / "lora.safetensors"
        converted = convert(source, program)
        write(converted, file)
        again = opened(file, name, layout)
        assert close(dense(source), dense(again), 1e-6)  # the cases are float32
        answers = inspect(again)["read_by"]
        assert answers[PROGRAMS[program].title] == "yes"


def check_other_kind(source: Opened, name: str, layout: Layout) -> None:
    """Other kinds keep all their tensors for ComfyUI, and are refused for the rest."""
    file = source.path.parent / "comfyui" / "lora.safetensors"
    write(convert(source, "comfyui"), file)
    again = opened(file, name, layout).deltas
    assert again.keys() == source.deltas.keys()
    for layer, delta in source.deltas.items():
        start = torch.randn(delta.shape, generator=torch.Generator().manual_seed(1))
        ours, theirs = start.clone(), start.clone()
        as_delta(delta).add_to(ours, start, 1.0)
        as_delta(again[layer]).add_to(theirs, start, 1.0)
        assert (ours - theirs).norm() <= 1e-6 * start.norm()
    with pytest.raises(ToolError, match="which musubi-tuner does not read"):
        convert(source, "musubi")


@pytest.mark.parametrize("name", MODELS)
def test_a_conversion_is_exact_if_alpha_is_kept_or_a_power_of_two(
    name: str, layouts: Any, tmp_path: Path
) -> None:
    layout, weights = layouts[name]
    parts = ("lora_down.weight", "lora_up.weight")
    for alpha in (0.5, 0.75):
        file = low_rank("lora_unet_{_}", parts, alpha=alpha, alpha_tensor=True)(weights)
        for key, tensor in file.tensors.items():
            if not key.endswith(".alpha"):
                file.tensors[key] = tensor.bfloat16()
        folder = tmp_path / str(alpha)
        folder.mkdir()
        source = opened(write_case(file, folder), name, layout)
        kept, folded = convert(source, "musubi"), convert(source, "comfyui")
        assert not kept.rounded
        for key, tensor in file.tensors.items():
            assert torch.equal(kept.tensors[key].double(), tensor.double())
        assert bool(folded.rounded) == (alpha == 0.75)
        write(folded, folder / "folded.safetensors")
        back = dense(opened(folder / "folded.safetensors", name, layout))
        assert close(dense(source), back, 0.0 if alpha == 0.5 else 2**-8)


def random_lora(folder: Path, name: str, seed: int, token: str = "", rank: int = 4) -> Path:
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        layer: shape
        for layer, shape in _miniature_shapes().items()
        if layer.startswith("layers.") and ("attention.to_" in layer or ".w1" in layer)
    }
    factors = {
        layer: (
            torch.randn(rank, columns, generator=draw) / 8,
            torch.randn(rows, rank, generator=draw) / 8,
        )
        for layer, (rows, columns) in shapes.items()
    }
    placeholders = (Placeholder(token, torch.randn(1, 128, generator=draw)),) if token else ()
    meta: dict[str, Any] = {"base_model": MINIATURE.hub_id}
    if token:
        meta["placeholder_token"] = token
    return write_archive(Archive(factors, placeholders, meta), folder / name)


def _miniature_shapes() -> dict[str, tuple[int, int]]:
    from adapters.tools.opened import layout_of

    return {name: s for name, s in layout_of(MINIATURE).shapes.items() if len(s) == 2}


def test_a_merge_is_the_sum_and_keeps_all_tokens(tmp_path: Path) -> None:
    cat = open_lora(random_lora(tmp_path, "cat.zip", 1, "<cat>"))
    dog = open_lora(random_lora(tmp_path, "dog.zip", 2, "<dog>", rank=2))
    wanted = {name: 0.75 * change + 0.5 * dense(dog)[name] for name, change in dense(cat).items()}
    merged = merge([(cat, 0.75), (dog, 0.5)])
    assert {each.rank for each in merged.layers} == {6}
    file = write_archive(merged.archive, tmp_path / "both.zip")
    both = open_lora(file)
    assert both.archive.tokens == ("<cat>", "<dog>")
    assert close(wanted, dense(both), 2**-8)

    small = merge([(cat, 0.75), (dog, 0.5)], rank=3)
    best = {}
    for each in small.layers:
        values = torch.linalg.svdvals(wanted[each.layer])
        best[each.layer] = float(values[3:].norm() / values.norm())
        assert each.error == pytest.approx(best[each.layer], abs=0.01)

    other_cat = open_lora(random_lora(tmp_path, "cat2.zip", 3, "<cat>"))
    with pytest.raises(ToolError, match="both have the token <cat>"):
        merge([(cat, 1.0), (other_cat, 1.0)])


def test_a_resize_has_the_least_error_that_its_ranks_allow(tmp_path: Path) -> None:
    source = open_lora(random_lora(tmp_path, "lora.zip", 1, "<cat>", rank=8))
    for each in resize(source, Goal(rank=3)).layers:
        values = torch.linalg.svdvals(dense(source)[each.layer])
        assert each.rank == 3
        assert each.error == pytest.approx(float(values[3:].norm() / values.norm()), abs=0.01)
    for each in resize(source, Goal(energy=0.9)).layers:
        values = torch.linalg.svdvals(dense(source)[each.layer]) ** 2
        assert values[: each.rank].sum() >= 0.9 * values.sum()
        assert values[: each.rank - 1].sum() < 0.9 * values.sum()
    whole = source.path.stat().st_size
    limit = 0.6 * whole / 1e6
    result = resize(source, Goal(megabytes=limit))
    assert sum(_bytes(source, each.layer, each.rank) for each in result.layers) <= limit * 1e6
    assert result.archive.tokens == ("<cat>",)
    with pytest.raises(ToolError, match="rank 1 in every layer takes"):
        resize(source, Goal(megabytes=0.0001))


def _bytes(source: Opened, layer: str, rank: int) -> int:
    rows, columns = source.layout.shapes[layer]
    return 2 * rank * (rows + columns)


def test_a_training_adapter_is_added_and_taken_away_again(tmp_path: Path) -> None:
    source = open_lora(random_lora(tmp_path, "lora.zip", 1, "<cat>"), TURBO.name)
    added = with_training_adapter(source, 1.0)
    applied = open_lora(write_archive(added.archive, tmp_path / "applied.zip"))
    assert applied.base == TURBO
    assert not close(dense(source), {n: dense(applied)[n] for n in source.deltas}, 0.01)
    removed = with_training_adapter(applied, -1.0)
    back = open_lora(write_archive(removed.archive, tmp_path / "back.zip"))
    for name, change in dense(back).items():
        wanted = dense(source).get(name, torch.zeros_like(change))
        assert (change - wanted).norm() <= 2**-7 * dense(applied)[name].norm()
    with pytest.raises(ToolError, match="miniature has no training adapter"):
        with_training_adapter(open_lora(tmp_path / "lora.zip"), 1.0)


def test_the_command_inspects_converts_and_never_replaces_a_file_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    lora = str(random_lora(tmp_path, "lora.zip", 1, "<cat>"))
    main(["inspect", lora, "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["base_model"] == "miniature" and facts["ranks"] == {"4": facts["layers"]}
    assert facts["tokens"][0]["token"] == "<cat>" and facts["read_by"]["ComfyUI"] == "yes"
    with zipfile.ZipFile(lora) as archive:
        archive.extractall("folder")
        used = sum(each.file_size for each in archive.infolist() if "safetensors" in each.filename)
    Path("folder/not/read").mkdir(parents=True)
    Path("folder/not/read/other.safetensors").write_bytes(bytes(1000))
    main(["inspect", "folder", "--json"])
    assert json.loads(capsys.readouterr().out)["bytes"] == used

    main(["convert", lora, "--to", "comfyui"])
    assert "embedding:cat," in capsys.readouterr().out
    assert (tmp_path / "cat.safetensors").is_file()
    with pytest.raises(SystemExit, match="exists already"):
        main(["convert", lora, "--to", "comfyui"])
    main(["merge", f"{lora}:0.5", f"{lora}:0.5", "-o", "half.zip"])
    assert "rank 8" in capsys.readouterr().out
    whole, half = (dense(open_lora(Path(each))) for each in (lora, "half.zip"))
    assert close(whole, half, 2**-8)
    for scale in ("x", "nan", "1e39"):
        with pytest.raises(SystemExit, match=f"'{scale}' is not a number between -1000 and 1000"):
            main(["merge", f"{lora}:{scale}"])


def test_files_for_comfyui_are_read_with_their_token_from_a_folder_and_a_zip(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_lora(random_lora(tmp_path, "lora.zip", 1, "<cat>"))
    folder = tmp_path / "comfyui"
    write(convert(source, "comfyui"), folder / "lora.safetensors")
    zipped = shutil.make_archive(str(folder), "zip", folder)
    for path in (folder, Path(zipped)):
        again = open_lora(path)
        assert again.base == source.base and again.archive.tokens == ("<cat>",)
        vectors = again.archive.placeholders[0].vectors, source.archive.placeholders[0].vectors
        assert torch.equal(*vectors)
        assert close(dense(source), dense(again), 2**-8)
    assert Sources().file(str(folder)) == folder
    (folder / "cat.safetensors").rename(folder / "dog.safetensors")
    assert not open_lora(folder).archive.tokens
    assert "dog.safetensors is not used" in caplog.text
    shutil.copy(folder / "lora.safetensors", folder / "other.safetensors")
    with pytest.raises(BrokenArchive, match="lora.safetensors, other.safetensors; give one of"):
        open_lora(folder)


def test_a_token_of_another_model_is_refused_with_both_widths(tmp_path: Path) -> None:
    narrow = Placeholder("<cat>", torch.zeros(1, 96))
    source = read_archive(random_lora(tmp_path, "lora.zip", 1))
    write_archive(replace(source, placeholders=(narrow,)), tmp_path / "narrow.zip")
    with pytest.raises(LoraMismatch, match="of <cat> has 96 values, .* miniature has 128"):
        open_lora(tmp_path / "narrow.zip")
    for base in (each for each in BASES.values() if each.included):
        embedding = load_family(base).text_encoder.get_input_embeddings()
        assert text_width(base) == embedding.embedding_dim, base.name


def test_the_advice_for_a_dora_makes_a_plain_lora(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = read_archive(random_lora(tmp_path, "plain.zip", 1))
    doras = {
        name: Dora(LowRank(*pair), torch.ones(len(pair[1]), 1))
        for name, pair in plain.factors.items()
    }
    write_archive(replace(plain, deltas=doras), tmp_path / "dora.zip")
    for tool in (
        ["merge", "plain.zip", "dora.zip"],
        ["resize", "dora.zip", "--rank", "2"],
        ["convert", "dora.zip", "--to", "musubi"],
    ):
        with pytest.raises(SystemExit) as refused:
            main(tool)
    for command in re.findall("`(.*?)`", str(refused.value)):
        main(command.split())
    main(["merge", "plain.zip", "baked-extracted.zip", "-o", "both.zip"])
    assert open_lora(Path("both.zip")).deltas.keys() == plain.deltas.keys()


def test_a_place_where_nothing_can_be_written_is_named_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder.zip").mkdir()
    places = "file/x.zip", "folder.zip"
    wanted = "file/x[^ ]* cannot be written, since file is not a folder", "folder.zip is a folder"
    for tool in ("merge", "resize --rank 1", "apply-turbo", "extract --rank 1"):
        for place, reason in zip(places, wanted, strict=True):
            with pytest.raises(SystemExit, match=reason):
                main([*tool.split(), "missing", "-o", place])
    for words in (
        "bake missing -o file/x",
        "bake missing --layout comfyui -o file/x.safetensors",
        "convert missing --to comfyui -o file/x.safetensors",
        "inspect missing --chart file/x.svg",
    ):
        with pytest.raises(SystemExit, match=wanted[0]):
            main(words.split())
    random_lora(tmp_path, "lora.zip", 1, "<cat>")
    for tool in ("convert --to comfyui", "bake --layout comfyui"):
        with pytest.raises(SystemExit, match="is also the file of a token's embedding"):
            main([*tool.split(), "lora.zip", "-o", "cat.safetensors"])


def test_a_lora_of_another_model_is_refused_with_the_layers_that_do_not_fit(
    tmp_path: Path,
) -> None:
    odd = Archive({"layers.0.attention.to_q": (torch.ones(2, 40), torch.ones(40, 2))}, (), {})
    with pytest.raises(LoraMismatch, match="fits no known base model.*LoRA 40x40"):
        open_lora(write_archive(odd, tmp_path / "odd.zip"))


def test_the_document_says_what_the_families_say() -> None:
    """docs/adapters.md: for each program and style, the base models whose LoRAs it reads."""
    letters = {"Z-Image": "Z", "Qwen-Image": "Q", "Qwen-Image-2.1": "2"}
    lines = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    documented = {}
    for row in rows:
        for name in row[-1].replace("`", "").split(", ") if len(row) == 6 else ():
            documented[name] = [set(cell.split()) for cell in row[1:5]]
    known = [(letters[title], family.lora_readers) for title, family in FAMILY.items()]
    found = {
        name: [
            {
                letter
                for letter, readers in known
                if name in readers and style in readers[name].reads
            }
            for style in LORA_STYLES
        ]
        for name in PROGRAMS
    }
    assert {name: row for name, row in documented.items() if name in PROGRAMS} == found
