"""Splits the blocks of a frozen model over the processes of a machine (PyTorch's FSDP2).

Each process has a part of every block. A block's weights are gathered before its forward and its
backward pass, and freed after it; the values are the same bits as without sharding. So all
processes of a machine must call a sharded model equally often. All that is outside the blocks, and
what is added to them later (a LoRA), is whole in every process.

PyTorch's distributed packages are imported when a model is sharded, not before.
"""

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

# Gathered at the same time on a GPU: a block, the next one, and the buffer that it arrives in.
GATHERED_BLOCKS = 3


def processes_here() -> int:
    """The number of processes of this launch on this machine, as set by the launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by name: the elements of its outermost lists."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not name.startswith(tuple(f"{k}." for k in found)):
            found |= {f"{name}.{place}": block for place, block in module.named_children()}
    return found


def shard(
    model: nn.Module,
    device: torch.device,
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Splits a model that is in CPU memory over the devices of the machine's processes.

    Block by block, so that a device never has more than one whole block. Each parameter is replaced
    by `change`, by its name, before that. Parameters are frozen.
    """
    from torch.distributed.fsdp import fully_shard

    model.requires_grad_(False)
    mesh, here, whole_bytes = _mesh(device.type), 0, 0
    for name, block in repeated_blocks(model).items():
        block.to(device)
        _change(block, f"{name}.", change)
        whole_bytes += sum(each.nbytes for each in block.parameters())
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        here += sum(local(each).nbytes for each in block.parameters())
    rest = {each for each in model.parameters() if local(each) is each}
    for module in model.modules():
        module._apply(lambda each: each.to(device) if local(each) is each else each, recurse=False)
    _change(model, "", change)
    fully_shard(model, mesh=mesh, ignored_params=rest)  # makes it the root: only blocks are split
    log.info(
        "%s: %.3f of %.3f MB of its blocks are in this process",
        *(type(model).__name__.removeprefix("FSDP"), here / 1e6, whole_bytes / 1e6),
    )
    return model


def local(tensor: Tensor) -> Tensor:
    """The part of a parameter that is in this process; all of one that is not sharded."""
    part: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def gathered(tensor: Tensor) -> Tensor:
    """All of a parameter; a sharded one is gathered, for which all processes must call this."""
    gather: Callable[[], Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


@torch.no_grad()
def _change(module: nn.Module, prefix: str, change: Callable[[str, Tensor], Tensor] | None) -> None:
    """Replaces the values of the parameters that are not sharded yet."""
    if change is None:
        return
    for name, parameter in module.named_parameters():
        if local(parameter) is parameter:
            parameter.data = change(f"{prefix}{name}", parameter)


@functools.cache
def _mesh(device_type: str) -> Any:
    """The processes of this machine.

    PEFT takes other names than `fsdp` for tensor parallelism, and would make LoRAs for a part.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    here, count = processes_here(), get_world_size()
    if here == count:
        return init_device_mesh(device_type, (here,), mesh_dim_names=("fsdp",))
    shape = count // here, here
    return init_device_mesh(device_type, shape, mesh_dim_names=("machines", "fsdp"))["fsdp"]
