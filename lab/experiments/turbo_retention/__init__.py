"""Does turbo stay turbo? One subject, trained in three ways, drawn on the distilled base.

`adapter` trains on the distilled base with its training adapter, `direct` on the distilled base
alone, `undistilled` on the multi-step base. Along the way every LoRA is laid over the untouched
distilled base and drawn in few steps; the miniature's judge says what came out.
"""
