"""Qwen-Image: a two-stream transformer with the language model of Qwen2.5-VL as text encoder.

The transformer takes time sigma and returns noise - x0 on latents packed into 2x2 patches. Text
features are the encoder's last hidden states without those of the system prompt (diffusers,
`pipelines/qwenimage`). Qwen-Image-Edit-2509 and -2511 are the same models with another system
prompt; reference images stand in the prompt and in the sequence (`families.references`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from families.base import (
    BARE,
    DIFFUSION_MODEL,
    KOHYA,
    LORA_STYLES,
    TRANSFORMER,
    Base,
    CardCode,
    JobNames,
    LoraReader,
    ModelClasses,
)
from families.editing import IMAGE_SLOT, ReferenceFormat
from families.models.qwen_image_few_steps import FEW_STEP_LORAS
from families.tokens import TokenizedPrompt
from families.video_vae import VideoVaeFamily

if TYPE_CHECKING:
    from torch import Tensor, nn

    from families.references import References

# Images of more pixels go through the VAE in tiles, which is nearly as fast for this VAE.
WHOLE_PIXELS = 640 * 640

# The system prompt that Qwen-Image was trained with, word for word (QwenImagePipeline).
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# That of QwenImageEditPlusPipeline.
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)

QWEN_IMAGE = Base(
    name="qwen-image",
    hub_id="Qwen/Qwen-Image",
    family="qwen_image",
    license="Apache-2.0",
    download=55,
    inference_steps=50,
    guidance_scale=4.0,
    default_resolution=1328,
    generation_memory=56.8,
    training_memory=40.2,
    training_resolution=1024,
    training_shift=2.2,
)
QWEN_IMAGE_2512 = replace(QWEN_IMAGE, name="qwen-image-2512", hub_id="Qwen/Qwen-Image-2512")
QWEN_IMAGE_EDIT_2511 = replace(
    QWEN_IMAGE,
    name="qwen-image-edit-2511",
    hub_id="Qwen/Qwen-Image-Edit-2511",
    most_references=3,  # as on the cards
    needs_references=True,
    attention_share=0.18,
    inference_steps=40,
    default_resolution=1024,
    size_multiple=32,  # as the pipeline rounds its default sizes
    generation_memory=58.4,  # with three reference images
)
QWEN_IMAGE_EDIT_2509 = replace(
    QWEN_IMAGE_EDIT_2511, name="qwen-image-edit-2509", hub_id="Qwen/Qwen-Image-Edit-2509"
)


class QwenImage(VideoVaeFamily):
    """Qwen-Image, Qwen-Image-2512, Qwen-Image-Edit-2511 and -2509."""

    name = "qwen_image"
    title = "Qwen-Image"
    bases = (QWEN_IMAGE, QWEN_IMAGE_2512, QWEN_IMAGE_EDIT_2511, QWEN_IMAGE_EDIT_2509)
    auto_on_gpu = QWEN_IMAGE
    classes = ModelClasses(
        pipeline="QwenImagePipeline",
        editing_pipeline="QwenImageEditPlusPipeline",
        transformer="QwenImageTransformer2DModel",
        vae="AutoencoderKLQwenImage",
        # Only the full class reads every key layout of the published checkpoints.
        text_encoder="Qwen2_5_VLForConditionalGeneration",
    )
    # From the config.json files of Qwen/Qwen-Image; transformer and VAE have the classes' defaults.
    published = {
        "transformer": {},
        "text_encoder": {  # Qwen2.5-VL-7B
            "text_config": {
                "vocab_size": 152064,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1_000_000.0,
                    "mrope_section": [16, 24, 24],
                },
            },
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
            },
            "tie_word_embeddings": False,
        },
        "vae": {},
    }
    reference_format = ReferenceFormat(
        f"Picture {{}}: <|vision_start|>{IMAGE_SLOT}<|vision_end|>", seen_pixels=384 * 384
    )
    trunk = "transformer_blocks"
    compiled_share = 0.82
    sees_images = True
    empty_prompt = " "  # as on the model's card
    noise_in_dtype = True
    # Read or run in the programs' source; versions in docs/adapters.md.
    lora_readers = {
        "diffusers": LoraReader(LORA_STYLES, TRANSFORMER),
        "comfyui": LoraReader(
            LORA_STYLES, DIFFUSION_MODEL, note="ComfyUI reads no embeddings for this model"
        ),
        "ai-toolkit": LoraReader((TRANSFORMER, DIFFUSION_MODEL), DIFFUSION_MODEL),
        "musubi": LoraReader((KOHYA,), KOHYA),
        "kohya": LoraReader((KOHYA,), KOHYA),
        "onetrainer": LoraReader(LORA_STYLES, TRANSFORMER),
        "diffsynth": LoraReader((DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "sglang": LoraReader((DIFFUSION_MODEL, BARE), DIFFUSION_MODEL),
        "mflux": LoraReader(
            (DIFFUSION_MODEL, BARE),
            DIFFUSION_MODEL,
            note="layers outside of the blocks and modulations are not read",
        ),
        "invokeai": LoraReader((TRANSFORMER, BARE, KOHYA), TRANSFORMER),
    }
    # The text output of the last block is not used.
    idle_in_last_block = (
        *("attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    layer_names = r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mlp[._]net|mod)[._]"
    few_step_loras = FEW_STEP_LORAS
    job_names = {
        "ai-toolkit": JobNames(("qwen_image", "qwen_image_edit_plus")),
        "musubi-tuner": JobNames(("qwen_image",)),
        "SimpleTuner": JobNames(
            ("qwen_image", "qwen-image"),
            "to_q,to_k,to_v,to_out.0",
            flavours={
                "": ("qwen-image-2512", None),
                "v1.0": ("qwen-image", None),
                "v2.0": ("qwen-image-2512", None),
                "edit-v2": ("qwen-image-edit-2509", None),
            },
            modules={"Attention": "*.attn.*", "FeedForward": "*.img_mlp.*,*.txt_mlp.*"},
        ),
        "OneTrainer": JobNames(("QWEN",)),
        "diffusion-pipe": JobNames(("qwen_image",)),
        "Replicate": JobNames(("qwen_image",)),
    }
    card_code = CardCode(
        template="""\
    text = pipeline.prompt_template_encode.replace("{}", prompt)""",
        features="""\
    read = pipeline.text_encoder.model.language_model(inputs_embeds=embeds)
    return read.last_hidden_state[:, pipeline.prompt_template_encode_start_idx :]""",
        guidance="true_cfg_scale",
        guidance_off=1,
        editing_setup="""\
