"""The plumbing that the stage scripts share. What a stage teaches stays in its script."""

import logging
import sys

# First-party imports stand first, so that what stands here happens before the libraries are imported.

# On a machine without GPU two libraries announce at every import what follows from that; a user can do nothing with it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())

# Other libraries import bitsandbytes where it is installed, which takes a second; the list of flags needs none of it.
if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
    sys.modules.setdefault("bitsandbytes", None)
