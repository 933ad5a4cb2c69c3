"""Finds and reads PEFT's adapter_config.json next to a LoRA.

`adapters.formats.lora_header.Header.config` parses it.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from adapters.files.containers import printable
from adapters.formats.lora_file import BrokenLora
from adapters.formats.lora_header import CONFIG, MAX_CONFIG_BYTES

log = logging.getLogger(__name__)

_PEFT_NAME = "adapter_model.safetensors"


def config_beside(lora: Path) -> Path | None:
    """The adapter_config.json in a LoRA's folder, or None.

    In a folder with several LoRAs it is used for `adapter_model.safetensors`, PEFT's file name.
    """
    config = lora.parent / CONFIG
    if not config.is_file():
        return None
    others = [each for each in lora.parent.glob("*.safetensors") if each != lora]
    if others and lora.name != _PEFT_NAME:
        log.warning(
            "%s: %s next to it is ignored: the folder contains %d other .safetensors",
            *(printable(lora.name), CONFIG, len(others)),
        )
        return None
    return config


def config_member(names: Iterable[str], lora: str) -> str | None:
    """The adapter_config.json of a LoRA in an archive: next to it, else the only one there is."""
    found = [name for name in names if name.rpartition("/")[2] == CONFIG]
    beside = "".join(lora.rpartition("/")[:2]) + CONFIG
    if beside in found:
        return beside
    if len(found) > 1:
        log.warning(
            "%s: none of %d %s is in its folder; all are ignored",
            *(printable(lora[:200]), len(found), CONFIG),
        )
    return found[0] if len(found) == 1 else None


def config_text(file: IO[bytes]) -> bytes:
    """The text of an opened adapter_config.json. Raises `BrokenLora` if it is too long."""
    text = file.read(MAX_CONFIG_BYTES + 1)
    if len(text) > MAX_CONFIG_BYTES:
        raise BrokenLora(f"{CONFIG} has more than {MAX_CONFIG_BYTES:,} bytes; it is damaged")
    return text
