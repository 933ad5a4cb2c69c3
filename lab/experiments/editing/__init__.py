"""Does training work on a base with Qwen-Image-2.1's classes, and training on pairs?"""
