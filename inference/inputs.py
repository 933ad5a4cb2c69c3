"""The inputs for generation, one per line as in predict.py."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import field_validator, model_validator

from families.registry import BASES
from inference.input_fields import Input, Inputs, digits

PROMPT, WEIGHTS, IMAGE, SAMPLING, OUTPUT = GROUPS = (
    "prompt",
    "weights",
    "image",
    "sampling",
    "output",
)
ASPECT_RATIOS = ("1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "4:5", "5:4", "21:9", "9:21")
CUSTOM = "custom"  # the name in other services for a size given by width and height
FORMATS = ("webp", "jpg", "png")  # of image files; the first is the default
QUALITY = 90  # of webp and jpg files
IMAGES = Path("outputs/images")  # in the working directory; never cleaned
UPLOAD = 100 << 20  # characters of a data URL: Cog's limit of a request
MOST_REFERENCES = max(each.most_references for each in BASES.values())
SECRET_LENGTH = 1_000  # characters of a key or token


APPLY_LORA = WITH_TOKEN, ALWAYS = "with_token", "always"
# fmt: off
ApplyLora = Annotated[str, Input("with_token: a LoRA with a placeholder token is applied only if the prompt (or with guidance the negative prompt) contains its token; otherwise the image is the base model's. always: it is applied to every prompt. LoRAs without a token are always applied.", WEIGHTS, choices=APPLY_LORA)]
# fmt: on


# fmt: off
class SharedInputs(Inputs):
    """The inputs of users' requests, the engine's and preview images: all except files and
    `apply_lora`, since previews always apply the LoRA."""

    # The text encoders read 512 tokens, about 2,500 characters.
    prompt: Annotated[str, Input("Prompt. Use the trained token, such as <zwx>, for your subject.", PROMPT, max_length=10_000, hint="describe the image")]
    negative_prompt: Annotated[str, Input("Negative prompt; needs guidance above 1.", PROMPT, max_length=10_000)] = ""
    lora_scale: Annotated[float, Input("Strength of the LoRA. 1 is as trained, 0 is off.", WEIGHTS, ge=-3, le=3, hint="1 is as trained")] = 1.0
    extra_lora_scale: Annotated[float | None, Input("Strength of the second LoRA. Default: 1.", WEIGHTS, ge=-3, le=3, hint="1 is as trained")] = None
    prompt_strength: Annotated[float | None, Input("Denoising strength: 0 keeps the image, 1 ignores it. Default: 0.8.", IMAGE, ge=0, le=1)] = None
    width: Annotated[int | None, Input("Width in pixels, together with height. Default: from aspect_ratio.", IMAGE, ge=32, le=2048, unit="pixels", hint="enlarge the image afterwards for more")] = None
    height: Annotated[int | None, Input("Height in pixels, together with width. Default: from aspect_ratio.", IMAGE, ge=32, le=2048, unit="pixels", hint="enlarge the image afterwards for more")] = None
    aspect_ratio: Annotated[str | None, Input("Aspect ratio at the model's own resolution, unless width and height are given. Default: the image's, or 1:1 without one.", IMAGE, choices=(*ASPECT_RATIOS, CUSTOM))] = None
    num_outputs: Annotated[int, Input("Number of images. Image n uses the seed plus n.", SAMPLING, ge=1, le=8, hint="send several requests for more")] = 1
    num_inference_steps: Annotated[int | None, Input("Denoising steps. Default: a known few-step LoRA's own, else the model's (8 for turbo models).", SAMPLING, ge=1, le=200, hint="leave it out for the model's own number")] = None
    guidance_scale: Annotated[float | None, Input("How closely to follow the prompt, from 1 to 20; 1 is off, below 1 is refused. Default: a known few-step LoRA's own, else the model's (off for turbo models).", SAMPLING, ge=1, le=20, hint="1 is off")] = None
    shift: Annotated[float | None, Input("Shift of the sigma schedule, the same at every size and without a terminal shift, such as 3 for Qwen-Image-Lightning. 0: the model's own schedule. Default: a known few-step LoRA's own, else the model's.", SAMPLING, ge=0, le=20, hint="0 is the model's own schedule")] = None
    go_fast: Annotated[bool, Input("Use guidance only in the first half of the steps: 25 % less compute, almost the same image. No effect where guidance is off.", SAMPLING)] = False
    seed: Annotated[int | None, Input("The same seed and inputs give the same images. Default: random, and written to the log and the files.", SAMPLING, ge=0, le=2**63 - 1)] = None
    # fmt: on

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("prompt is empty; describe the image")
        return value

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _off_is_one(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and value < 1:
            raise ValueError(
                f"guidance_scale is {digits(value)}; 1 is off, so use 1 to turn guidance off "
                "(some programs count from 0: their 0 is 1 here)"
            )
        return value

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.width is None) != (self.height is None):
            raise ValueError("width and height go together; set both or neither")
        if self.aspect_ratio == CUSTOM and self.width is None:
            raise ValueError("aspect_ratio custom needs width and height")
        if self.prompt_strength is not None and not getattr(self, "image", None):
            raise ValueError("prompt_strength needs an image")
        if getattr(self, "mask", None) and not getattr(self, "image", None):
            raise ValueError("mask needs an image")
        return self


# fmt: off
class GenerationInputs(SharedInputs):
    """The inputs of one request. None: the model's default.

    Raises ValueError that lists all invalid inputs.
    """

    base_model: Annotated[str, Input("Model to generate with. auto: the one that the weights were trained on.", WEIGHTS)] = "auto"
    replicate_weights: Annotated[Path | str | None, Input("LoRA: weights.zip of a training run, a .tar of it, or a LoRA .safetensors. An https URL, huggingface.co/owner/name, hf:owner/name/file.safetensors@revision, or the file itself as a data URL (@file with Cog). Default: the base model without a LoRA.", WEIGHTS, max_length=UPLOAD)] = None
    lora_weights: Annotated[Path | str | None, Input("The same as replicate_weights, under the name that other models use.", WEIGHTS, max_length=UPLOAD)] = None
    extra_lora: Annotated[Path | str | None, Input("A second LoRA that is combined with the first; the same spellings.", WEIGHTS, max_length=UPLOAD)] = None
    apply_lora: ApplyLora = WITH_TOKEN
    image: Annotated[Path | str | None, Input("Image to start from; see prompt_strength.", IMAGE)] = None
    reference_images: Annotated[Sequence[Path | str], Input("Images to edit or to take things from: up to 3 for qwen-image-edit models, which call them Picture 1, Picture 2, … in the prompt; up to 10 for qwen-image-2.1, which calls them <image1>, <image2>, …", IMAGE)] = []
    mask: Annotated[Path | str | None, Input("Inpainting: an image of the same size as image. Only its white part is generated; the rest stays as in image.", IMAGE)] = None
    output_format: Annotated[str, Input("File format of the images.", OUTPUT, choices=FORMATS)] = FORMATS[0]
    output_quality: Annotated[int, Input("Quality of webp and jpg files, from 1 to 100.", OUTPUT, ge=1, le=100)] = QUALITY
    output_metadata: Annotated[bool, Input("Write prompt, seed, settings and the weights' hashes into the files.", OUTPUT)] = True
    # fmt: on

    @model_validator(mode="after")
    def _sources(self) -> Self:
        if self.replicate_weights and self.lora_weights:
            raise ValueError(
                "replicate_weights and lora_weights are the same input; set only one of them, and "
                "pass a second LoRA as extra_lora"
            )
        if len(self.reference_images) > MOST_REFERENCES:
            raise ValueError(
                f"reference_images has {len(self.reference_images)} images; no model takes more "
                f"than {MOST_REFERENCES}"
            )
        if self.extra_lora_scale is not None and not self.extra_lora:
            raise ValueError("extra_lora_scale needs extra_lora; set both or neither")
        return self


INPUTS = GenerationInputs.inputs()
# Bounds of numbers, choices of names, and characters of texts, by the input's name.
RANGES: dict[str, tuple[float, float]] = {
    name: (each.ge, each.le)
    for name, each in INPUTS.items()
    if each.ge is not None and each.le is not None
}
CHOICES = {name: each.choices for name, each in INPUTS.items() if each.choices}
LENGTHS = {name: each.max_length for name, each in INPUTS.items() if each.max_length is not None}
