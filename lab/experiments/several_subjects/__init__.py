"""Two subjects in one LoRA, with and without images of both together, against a LoRA for each."""
