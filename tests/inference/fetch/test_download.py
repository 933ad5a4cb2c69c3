"""Models come from `$MODEL_VAULT`, a folder or the Hub's cache by the same code, whole or not."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vault import models

from families.captioners import ON_CPU
from families.download import fetch, hub_ids
from families.loading import load_family
from families.registry import BASES, UnknownBase, find_base, find_base_or_folder
from families.repository import MissingModel, component_folder, transformer_source

TURBO, DE_TURBO = BASES["z-image-turbo"], BASES["z-image-de-turbo"]


@pytest.fixture
def own_vault(tmp_path: Path, vault: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A vault with Turbo and Qwen-Image, every file a link, to be taken apart."""
    folder = tmp_path / "vault"
    for name in (models.Z_IMAGE_TURBO, models.QWEN_IMAGE):
        shutil.copytree(vault / name, folder / name, copy_function=os.link)
    monkeypatch.setenv("MODEL_VAULT", str(folder))
    return folder


def rewrite(file: Path, text: str) -> None:
    """In place of a link, so that the original stays as it is."""
    file.unlink()
    file.write_text(text)


def weights(base: str) -> dict[str, torch.Tensor]:
    return load_family(find_base(base), torch.device("cpu"), torch.float32).transformer.state_dict()


# Where a model is looked for.


def test_the_vault_comes_before_the_hub(own_vault: Path) -> None:
    for component in ("vae", "text_encoder", "tokenizer", "scheduler"):
        assert component_folder(TURBO, component) == own_vault / TURBO.hub_id / component
    assert transformer_source(TURBO) == own_vault / TURBO.hub_id / "transformer"


def test_a_vault_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_VAULT", "/nowhere/models")
    with pytest.raises(MissingModel, match="MODEL_VAULT=/nowhere/models is not a folder"):
        load_family(TURBO)


@pytest.mark.parametrize(
    ("missing", "named"),
    [
        ("vae", "Turbo has no folder 'vae'"),
        ("vae/config.json", "vae lacks config.json"),
        ("scheduler/scheduler_config.json", "scheduler lacks scheduler_config.json"),
        ("tokenizer/tokenizer_config.json", "tokenizer lacks tokenizer_config.json"),
        ("text_encoder/model.safetensors", r"text_encoder lacks \*.safetensors"),
        (
            "transformer/diffusion_pytorch_model-00002-of-00004.safetensors",
            "transformer lacks diffusion_pytorch_model-00002-of-00004.safetensors",
        ),
        ("transformer", "expected a folder 'transformer' or one .safetensors file, found none"),
    ],
)
def test_a_repository_that_is_not_whole_is_refused_by_the_missing_part(
    missing: str, named: str, own_vault: Path
) -> None:
    gone = own_vault / TURBO.hub_id / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    with pytest.raises(MissingModel, match=named) as caught:
        family = load_family(TURBO)
        _ = family.prompts, family.text_encoder
    assert str(own_vault / TURBO.hub_id) in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_weight_that_the_files_lack_is_refused_by_name(part: str, own_vault: Path) -> None:
    (file,) = (own_vault / models.QWEN_IMAGE / part).glob("*.safetensors")
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    name = next(key for key in sorted(tensors) if "norm" in key and "visual" not in key)
    del tensors[name]
    file.unlink()
    save_file(tensors, file, metadata)
    family = load_family(BASES["qwen-image"])
    last = re.escape(".".join(name.split(".")[-3:]))  # libraries may rename what is in front
    with pytest.raises(MissingModel, match=rf"{part}: 1 weights of .*{last}\)"):
        getattr(family, part)


