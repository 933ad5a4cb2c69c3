"""The base models: one file for each family in `models/`, and what all of them share."""

import logging
import os

# Read when CUDA is first used. Without it, memory is fragmented into blocks of fixed size, and the
# reserve of the memory plan is too small.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# At import these warn about missing optional kernels that are not used here: weights are
# dequantized by plain tensor operations.
for _name in (
    "bitsandbytes",
    "torchao",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
