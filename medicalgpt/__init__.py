"""The code that the programs share. What a stage is there to show stays in its script."""

import logging
import sys
import warnings

# First-party imports come first, so that this code runs before the libraries are imported.

# Without a GPU, two libraries log at every import what they cannot do; users can do nothing about it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
# DeepSpeed calls functions of torch by their old names, many times a step.
warnings.filterwarnings(
    "ignore", "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated", FutureWarning
)

# Other libraries import bitsandbytes if it is installed, which takes a second; --help does not need it.
if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    sys.modules.setdefault("bitsandbytes", None)
