"""The checks of a full training's result that differ from those of a LoRA."""

from collections.abc import Mapping
from pathlib import Path

import torch

from adapters.archive import Archive, BrokenArchive
from adapters.full_weights import FullWeights
from adapters.trained_model import read_trained_model
from families.components import original_transformer
from families.family import Family
from families.registry import with_transformer
from families.repository import MissingModel
from trainer.result.result_checks import (
    FAILED,
    PASSED,
    CheckResult,
    all_changed,
    same_vectors,
)

Changes = Mapping[str, tuple[float, float]]  # `FullWeights.changes`


def learned_in_full(full: FullWeights, changes: Changes) -> CheckResult:
    """Whether every trained linear layer has a finite update that is not zero.

    Others, such as an embedding for padding, may have no effect in a run.
    """
    norms = {layer: changes[f"{layer}.weight"][0] for layer in full.layers()}
    return all_changed(norms, "linear layers")


def reloads_in_full(full: FullWeights, archive: Archive, path: Path, family: Family) -> CheckResult:
    """Whether the folder at `path` contains exactly the trained transformer and tokens."""
    name = "the file can be read back"

    def failed(sentence: str) -> CheckResult:
        return CheckResult(name, FAILED, sentence, worthless=True)

    try:
        read = read_trained_model(path)
        loaded = original_transformer(family, with_transformer(family.base, path))
    except (BrokenArchive, MissingModel) as error:
        return failed(f"the folder is invalid: {error}")
    trained, found = dict(full.transformer.named_parameters()), dict(loaded.named_parameters())
    other = [each for each in trained if not torch.equal(found[each], trained[each].cpu())]
    if other:
        return failed(f"{len(other)} of {len(trained)} weights differ from the trained ones")
    if not same_vectors(archive, read):
        return failed("the placeholder differs from the trained one")
    also = "".join(f" and {token}" for token in archive.vectors)
    sentence = f"{len(trained)} weights{also} in the folder equal the trained ones exactly"
    return CheckResult(name, PASSED, sentence)
