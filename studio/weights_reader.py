"""Reads and checks one file of weights as generation does; a process of its own, for PyTorch.

python -m studio.weights_reader PATH     JSON on stdout: what is in it, or {"error"}
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def described(path: Path) -> dict[str, Any]:
    """What is in a file of weights. Raises what `read_archive` raises."""
    from adapters.archive import read_archive
    from adapters.files.atomic import content_hash

    archive = read_archive(path)
    layers = [{"name": name, "norm": _norm(delta)} for name, delta in archive.deltas.items()]
    known = archive.meta.get("settings")
    return {
        "tokens": list(archive.tokens),
        "base_model": archive.base_model,
        "rank": archive.meta.get("rank"),
        "modules": len(archive.deltas),
        "layers": layers,
        "settings": known if isinstance(known, dict) else {},
        "hashes": {"file": content_hash(path), "lora": archive.lora_sha256},
    }


def answer(path: Path) -> dict[str, Any]:
    """What is in the file, or why it cannot be used."""
    try:
        return described(path)
    except (ValueError, OSError) as error:
        return {"error": str(error)}


def _norm(delta: Any) -> float | None:
    """The Frobenius norm of a plain LoRA's change of a layer; None for other kinds."""
    from adapters.tools import norm

    if not isinstance(delta, tuple):
        return None
    found = norm(*(each.double() for each in delta))
    return round(found, 6) if math.isfinite(found) else None


def main() -> None:
    """Prints what is in the file that is named on the command line."""
    print(json.dumps(answer(Path(sys.argv[1])), default=str))


if __name__ == "__main__":
    main()
