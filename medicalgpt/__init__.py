"""The code that the programs share. What a stage is there to show stays in its script."""

import logging
import sys
import warnings

# First-party imports come first, so that this code runs before the libraries are imported.

# Messages of libraries that are not shown: the logger, a part of the text, and why it says nothing to a user.
KNOWN_MESSAGES = (
    (
        "bitsandbytes.backends.cpu.ops",
        "Failed to load CPU gemm_4bit_forward",
        "a faster kernel for 4 bit on a CPU, from a hub that is not asked; the built-in one computes the same",
    ),
    ("DeepSpeed", "Setting accelerator to CPU", "logged at every import without a GPU, also where nothing uses it"),
    (
        "transformers.trainer_utils",
        "The tokenizer has new PAD/BOS/EOS tokens",
        "the model is given the stop and padding ids of the stage on purpose; run.json has them",
    ),
)
for _name, _text, _reason in KNOWN_MESSAGES:
    logging.getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())
# DeepSpeed calls functions of torch by their old names, many times a step.
warnings.filterwarnings(
    "ignore", "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated", FutureWarning
)

# Other libraries import bitsandbytes if it is installed, which takes a second; --help does not need it.
if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    sys.modules.setdefault("bitsandbytes", None)
