"""python -m lab.benchmarks.text_launches: operations of the text encoder in a step with a token.

Forward and backward of one caption through layers of the published structure and a tiny width, on a
CPU: operations without views, each of which a GPU starts as a kernel; and for compiled layers the
kernels that Inductor makes for a CPU, and the products and attention beside them. A GPU's numbers
may differ.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._inductor import metrics
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from families.family import Family
from families.registry import family_of, find_base
from families.without_weights import family_without_weights
from lab.benchmarks.machine import machine
from lab.benchmarks.random_base import TEXT_LAYERS, random_model

BASES = ("z-image-turbo", "qwen-image")
TOKENS, WIDTH = 20, 64
# Start nothing on a GPU.
VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "alias", "detach"}
VIEWS |= {"unsqueeze", "squeeze", "expand", "split", "empty", "empty_like"}
OUTSIDE = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_scaled_dot_product_")  # and so on


class Operations(TorchDispatchMode):
    """Counts operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func._overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


def encoder(family: Family, layers: int) -> nn.Module:
    """A text encoder of tiny width with so many layers in its config, as prompts are read with."""
    changes = {TEXT_LAYERS: layers}
    model = random_model(family_of(family.base), "text_encoder", torch.device("cpu"), changes)
    return family._reading_part(model)


def both_ways(model: Any) -> Callable[[], None]:
    """Forward and backward of one caption."""
    embeds = torch.randn(1, TOKENS, WIDTH, requires_grad=True)

    def run() -> None:
        model(inputs_embeds=embeds, use_cache=False).last_hidden_state.square().mean().backward()

    return run


def plain(family: Family) -> tuple[int, int]:
    """Operations of each layer, and of what is not in a layer."""
    found = []
    for layers in (3, 5):
        model = encoder(family, layers)
        with Operations() as operations:
            both_ways(model)()
        found.append((len(model.get_submodule(family.text_trunk)), operations.count))  # type: ignore[arg-type]
    (few, less), (many, more) = found
    each = (more - less) // (many - few)
    return each, less - few * each


def compiled(family: Family) -> tuple[int, int]:
    """Kernels of each layer that Inductor makes, and operations that it calls beside them."""
    torch._dynamo.reset()
    model = encoder(family, 3)
    layers = list(model.get_submodule(family.text_trunk).children())
    for layer in layers:
        layer.compile(dynamic=True)
    run = both_ways(model)
    metrics.reset()
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events = [each for each in profiler.key_averages() if each.key.startswith(OUTSIDE)]
    return metrics.generated_kernel_count, sum(each.count for each in events) // len(layers)


def main() -> None:
    print(machine())
    print("| text encoder | layers | plain, each layer | plain, all | compiled, each | all |")
    print("| --- " * 6 + "|")
    for name in BASES:
        family = family_without_weights(find_base(name))
        layers = len(family.text_encoder.get_submodule(family.text_trunk))
        (each, rest), (made, beside) = plain(family), compiled(family)
        cells = [layers, each, layers * each + rest, f"{made} + {beside}"]
        shown = " | ".join(map(str, [*cells, layers * (made + beside)]))
        print(f"| {family.title} | {shown} |")


if __name__ == "__main__":
    main()
