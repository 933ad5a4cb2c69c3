"""The Cog face of prediction: a prompt and optional trained weights in, pictures out.

Cog reads the inputs below at build time without running this file: every default, bound and
description is a literal, on purpose. All behaviour is in `inference`.
"""

from typing import List, Optional

from cog import BasePredictor, Input, Path, Secret

from serving.inputs import logged, metric, plain, served

BASE_MODELS = [
    "auto",
    "qwen-image",
    "qwen-image-2512",
    "z-image-turbo",
    "z-image",
    "z-image-de-turbo",
    "miniature-turbo",
    "miniature",
]


class Predictor(BasePredictor):
    def setup(self, weights: Optional[str] = None) -> None:
        """Load the base model, so that the first request is as fast as the next.

        `weights` is what the runtime finds in $COG_WEIGHTS: those that a request draws with
        unless it brings its own.
        """
        with logged({}):
            from inference.engine import Engine

            self.engine = Engine()
            self.engine.warm_up(weights)

    # fmt: off
    def predict(
        self,
        prompt: str = Input(description="What to draw. Use the trained word, such as <zwx>, for your subject.", max_length=10000),
        negative_prompt: str = Input(description="What to keep out of the picture. Only models with guidance above 1 read it.", default="", max_length=10000),
        replicate_weights: Optional[str] = Input(description="LoRA: weights.zip of a training run, a .tar of it, or a LoRA .safetensors. An https URL, huggingface.co/owner/name, hf:owner/name/file.safetensors@revision, or the file itself as a data URL (@file with Cog). Default: the base model without a LoRA.", default=None, max_length=104857600),
        lora_weights: Optional[str] = Input(description="The same as replicate_weights, under the name that other models use.", default=None, max_length=104857600),
        lora_scale: float = Input(description="Strength of the LoRA. 1 is as trained, 0 is off.", default=1.0, ge=-3, le=3),
        extra_lora: Optional[str] = Input(description="A second LoRA that is combined with the first; the same spellings.", default=None, max_length=104857600),
        extra_lora_scale: Optional[float] = Input(description="Strength of the second LoRA. Empty: 1.", default=None, ge=-3, le=3),
        hf_api_token: Optional[Secret] = Input(description="Hugging Face token for private repositories in replicate_weights, lora_weights and extra_lora.", default=None, max_length=1000),
        base_model: str = Input(description="Model to draw with. auto takes the one the weights were trained on.", default="auto", choices=BASE_MODELS),
        image: Optional[Path] = Input(description="A picture to start from; see prompt_strength.", default=None, max_length=104857600),
        prompt_strength: Optional[float] = Input(description="How much of the image is drawn anew: 1 keeps nothing of it, 0 everything. Empty: 0.8.", default=None, ge=0, le=1),
        width: Optional[int] = Input(description="Width in pixels, together with height. Empty: from aspect_ratio.", default=None, ge=32, le=2048),
        height: Optional[int] = Input(description="Height in pixels, together with width. Empty: from aspect_ratio.", default=None, ge=32, le=2048),
        aspect_ratio: Optional[str] = Input(description="Shape of the picture at the model's own resolution, unless width and height are given. Empty: the image's shape, or 1:1 without one.", default=None, choices=["1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "4:5", "5:4", "21:9", "9:21", "custom"]),
        num_outputs: int = Input(description="Number of pictures. Picture n uses the seed plus n.", default=1, ge=1, le=8),
        num_inference_steps: Optional[int] = Input(description="Denoising steps. Empty: a known few-step LoRA's own, else the model's (8 for turbo models).", default=None, ge=1, le=200),
        guidance_scale: Optional[float] = Input(description="How closely to follow the prompt, from 1 to 20; 1 is off, below 1 is refused. Empty: a known few-step LoRA's own, else the model's (off for turbo models).", default=None, ge=0, le=20),
        shift: Optional[float] = Input(description="Shift of the sigma schedule, the same at every size and without a terminal shift, such as 3 for Qwen-Image-Lightning. 0: the model's own schedule. Empty: a known few-step LoRA's own, else the model's.", default=None, ge=0, le=20),
        go_fast: bool = Input(description="Guide only the first half of the steps, which decide the picture: a quarter fewer passes through the model, almost the same picture. No effect where guidance is off.", default=False),
        seed: Optional[int] = Input(description="The same seed and inputs give the same pictures. Empty: drawn at random and written to the log and the files.", default=None, ge=0),
        output_format: str = Input(description="File format of the pictures.", default="webp", choices=["webp", "jpg", "png"]),
        output_quality: int = Input(description="Quality of webp and jpg files, from 1 to 100.", default=90, ge=1, le=100),
        output_metadata: bool = Input(description="Write prompt, seed, settings and the weights' hashes into the files.", default=True),
    ) -> List[Path]:
        """Draw pictures of a prompt, with trained weights laid over the base for this request."""
        inputs = plain(locals())
        with logged(inputs):
            place = {"output_dir": None} if served() else {"any_file": True}
            return [Path(path) for path in self.engine.predict(metric, **place, **inputs)]
    # fmt: on
