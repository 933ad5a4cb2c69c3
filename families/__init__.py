"""The base models: one file for each family in `models/`, and what all of them share."""

import logging
import os

# Read when CUDA is first used. Without it memory falls into pieces of fixed size, and a plan's
# reserve is too small.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# At import they warn of optional kernels that a machine lacks and that are not used here: weights
# are unpacked by plain tensor operations.
for _name in (
    "bitsandbytes",
    "torchao",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
):
    logging.getLogger(_name).setLevel(logging.ERROR)
