"""The Cog interface of inference: a prompt and an optional LoRA in, images out.

Cog reads the inputs below at build time without running this file, so every default, bound and
description is a literal. A test compares them with `inference.inputs`.
"""

from typing import List, Optional

from cog import BasePredictor, Input, Path, Secret

from serving.inputs import entry_point, metric, served

BASE_MODELS = [
    "auto",
    "qwen-image",
    "qwen-image-2512",
    "qwen-image-edit-2511",
    "qwen-image-edit-2509",
    "qwen-image-2.1",
    "qwen-image-2.1-turbo",
    "z-image-turbo",
    "z-image",
    "z-image-de-turbo",
    "miniature-turbo",
    "miniature",
    "miniature-qwen",
]


class Predictor(BasePredictor):
    @entry_point
    def setup(self, weights: Optional[str] = None) -> None:
        """Load the base model, so that the first request is as fast as the next.

        `weights` is the value of $COG_WEIGHTS: the LoRA of all requests without one of their own.
        """
        from inference.engine import Engine

        self.engine = Engine()
        self.engine.warm_up(weights)

    # fmt: off
    @entry_point
    def predict(
        self,
        prompt: str = Input(description="Prompt. Use the trained token, such as <zwx>, for your subject.", max_length=10000),
        negative_prompt: str = Input(description="Negative prompt; needs guidance above 1.", default="", max_length=10000),
        replicate_weights: Optional[str] = Input(description="LoRA: weights.zip of a training run, a .tar of it, or a LoRA .safetensors. An https URL, huggingface.co/owner/name, hf:owner/name/file.safetensors@revision, or the file itself as a data URL (@file with Cog). Default: the base model without a LoRA.", default=None, max_length=104857600),
        lora_weights: Optional[str] = Input(description="The same as replicate_weights, under the name that other models use.", default=None, max_length=104857600),
        lora_scale: float = Input(description="Strength of the LoRA. 1 is as trained, 0 is off.", default=1.0, ge=-3, le=3),
        extra_lora: Optional[str] = Input(description="A second LoRA that is combined with the first; the same spellings.", default=None, max_length=104857600),
        extra_lora_scale: Optional[float] = Input(description="Strength of the second LoRA. Default: 1.", default=None, ge=-3, le=3),
        apply_lora: str = Input(description="with_token: a LoRA with a placeholder token is applied only if the prompt (or with guidance the negative prompt) contains its token; otherwise the image is the base model's. always: it is applied to every prompt. LoRAs without a token are always applied.", default="with_token", choices=["with_token", "always"]),
        hf_api_token: Optional[Secret] = Input(description="Hugging Face token for private repositories in replicate_weights, lora_weights and extra_lora.", default=None, max_length=1000),
        base_model: str = Input(description="Model to generate with. auto: the one that the weights were trained on.", default="auto", choices=BASE_MODELS),
        image: Optional[Path] = Input(description="Image to start from; see prompt_strength.", default=None, max_length=104857600),
        reference_images: List[Path] = Input(description="Images to edit or to take things from: up to 3 for qwen-image-edit models, which call them Picture 1, Picture 2, … in the prompt; up to 10 for qwen-image-2.1, which calls them <image1>, <image2>, …", default=[]),
        mask: Optional[Path] = Input(description="Inpainting: an image of the same size as image. Only its white part is generated; the rest stays as in image.", default=None, max_length=104857600),
        prompt_strength: Optional[float] = Input(description="Denoising strength: 0 keeps the image, 1 ignores it. Default: 0.8.", default=None, ge=0, le=1),
        width: Optional[int] = Input(description="Width in pixels, together with height. Default: from aspect_ratio.", default=None, ge=32, le=2048),
        height: Optional[int] = Input(description="Height in pixels, together with width. Default: from aspect_ratio.", default=None, ge=32, le=2048),
        aspect_ratio: Optional[str] = Input(description="Aspect ratio at the model's own resolution, unless width and height are given. Default: the image's, or 1:1 without one.", default=None, choices=["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "4:5", "5:4", "21:9", "9:21", "custom"]),
        num_outputs: int = Input(description="Number of images. Image n uses the seed plus n.", default=1, ge=1, le=8),
        num_inference_steps: Optional[int] = Input(description="Denoising steps. Default: a known few-step LoRA's own, else the model's (8 for turbo models).", default=None, ge=1, le=200),
        guidance_scale: Optional[float] = Input(description="How closely to follow the prompt, from 1 to 20; 1 is off, below 1 is refused. Default: a known few-step LoRA's own, else the model's (off for turbo models).", default=None, ge=0, le=20),
        shift: Optional[float] = Input(description="Shift of the sigma schedule, the same at every size and without a terminal shift, such as 3 for Qwen-Image-Lightning. 0: the model's own schedule. Default: a known few-step LoRA's own, else the model's.", default=None, ge=0, le=20),
        go_fast: bool = Input(description="Use guidance only in the first half of the steps: 25 % less compute, almost the same image. No effect where guidance is off.", default=False),
        seed: Optional[int] = Input(description="The same seed and inputs give the same images. Default: random, and written to the log and the files.", default=None, ge=0),
        output_format: str = Input(description="File format of the images.", default="webp", choices=["webp", "jpg", "png"]),
        output_quality: int = Input(description="Quality of webp and jpg files, from 1 to 100.", default=90, ge=1, le=100),
        output_metadata: bool = Input(description="Write prompt, seed, settings and the weights' hashes into the files.", default=True),
    ) -> List[Path]:
        """Generate images from a prompt, with an optional LoRA."""
        from inference.inputs import IMAGES, GenerationInputs

        inputs = GenerationInputs(
            prompt=prompt,
            negative_prompt=negative_prompt,
            replicate_weights=replicate_weights,
            lora_weights=lora_weights,
            lora_scale=lora_scale,
            extra_lora=extra_lora,
            extra_lora_scale=extra_lora_scale,
            apply_lora=apply_lora,
            base_model=base_model,
            image=image,
            reference_images=reference_images,
            mask=mask,
            prompt_strength=prompt_strength,
            width=width,
            height=height,
            aspect_ratio=aspect_ratio,
            num_outputs=num_outputs,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            shift=shift,
            go_fast=go_fast,
            seed=seed,
            output_format=output_format,
            output_quality=output_quality,
            output_metadata=output_metadata,
        )
        images = self.engine.predict(
            inputs,
            metric,
            hf_api_token=hf_api_token,
            any_file=not served(),
            output_dir=None if served() else IMAGES,
        )
        return [Path(image) for image in images]
    # fmt: on
