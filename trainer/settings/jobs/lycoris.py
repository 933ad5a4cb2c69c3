"""The adapters of LyCORIS in jobs of SimpleTuner, which are in a JSON file of their own.

Source: `helpers/training/trainer.py` of SimpleTuner; `wrapper.py` and `modules` of LyCORIS f49d30d
(2025-10-04).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from families.base import JobNames
from trainer.settings.inputs import SettingsError
from trainer.settings.jobs.rules import UNLIMITED, alpha_is_rank, lokr
from trainer.settings.jobs.translation import Translation
from trainer.settings.parsing import companion, parse


def keys_of_lycoris(job: Path, name: Any) -> dict[str, Any]:
    """The keys of the file `lycoris_config`, with `lycoris.` in front."""
    if not name:
        raise SettingsError("lycoris_config is missing")
    adapter = parse(companion(job, "lycoris_config", name))
    if not isinstance(adapter, dict):
        raise SettingsError("lycoris_config is not a JSON object")
    preset = adapter.pop("apply_preset", None) or {}
    keys = {f"lycoris.{key}": value for key, value in adapter.items()}
    return keys | {f"lycoris.apply_preset.{key}": value for key, value in preset.items()}


def lycoris(found: Translation, names: JobNames) -> None:
    """An adapter of LyCORIS. Of the options for layers, only classes of modules are translated."""
    found.same("lora_type", "lycoris")
    for key in ("lora_rank", "lora_alpha", "lora_dropout", "peft_lora_target_modules"):
        if key in found.keys:
            found.no_effect(key, "lora_type is lycoris")
    key = "lycoris.apply_preset.target_module"
    classes = found.get(key, [])
    if not names.modules.keys() >= set(classes):
        found.refuse(key, f"{', '.join(classes)} (supported: {', '.join(names.modules)})")
    else:  # by default every linear layer
        found.same(key, lora_targets=",".join(map(names.modules.__getitem__, classes)) or "*")
    algo, rank = str(found.get("lycoris.algo", "lora")).lower(), found.get("lycoris.linear_dim", 4)
    ranked = True
    if algo == "lokr":
        rank = UNLIMITED if found.get("lycoris.full_matrix") else rank
        ranked = lokr(found, "lycoris.linear_dim", rank, "lycoris.factor", _factor(found, classes))
        found.same("lycoris.algo", "lokr")
    elif algo in ("lora", "locon", "loha"):
        found.same("lycoris.algo", adapter="loha" if algo == "loha" else "lora")
        found.same("lycoris.linear_dim", rank=rank)
    else:
        found.refuse("lycoris.algo", f"{algo} (supported: lora, locon, loha, lokr)")
    if "lycoris.full_matrix" in found.keys:
        found.no_effect("lycoris.full_matrix", "" if ranked else "both factors are whole")
    if ranked:
        alpha_is_rank(found, "lycoris.linear_alpha", rank, 1)
    else:
        found.no_effect("lycoris.linear_alpha", "both factors are whole")


def _factor(found: Translation, classes: Sequence[str]) -> int:
    """The factor of LoKr, which `module_algo_map` can replace for classes of modules."""
    factor, key = found.get("lycoris.factor", -1), "lycoris.apply_preset.module_algo_map"
    rows: Mapping[str, Mapping[str, Any]] = found.keys.get(key) or {}
    used = sorted({rows.get(each, {}).get("factor", factor) for each in classes}) or [factor]
    others = sorted({name for row in rows.values() for name in row} - {"factor"})
    if others or used[1:]:
        text = ", ".join([*others, *(f"factor {each}" for each in used)])
        found.refuse(key, f"{text} (one factor for all layers here)")
    elif rows:
        found.same(key, f"factor {used[0]}")
    return int(used[0])
