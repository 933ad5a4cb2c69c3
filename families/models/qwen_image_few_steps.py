"""Published few-step LoRAs for Qwen-Image, with the settings that they need."""

import re

from families.base import FewStepRow

FEW_STEP_LORAS = (
    # Qwen-Image-Lightning and -2512-Lightning: the scheduler of the card of
    # lightx2v/Qwen-Image-Lightning, base_shift = max_shift = ln 3 and shift_terminal None (also
    # diffusers PR #12119).
    FewStepRow(
        "Qwen-Image-Lightning",
        re.compile(
            r"^(?!.*qwen-image-2-1)"  # another model, with other sigmas
            r".*(?:qwen-image(?:-edit)?(?:-\d{4})?-lightning"
            r"|qwen.*lightning.*\d-?steps?|lightning.*qwen.*\d-?steps?"
            r"|lightning.*\d-?steps?.*qwen)"
        ),
        steps=8,
        shift=3.0,
    ),
    # Wuli-art/Qwen-Image-2512-Turbo-LoRA, whose ComfyUI workflow has shift 3 and cfg 1.
    FewStepRow(
        "Qwen-Image-2512-Turbo-LoRA",
        re.compile(r"qwen-image-2512-turbo"),
        steps=4,
        shift=3.0,
    ),
)
