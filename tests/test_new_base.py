"""A new base model is one file. `made_up_base.py` is one; nothing else knows of it."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import made_up_base
import pytest
import torch
from made_up_base import MADE_UP, MadeUp
from PIL import Image
from root import ROOT
from safetensors.torch import save_file

from adapters.archive import Archive, read_archive
from families.few_steps import find_few_step_lora
from families.registry import BASES, FAMILIES, UnknownBase, find_base, find_base_or_folder, register
from families.without_weights import transformer_without_weights
from inference.engine import Engine
from inference.request import Request
from trainer.memory import describe_plan
from trainer.result.model_card import model_card
from trainer.run import train_and_check
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs
from trainer.settings.jobs import ai_toolkit
from trainer.settings.jobs.translation import translate

REQUEST = Request(
    **{"prompt": "a <zwx> on a table", "width": 32, "height": 32, "seed": 7},
    **{"num_inference_steps": 2, "guidance_scale": 2.0},
)


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    """The made-up base is known as the others are."""
    register(MadeUp)
    yield
    del FAMILIES[MadeUp.name], BASES[MADE_UP.name]


@pytest.fixture(scope="module")
def vault(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `$MODEL_VAULT` with a small one."""
    folder = tmp_path_factory.mktemp("vault")
    made_up_base.write(folder / MADE_UP.hub_id)
    return folder


@pytest.fixture(scope="module")
def trained(
    vault: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Archive]]:
    """The folder and the weights of a training run with previews."""
    output = tmp_path_factory.mktemp("run") / "out"
    sampled = {name: getattr(REQUEST, name) for name in ("width", "height", "num_inference_steps")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        inputs = TrainingInputs(
            dataset=photos,
            base_model="made-up",
            rank=2,
            steps=2,
            seed=7,
            sample_prompts=(REQUEST.prompt,),
            sample_options=sampled | {"seed": 7},
            output_dir=output,
        )
        result = train_and_check(resolve(inputs))
    yield output, read_archive(result.weights)


@pytest.fixture
def engine(vault: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("MODEL_VAULT", str(vault))
    return Engine(torch.device("cpu"), torch.float32)


def test_it_trains_and_its_previews_are_the_generated_images(
    trained: tuple[Path, Archive], engine: Engine
) -> None:
    output, weights = trained
    assert weights.meta["base_family"] == "made_up" and weights.meta["steps"] == 2
    assert set(weights.factors) == set(engine._load(MADE_UP).lora_targets())
    assert all(up.any() for _, up in weights.factors.values())  # every layer has learned
    with Image.open(output / "samples" / "step-000002" / "00.png") as preview:
        generated = engine.generate(REQUEST, weights)[0]
        assert generated.tobytes() == preview.convert("RGB").tobytes()
    assert generated.tobytes() != engine.generate(REQUEST, None, "made-up")[0].tobytes()


def test_a_lora_with_the_layer_names_of_its_first_release_is_converted(
    trained: tuple[Path, Archive], engine: Engine, tmp_path: Path
) -> None:
    _, weights = trained
    tensors = {}
    for name, (down, up) in weights.factors.items():
        name = name.replace("attention.to_out.0", "attention.out")
        tensors[f"diffusion_model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"diffusion_model.{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, tmp_path / "lora.safetensors")
    found = engine.read(tmp_path / "lora.safetensors")
    asked = REQUEST.prompt.replace("<zwx>", "cup")
    plain = Request(prompt=asked, width=32, height=32, seed=7, num_inference_steps=2)
    without_token = Archive(weights.factors, (), weights.meta)
    images = [engine.generate(plain, each, "made-up")[0] for each in (found, without_token)]
    assert images[0].tobytes() == images[1].tobytes()
    assert find_few_step_lora(["Made-Up-Fast.safetensors"]).family == "made_up"  # type: ignore[union-attr]


def test_it_is_planned_by_its_published_sizes_before_it_is_downloaded(
    registered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    settings = resolve(TrainingInputs(dataset="imgs.zip", base_model="made-up", seed=1))
    text = describe_plan(settings)
    assert text.startswith("made-up (nobody/Made-Up), with <zwx>")
    count = sum(each.numel() for each in transformer_without_weights(MADE_UP).parameters())
    assert count > 4 * MadeUp.published["transformer"]["dim"] ** 2


def test_its_model_card_calls_its_pipeline(trained: tuple[Path, Archive]) -> None:
    card = model_card("me/fox", trained[1].meta, [])
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "the card", "exec")
    assert "MadeUpPipeline.from_pretrained('nobody/Made-Up'" in code
    assert "cfg=2," in code and "negative_prompt_embeds=encode('nothing')" in code


def test_a_job_file_of_ai_toolkit_may_name_it(registered: None) -> None:
    process = {
        "type": "sd_trainer",
        "model": {"arch": "made_up", "name_or_path": "nobody/Made-Up"},
        "datasets": [{"folder_path": "images"}],
        "network": {"type": "lora", "linear": 4, "linear_alpha": 4},
    }
    job = {"job": "extension", "config": {"name": "x", "process": [process]}}
    found = translate(ai_toolkit.PROGRAM, job, Path("job.yaml"))
    assert found.settings["base_model"] == "made-up"


def test_a_folder_with_its_pipeline_gets_its_settings(vault: Path) -> None:
    folder = vault / MADE_UP.hub_id
    assert find_base_or_folder(str(folder)).folder == folder
    with pytest.raises(UnknownBase, match="did you mean 'made-up'"):
        find_base("made-upp")


def test_its_file_is_found_in_the_folder_and_read_without_pytorch(tmp_path: Path) -> None:
    shutil.copy(made_up_base.__file__, tmp_path / "made_up.py")
    program = (
        f"import sys, families.models; families.models.__path__.append({str(tmp_path)!r})\n"
        "from families.registry import find_base, family_of\n"
        "print(family_of(find_base('made-up')).__module__, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["families.models.made_up", "False"], done.stderr


def test_a_name_can_be_taken_only_once(registered: None) -> None:
    with pytest.raises(ValueError, match=r"MadeUp: .*names that are taken: \['made-up'\]"):
        register(MadeUp)


# The entry points' lists are literals, since Cog reads the source without running it.


def lacking(entry_point: str) -> list[str]:
    """The lines to change, for base models that the entry point's list lacks."""
    for node in ast.parse((ROOT / entry_point).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BASE_MODELS":
            listed = ast.literal_eval(node.value)
            return [
                f'{entry_point}:{node.end_lineno}: add "{name}" to BASE_MODELS'
                for name in BASES
                if name not in listed
            ]
    return [f"{entry_point} has no list BASE_MODELS"]


@pytest.mark.parametrize("entry_point", ["train.py", "predict.py"])
def test_the_line_to_change_for_a_new_base_model_is_named(
    entry_point: str, registered: None
) -> None:
    [line] = lacking(entry_point)
    assert re.fullmatch(rf'{entry_point}:\d+: add "made-up" to BASE_MODELS', line)