def test_a_local_folder_is_a_base_model(vault: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    folder = vault / models.Z_IMAGE_TURBO
    base = find_base_or_folder(str(folder))
    assert (base.inference_steps, base.distilled) == (8, True)  # known by its folder's name
    found = load_family(base, torch.device("cpu"), torch.float32).transformer.state_dict()
    monkeypatch.setenv("MODEL_VAULT", str(vault))
    published = weights("z-image-turbo")
    assert all(torch.equal(found[name], published[name]) for name in published)


def test_a_folder_of_another_name_has_its_familys_settings(own_vault: Path) -> None:
    folder = (own_vault / models.Z_IMAGE_TURBO).rename(own_vault / "my-finetune")
    base = find_base_or_folder(str(folder))
    assert (base.family, base.inference_steps, base.distilled) == ("z_image", 50, False)
    assert component_folder(base, "vae") == folder / "vae"
    index = folder / "model_index.json"
    rewrite(index, json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UnknownBase, match="pipeline 'FluxPipeline' is not one of"):
        find_base_or_folder(str(folder))
    index.unlink()
    with pytest.raises(UnknownBase, match="nor a folder with a model_index.json"):
        find_base_or_folder(str(folder))


def test_a_base_that_is_a_folder_is_known_to_others_by_its_name_alone(
    own_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written into weights and images does not say where the folder is."""
    folder = (own_vault / models.Z_IMAGE_TURBO).rename(own_vault / "my-finetune")
    base = find_base_or_folder(str(folder))
    assert (base.name, base.hub_id) == ("my-finetune", "my-finetune")
    monkeypatch.chdir(own_vault)
    assert find_base_or_folder("my-finetune") == find_base_or_folder("./my-finetune/") == base


def test_a_name_from_a_file_is_never_a_folder(
    own_vault: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_vault / models.Z_IMAGE_TURBO
    monkeypatch.chdir(own_vault)
    said = []
    for name in (str(folder), models.Z_IMAGE_TURBO + "/", "./Tongyi-MAI/Z-Image-Turbo", "/none"):
        with pytest.raises(UnknownBase) as refused:
            find_base(name)
        said.append(re.sub("'.*?'", "NAME", str(refused.value), count=1).partition("; did")[0])
    assert set(said) == {f"base_model NAME is not one of {', '.join(BASES)}"}


ODD = ["~nobody/x", "a" * 5000, "a/" * 5000, "\0", "", ".", "/", "\udcff", "\x1b[31m", "~", "a\nb"]


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.parametrize("find", [find_base, find_base_or_folder])
def test_an_odd_name_is_an_unknown_base_and_one_line(
    find: Callable[[str], object], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownBase, match="^base_model ") as refused:
        find(name)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 99999, "is not JSON"),
        (b"[]", "pipeline 'NoneType' is not one of"),
        (b"null", "is not one of"),
        (b'{"_class_name": ["ZImagePipeline"]}', "pipeline 'list' is not one of"),
        (b'{"_class_name": {}}', "is not one of"),
        (b'{"_class_name": "\\u001b[31m"}', "is not one of"),
        (b"{}" + b" " * (2 << 20) + b"x", "pipeline 'NoneType' is not one of"),
    ],
    ids=lambda value: ascii(value[:40]),
)
def test_a_broken_model_index_is_an_unknown_base(index: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_bytes(index)
    with pytest.raises(UnknownBase, match=reason) as refused:
        find_base_or_folder(str(tmp_path))
    assert str(refused.value).isprintable()


# The forms a model may come in.


def test_de_turbo_is_the_same_as_a_folder_and_as_one_file(vault: Path, own_vault: Path) -> None:
    repository = own_vault / DE_TURBO.hub_id
    shutil.copytree(vault / DE_TURBO.hub_id, repository)
    as_folder = weights("z-image-de-turbo")
    shutil.rmtree(repository)
    file = models.write_de_turbo_single_file(repository, dtype=torch.float32)
    assert transformer_source(DE_TURBO) == file
    as_file = weights("z-image-de-turbo")
    assert as_file.keys() == as_folder.keys()
    assert all(torch.equal(as_file[name], as_folder[name]) for name in as_folder)
    # The rest is Turbo's.
    assert component_folder(DE_TURBO, "vae") == own_vault / TURBO.hub_id / "vae"
    # Two files leave a doubt.
    shutil.copy(file, repository / "another.safetensors")
    with pytest.raises(MissingModel, match="found another.safetensors, z_image_de_turbo"):
        load_family(DE_TURBO)


def test_a_weight_that_the_one_file_lacks_is_refused_by_name(own_vault: Path) -> None:
    file = models.write_de_turbo_single_file(own_vault / DE_TURBO.hub_id, dtype=torch.float32)
    tensors = load_file(file)
    del tensors["layers.1.feed_forward.w2.weight"]
    save_file(tensors, file)
    with pytest.raises(MissingModel, match=r"layers\.1\.feed_forward\.w2\.weight"):
        _ = load_family(DE_TURBO).transformer


@pytest.mark.parametrize(
    "write",
    [models.write_qwen_text_encoder_old_layout, models.write_qwen_text_encoder_new_layout],
)
@torch.no_grad()
def test_qwen_images_text_encoder_is_the_same_in_both_layouts(write, own_vault: Path) -> None:
    family = load_family(BASES["qwen-image"], torch.device("cpu"), torch.float32)
    (wanted,) = family.encode_prompts(["a photo of a cat"])
    folder = own_vault / models.QWEN_IMAGE / "text_encoder"
    shutil.rmtree(folder)
    write(folder)
    family.release("text_encoder")
    (found,) = family.encode_prompts(["a photo of a cat"])
    assert torch.equal(found, wanted)


# The Hub, which cannot be here: its cache can.


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, as in a fresh `$HF_HOME`, without a vault or network."""
    folder = tmp_path / "huggingface" / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    return folder


def publish(repository: Path, hub_id: str, cache: Path, parts: tuple[str, ...] = ()) -> None:
    """Puts a repository, or some folders of it, into the cache as a download would have."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    for number, file in enumerate(sorted(repository.rglob("*"))):
        inside = file.relative_to(repository)
        if file.is_file() and (not parts or inside.parts[0] in parts):
            blob, name = folder / "blobs" / str(number), folder / "snapshots" / revision / inside
            blob.parent.mkdir(parents=True, exist_ok=True)
            name.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, blob)
            name.symlink_to(blob)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


def test_the_hubs_cache_is_read_offline_by_the_same_code(
    vault: Path, hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(vault / TURBO.hub_id, TURBO.hub_id, hub_cache)
    single = tmp_path / "de-turbo"
    models.write_de_turbo_single_file(single, dtype=torch.float32)
    publish(single, DE_TURBO.hub_id, hub_cache)
    found = {name: weights(name) for name in ("z-image-turbo", "z-image-de-turbo")}
    assert load_family(DE_TURBO).prompts.known == 151669
    monkeypatch.setenv("MODEL_VAULT", str(vault))
    for name, state in found.items():
        wanted = weights(name)
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_what_the_hubs_cache_lacks_is_named(vault: Path, hub_cache: Path) -> None:
    publish(vault / models.Z_IMAGE, models.Z_IMAGE, hub_cache, ("transformer", "scheduler"))
    with pytest.raises(MissingModel, match="models--Tongyi-MAI--Z-Image/.* has no folder 'vae'"):
        load_family(BASES["z-image"])
    with pytest.raises(MissingModel) as caught:
        load_family(BASES["qwen-image"])
    assert str(caught.value).startswith(
        "Qwen/Qwen-Image (vae/*): could not be downloaded from the Hub (LocalEntryNotFoundError: "
    )


def test_an_unreachable_hub_says_what_was_looked_for_and_where(
    hub_cache: Path, own_vault: Path
) -> None:
    with pytest.raises(MissingModel) as caught:
        load_family(BASES["qwen-image-2512"])
    for part in ("Qwen/Qwen-Image-2512", "vae/*", f"not in MODEL_VAULT={own_vault}", "HF_TOKEN"):
        assert part in str(caught.value)


# Filling the vault.


def test_a_base_is_fetched_with_all_that_it_needs_once() -> None:
    (adapter,) = {each.hub_id for each in TURBO.training_adapters.values()}
    assert hub_ids(["z-image-de-turbo"]) == [DE_TURBO.hub_id, TURBO.hub_id]
    assert hub_ids(["z-image-turbo", "z-image-de-turbo"]) == [
        TURBO.hub_id,
        adapter,
        DE_TURBO.hub_id,
    ]
    assert hub_ids(["Qwen/Qwen-Image", "qwen-image"]) == ["Qwen/Qwen-Image"]
    assert hub_ids(["miniature", "miniature-turbo"]) == []
    with pytest.raises(UnknownBase, match="did you mean 'qwen-image'"):
        hub_ids(["qwen-imge"])


def test_fetching_takes_what_is_read_and_no_more(
    vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is played by a function that copies what the patterns select."""
    from huggingface_hub.utils import filter_repo_objects

    source = tmp_path / "hub"
    shutil.copytree(vault / models.Z_IMAGE_TURBO, source, copy_function=os.link)
    (source / "assets").mkdir()
    (source / "assets" / "showcase.png").write_bytes(b"large")
    (source / "README.md").write_text("a card")

    revisions = []

    def snapshot_download(
        hub_id: str, revision: str | None, local_dir: Path, allow_patterns: list[str]
    ) -> None:
        revisions.append(revision)
        files = [str(f.relative_to(source)) for f in source.rglob("*") if f.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(source / name, local_dir / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    shelf = tmp_path / "shelf"
    folder = fetch(TURBO.hub_id, shelf)
    assert folder == shelf / TURBO.hub_id
    names = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert "model_index.json" in names and "vae/config.json" in names
    assert not any(name.endswith((".png", ".md")) for name in names)
    monkeypatch.setenv("MODEL_VAULT", str(shelf))
    assert load_family(find_base_or_folder(str(folder))).prompts.known == 151669

    source = models.write_qwen3_vl(tmp_path)  # writes captions: a pinned commit
    (source / "video.mp4").write_bytes(b"large")
    (hub_id,) = hub_ids([ON_CPU.name])
    folder = fetch(hub_id, shelf)
    assert revisions == [None, ON_CPU.revision]
    assert ON_CPU.model_folder() == ON_CPU.tokenizer_folder() == folder
    names = {each.name for each in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "video.mp4" not in names


def test_fetching_without_a_network_fails_even_where_a_part_is_there(own_vault: Path) -> None:
    with pytest.raises(MissingModel, match="Tongyi-MAI/Z-Image could not be downloaded"):
        fetch("Tongyi-MAI/Z-Image", own_vault)
    shutil.rmtree(own_vault / TURBO.hub_id / "vae")
    with pytest.raises(MissingModel, match="has no folder 'vae'"):
        fetch(TURBO.hub_id, own_vault)
