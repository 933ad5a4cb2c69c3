"""What is laid over a base: LoRA, placeholder, and the archive that carries them."""
