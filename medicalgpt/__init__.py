"""The plumbing that the stage scripts share. What a stage teaches stays in its script."""

import logging

# On a machine without GPU two libraries announce at every import what follows from that; a user can do nothing with it.
# This stands here, and first-party imports stand first, because it has to happen before those libraries are imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