# transformers 5 has to know which tokens are an image's, for their rows and columns.
slot = pipeline.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
read = pipeline.text_encoder.forward
pipeline.text_encoder.forward = lambda input_ids, **given: read(
    input_ids=input_ids, **(given | {"mm_token_type_ids": (input_ids == slot).int()})
)""",
    )

    @property
    def patch_size(self) -> int:  # type: ignore[override]
        return self.transformer_config["patch_size"]

    @property
    def latent_channels(self) -> int:  # type: ignore[override]
        return self.transformer_config["in_channels"] // self.patch_size**2

    @property
    def resolution_multiple(self) -> int:
        return max(self.base.size_multiple, super().resolution_multiple)

    def _template(self, tokenizer: Any) -> str:
        return EDIT_TEMPLATE if self.base.needs_references else TEMPLATE

    def _reading_part(self, model: Any) -> nn.Module:
        return model.model.language_model  # vision part and vocabulary head are not run with it

    def _first_feature(self, prompt: TokenizedPrompt) -> int:
        return prompt.template_length

    def encode_images(self, pixels_B3PP: Tensor) -> tuple[Tensor, Tensor]:
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        frames = pixels_B3PP.to(self.device).float().unsqueeze(2)
        if frames[0, 0, 0].numel() <= WHOLE_PIXELS:
            posterior = self.vae.encode(frames).latent_dist
        else:
            posterior = DiagonalGaussianDistribution(self._encoded_in_tiles(frames))
        return self.normalized(posterior)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        latents_BCFHW = self.denormalized(latents_BCHW)
        if latents_BCHW[0, 0].numel() * self.vae_factor**2 <= WHOLE_PIXELS:
            return self.vae.decode(latents_BCFHW, return_dict=False)[0].squeeze(2)
        return self._decoded_in_tiles(latents_BCFHW).clamp_(-1, 1).squeeze(2)

    def _decoded_in_tiles(self, latents_BCFHW: Tensor) -> Tensor:
        """The VAE decoder's output for one frame, with its last blocks in tiles."""
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample

        from families.tiles import in_tiles, split_decoder, through

        decoder = self.vae.decoder
        blocks = [[*block.resnets, *(block.upsamplers or ())] for block in decoder.up_blocks]
        last = [decoder.norm_out, decoder.nonlinearity, decoder.conv_out]
        first, tiled, scale = split_decoder([*chain(*blocks), *last], QwenImageResample)
        values = decoder.mid_block(decoder.conv_in(self.vae.post_quant_conv(latents_BCFHW)))
        return in_tiles(partial(through, tiled), (), through(first, values), cell=1, scale=scale)

    def _encoded_in_tiles(self, pixels_B3FPP: Tensor) -> Tensor:
        """The VAE encoder's output for one frame, with its first blocks in tiles."""
        from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageResample

        from families.tiles import in_tiles, split_encoder, through

        encoder = self.vae.encoder
        layers = [encoder.conv_in, *encoder.down_blocks]
        tiled, rest, cell = split_encoder(layers, QwenImageResample)
        values = in_tiles(partial(through, tiled), (), pixels_B3FPP, cell=cell, scale=1 / cell)
        last = [encoder.mid_block, encoder.norm_out, encoder.nonlinearity, encoder.conv_out]
        return self.vae.quant_conv(through([*rest, *last], values))

    def velocity(self, latents_BCHW: Tensor, sigma_B: Tensor, text: Sequence[Tensor]) -> Tensor:
        return self._velocity([latents_BCHW], sigma_B, text)

    def edit_velocity(
        self,
        latents_BCHW: Tensor,
        sigma_B: Tensor,
        text: Sequence[Tensor],
        references: References,
    ) -> Tensor:
        beside = [each.expand(len(text), -1, -1, -1) for each in references.latents]
        return self._velocity([latents_BCHW, *beside], sigma_B, text)

    def _velocity(
        self, images: Sequence[Tensor], sigma_B: Tensor, text: Sequence[Tensor]
    ) -> Tensor:
        """The velocity of the first image's latents beside those of the others, each BCHW."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        from families.transfer import onto

        shapes = [tuple(side // self.patch_size for side in each.shape[-2:]) for each in images]
        rows, columns = shapes[0]
        lengths = onto(self.device, torch.tensor([len(each) for each in text]))
        text_BLD = pad_sequence(list(text), batch_first=True)
        mask_BL = torch.arange(text_BLD.shape[1], device=self.device) < lengths[:, None]
        packed = self.transformer(
            hidden_states=torch.cat([self._pack(each) for each in images], 1).to(self.dtype),
            timestep=sigma_B.to(self.dtype),
            encoder_hidden_states=text_BLD,
            encoder_hidden_states_mask=None if len(set(map(len, text))) == 1 else mask_BL,
            img_shapes=[[(1, *shape) for shape in shapes]] * len(text),
            return_dict=False,
        )[0]
        return self._unpack(packed[:, : rows * columns].float(), rows, columns)

    def guide(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """Guidance, rescaled so that each token keeps the norm it has without guidance."""
        rows, columns = (side // self.patch_size for side in conditional.shape[-2:])
        plain = self._pack(conditional)
        guided = self._pack(super().guide(conditional, unconditional, scale))
        norms = plain.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True)
        return self._unpack(guided * norms, rows, columns)

    def _pack(self, latents_BCHW: Tensor) -> Tensor:
        """BCHW to tokens [B, H/p * W/p, C * p * p]."""
        p = self.patch_size
        patches = latents_BCHW.unflatten(-1, (-1, p)).unflatten(-3, (-1, p))
        return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpack(self, tokens: Tensor, rows: int, columns: int) -> Tensor:
        """Tokens back to BCHW; the inverse of `_pack`."""
        p = self.patch_size
        patches = tokens.unflatten(1, (rows, columns)).unflatten(-1, (-1, p, p))
        return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def lora_groups(self) -> dict[str, list[str]]:
        image = ("to_q", "to_k", "to_v", "to_out.0")
        text = ("add_k_proj", "add_v_proj", "add_q_proj", "to_add_out")
        linears = {
            "attention": tuple(f"attn.{name}" for name in (*image, *text)),
            "feed_forward": tuple(
                f"{stream}_mlp.net.{name}" for stream in ("img", "txt") for name in ("0.proj", "2")
            ),
        }
        idle = self.idle_layers()
        return {
            group: [
                name
                for block in range(self.transformer_config["num_layers"])
                for linear in names
                if (name := f"transformer_blocks.{block}.{linear}") not in idle
            ]
            for group, names in linears.items()
        }

    def idle_layers(self) -> frozenset[str]:
        return self.idle_in(self.transformer_config["num_layers"])
