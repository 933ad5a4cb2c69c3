"""What compiled blocks keep: counted by the compiler's own partitioner, and planned."""

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from measured import of_depth
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from adapters.lora import Lora
from families.family import Family
from families.recomputation import recompute
from families.registry import find_base
from families.without_weights import family_without_weights
from inference.acceleration import compile_blocks
from trainer.learning import flow_loss
from trainer.memory import fitting
from trainer.memory.meter import Meter, fused_attention
from trainer.memory.plan import LADDER, Figures, Mode, Wishes, choose, leaner
from trainer.memory.shapes import Shape, embeddings
from trainer.memory.step_cost import Load, PreservationLoad, step_loads
from trainer.settings.fields import resolve
from trainer.settings.inputs import TrainingInputs

GB = 10**9


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models of the published sizes."""
    monkeypatch.delenv("MODEL_VAULT", raising=False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Partitioner:
    """A compiler backend without code generation: it decides what is kept, as Inductor does."""

    def __init__(self) -> None:
        self.kept: list[int] = []  # bytes of each graph that a forward pass leaves
        plain = lambda graph, inputs: make_boxed_func(graph)  # noqa: E731
        self.backend = aot_autograd(fw_compiler=plain, bw_compiler=plain, partition_fn=self._split)

    def _split(self, joint: Any, inputs: Any, **options: Any) -> Any:
        options.pop("compiler", None)
        forward, backward = min_cut_rematerialization_partition(
            joint, inputs, compiler="inductor", **options
        )
        (output,) = forward.graph.find_nodes(op="output")
        # Inputs are weights, or another block's output. Views share memory with nothing else here.
        nodes = {node for node in output.args[0] if node.op != "placeholder"}
        values = [node.meta.get("val") for node in nodes]
        self.kept.append(sum(_bytes(each) for each in values if isinstance(each, Tensor)))
        return forward, backward


def _bytes(value: Tensor) -> int:
    """Of a tensor whose sizes may be symbols, at the sizes with which it was traced."""
    sizes = (each if isinstance(each, int) else each.node.hint for each in value.shape)
    return math.prod(sizes) * value.element_size()


def second_block(family: Family) -> nn.Module:
    """Leaves two blocks of the trunk; the input of the first one needs no gradient."""
    blocks = family.transformer.get_submodule(family.trunk)[:2]
    setattr(family.transformer, family.trunk, blocks)
    return blocks[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("name", ["z-image", "qwen-image", "qwen-image-2.1"])
def test_a_compiled_block_keeps_the_familys_share(name: str, rank: int, published: None) -> None:
    family = family_without_weights(find_base(name))
    block = second_block(family)
    inside = {each for each, _ in family.transformer.named_modules()}
    Lora(family.transformer, [n for n in family.lora_targets() if n in inside], rank, 0)
    latents = torch.zeros(1, family.latent_channels, *family.latent_size(1024, 1024), device="meta")
    text = list(embeddings(family, 1, 64).unbind())

    def forward() -> Tensor:
        return flow_loss(family, latents, latents, torch.full((1,), 0.5, device="meta"), text)

    plain = []
    known = [*family.transformer.parameters(), latents, *text]
    forward()  # makes cached tables
    with fused_attention(), Meter(known) as meter:
        hooks = [
            block.register_forward_pre_hook(lambda *_: plain.append(meter.live)),
            block.register_forward_hook(lambda *_: plain.append(meter.live)),
        ]
        forward()
    for each in hooks:
        each.remove()
    partitioner = Partitioner()
    block.compile(backend=partitioner.backend, dynamic=False)
    with fused_attention():
        forward()
    assert partitioner.kept[0] / (plain[1] - plain[0]) == pytest.approx(
        family.compiled_share, abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["z-image", "qwen-image", "qwen-image-2.1"])
def test_compiled_blocks_that_are_recomputed_share_the_graphs_and_save_what_is_planned(
    name: str, published: None
) -> None:
    """A model of four blocks of the published size, none to all of them recomputed."""
    text_tokens, rows = 64, 64 * 64  # of 1024 x 1024 pixels
    shape = Shape(16, 1, 1024, 1024, text_tokens)
    family = of_depth(family_without_weights(find_base(name)), 4)
    planned = step_loads(family, family.lora_targets(), shape)
    Lora(family.transformer, family.lora_targets(), shape.rank, 0)
    partitioner = Partitioner()
    compile_blocks(family.transformer, backend=partitioner.backend)
    latents = torch.zeros(1, family.latent_channels, *family.latent_size(1024, 1024), device="meta")
    text = list(embeddings(family, 1, text_tokens).unbind())
    graphs = []
    for recomputed in range(5):
        recompute(family, recomputed / 4)
        with fused_attention():
            flow_loss(family, latents, latents, torch.full((1,), 0.5, device="meta"), text)
        graphs.append(len(partitioner.kept))
    assert graphs == [graphs[0]] * 5  # nothing is compiled again
    # A recomputed block keeps its input alone.
    width = family.transformer.get_submodule(family.lora_targets()[0]).in_features
    input_bytes = 2 * (rows + text_tokens) * width
    less = planned[1].held(True) - planned[2].held(True)
    assert any(each - input_bytes == pytest.approx(less, rel=0.02) for each in partitioner.kept)


def test_a_compiled_step_is_planned_with_less_by_what_its_blocks_do_not_keep(
    published: None,
) -> None:
    """On one H100, kept: 46.6 GB plain, 31.5 GB compiled (rank 16, 64 text tokens)."""
    family = family_without_weights(find_base("z-image-turbo"))
    loads = step_loads(family, family.lora_targets(), Shape(16, 1, 1024, 1024, 64))
    plain, compiled = (loads[0].held(each) for each in (False, True))
    assert plain - compiled == pytest.approx(15.1 * GB, rel=0.02)
    assert loads[-1].held(True) == loads[-1].held(False)


# What the plan does with it.


def counts(**changes: Any) -> Figures:
    sizes = dict.fromkeys(
        ("block_weights", "text_block_weights", "lora_values", "lora_modules", "other_weights"), GB
    )
    steps = (Load(30 * GB, 1, 15 * GB), Load(2 * GB, 1))
    values: dict[str, Any] = sizes | {
        "text_other_weights": 0,
        "vae_weights": 0,
        "bytes_per_value": 2,
        "optimizer": "adamw",
        "ema": False,
        "accumulates": False,
        "placeholder": False,
        "steps": steps,
        "placeholder_pass": Load(0, 0),
        "image": Load(0, 0),
        "caption": Load(0, 0),
        "compiled": True,
    }
    return Figures(**(values | changes))


def test_only_blocks_that_are_compiled_keep_less() -> None:
    compiled, plain = counts(), counts(compiled=False)
    for mode in LADDER:
        saved = 15 * GB if not (mode.checkpointing or mode.offload) else 0
        assert plain.peak(mode) - compiled.peak(mode) == saved
    rows = PreservationLoad(compiled.steps, 1.0, 0)
    rows_kept = counts(preservation=rows).parts(Mode())["activations"]
    assert rows_kept == (15 + 4) * GB  # with the batch's gradients


def test_activations_that_fit_compiled_are_kept_and_recomputed_after_running_out() -> None:
    """If compilation fails, the run goes on with plain blocks, which keep more."""
    figures, free = counts(), 35 * GB
    chosen = choose(figures, free, Wishes())
    assert (chosen.mode, chosen.fits) == (Mode(), True)
    plain = replace(figures, compiled=False)
    assert choose(plain, free, Wishes()).mode == Mode(checkpointing=True)
    after = leaner(plain, chosen.mode, Wishes())
    assert after == Mode(checkpointing=True)
    assert plain.peak(after) <= free


@pytest.mark.parametrize(("compiling", "mode"), [("1", Mode()), ("0", Mode(checkpointing=True))])
def test_a_run_is_planned_as_it_will_be_compiled(
    compiling: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMPILE", compiling)
    monkeypatch.setattr(fitting, "free_memory", lambda at: 35 * GB)
    monkeypatch.setattr(
        fitting, "figures_of", lambda *asked: counts(compiled=asked[3], lora_values=GB // 10)
    )
    settings = resolve(TrainingInputs(dataset="x", base_model="miniature-turbo", seed=1))
    family: Any = SimpleNamespace(
        device=torch.device("cuda"),
        dtype=torch.bfloat16,
        max_text_tokens=512,
        tokenize=lambda text: SimpleNamespace(ids=text.split()),
    )
    assert fitting.fit(settings, family, ["a photo"]).mode == mode
