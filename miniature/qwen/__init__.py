"""The second miniature: the classes of Qwen-Image-2.1, for text-to-image and for editing.

It shares dataset, tokenizer, judge and recipe with the first. See `docs/miniature.md`.
"""
