"""The published models' sizes, for planning before anything is downloaded.

Only what shapes a model; what is not named here is the class's default, which for both
transformers and Qwen-Image's VAE is the published model. From the config.json files of
Tongyi-MAI/Z-Image-Turbo and Qwen/Qwen-Image; all bases of a family share them.
"""

from typing import Any

PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "z_image": {
        "transformer": {},
        "text_encoder": {  # Qwen3-4B
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        "vae": {  # FLUX.1's
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [128, 256, 512, 512],
            "layers_per_block": 2,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    },
    "qwen_image": {
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
    },
}
