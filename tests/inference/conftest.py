"""The small published bases, with Turbo as the default, and a compiler without a past."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from families.family import Family


@pytest.fixture(scope="module")
def bases(vault: Path) -> Iterator[None]:
    """The vault for a whole file, with Turbo as the default base."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_VAULT", str(vault))
        patch.setenv("BASE_MODEL", "z-image-turbo")
        yield


@pytest.fixture(scope="module")
def turbo(bases: None) -> "Family":
    """Turbo, in float32 on the CPU."""
    import torch

    from families.loading import load_family
    from families.registry import BASES

    return load_family(BASES["z-image-turbo"], torch.device("cpu"), torch.float32)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """TorchDynamo without what other tests have compiled."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
