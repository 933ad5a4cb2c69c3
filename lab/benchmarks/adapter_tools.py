"""python -m lab.benchmarks.adapter_tools: time and memory of the tools for LoRA files.

Random LoRAs for all target layers of a published base, and with `--whole` its whole transformer
with random weights (Z-Image: 12 GB, and as much for each result), which is baked and extracted
from. Each tool is a process of its own, imports included.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

from families.base import Base
from families.registry import find_base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="z-image-turbo")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--whole", action="store_true", help="bake and extract, too")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    given = parser.parse_args()
    base = find_base(given.base)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder)
        one, two = (root / f"{seed}.zip" for seed in (1, 2))
        for seed, path in enumerate((one, two)):
            apart(write_lora, path, base, given.rank, seed)
        print("| tool | processor, s | clock, s | peak memory, GB |\n| --- | --- | --- | --- |")
        row("`--help`", [sys.executable, "-m", "adapters", "--help"])
        row("imports", [sys.executable, "-c", "import adapters.commands"])
        output = ["--base", base.name, "-o"]
        tool("inspect", str(one))
        tool("convert", str(one), "--to", "comfyui", *output, f"{root}/c.safetensors")
        tool("merge", str(one), str(two), *output, f"{root}/m.zip")
        tool("merge", "--rank", "32", str(one), str(two), *output, f"{root}/n.zip")
        tool("resize", "--energy", "0.95", str(one), *output, f"{root}/r.zip")
        if given.whole:
            whole(root, base, one)


def whole(root: Path, base: Base, lora: Path) -> None:
    """The tools that read a whole transformer, and a copy of its files beside them."""
    folder = root / base.hub_id
    apart(write_transformer, folder / "transformer", base)
    os.environ["MODEL_VAULT"] = str(root)
    copy, baked, single = root / "copy", root / "baked", root / "baked.safetensors"
    synced = ["sh", "-c", f"cp -r {folder} {copy} && sync {copy}/transformer/*"]
    row("a copy of the transformer's files", synced)
    shutil.rmtree(copy)
    options = ["--base", base.name, "-o"]
    tool("bake", str(lora), *options, str(baked))
    tool("extract", str(baked), "--rank", "32", *options, f"{root}/e.zip")
    shutil.rmtree(baked)
    tool("bake", str(lora), "--layout", "comfyui", "--dtype", "fp8", *options, str(single))


def apart(write: Callable[..., object], *given: object) -> None:
    """Runs a function in a process of its own: a child's peak begins at its parent's memory."""
    process = get_context("spawn").Process(target=write, args=given)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(f"{write.__name__}: failed")


def write_lora(path: Path, base: Base, rank: int, seed: int) -> None:
    """A random LoRA for the layers that are trained by default."""
    import torch

    from adapters.archive import Archive, write_archive
    from families.parameters import transformer_parameters
    from families.without_weights import family_without_weights

    family = family_without_weights(base)
    shapes = transformer_parameters(base)
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in family.lora_targets("auto"):
        rows, columns = shapes[f"{layer}.weight"]
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        factors[layer] = down, torch.randn(rows, rank, generator=generator) / 100
    write_archive(Archive(factors, (), {"base_model": base.hub_id}), path)


def write_transformer(folder: Path, base: Base) -> None:
    """A transformer of the published size with random weights in bfloat16."""
    import torch
    from torch import Tensor

    from adapters.files.tensor_writer import Planned, write_tensors
    from families.parameters import transformer_parameters
    from families.registry import family_of

    folder.mkdir(parents=True)
    planned = {
        name: Planned(torch.bfloat16, shape) for name, shape in transformer_parameters(base).items()
    }
    pool = torch.randn(1 << 27, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def values() -> Iterator[tuple[str, Tensor]]:
        start = 0
        for name, each in planned.items():
            size = each.nbytes // 2
            start = (start + 7919) % (len(pool) - size)
            yield name, pool[start : start + size].reshape(each.shape)

    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        write_tensors(file, planned, values(), {"format": "pt"})
    name = family_of(base).classes.transformer
    (folder / "config.json").write_text(json.dumps({"_class_name": name}))


def tool(name: str, *words: str) -> None:
    """A row of one tool."""
    title = " ".join([name, *(word for word in words if "/" not in word and word != "-o")])
    row(f"`{title}`", [sys.executable, "-m", "adapters", name, *words])


def row(title: str, command: list[str]) -> None:
    """Runs a command and prints its seconds and the peak of its resident memory."""
    start = time.perf_counter()
    log = os.open(os.devnull, os.O_WRONLY)
    actions = [(os.POSIX_SPAWN_DUP2, log, 1)]
    process = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{title}: failed")
    processor = usage.ru_utime + usage.ru_stime
    memory = usage.ru_maxrss * 1024 / 1e9
    print(f"| {title} | {processor:.1f} | {seconds:.1f} | {memory:.2f} |", flush=True)


if __name__ == "__main__":
    main()
