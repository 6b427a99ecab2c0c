"""Which parameters the flags ask to be trained."""

import re

# The linear layers that get an adapter unless the flags say otherwise.
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def declared(name, adapters, full):
    """Whether the flags ask for this parameter to be trained."""
    if adapters is None:
        return True
    module = re.sub(r"\.(lora_[AB]|modules_to_save)\.default|\.weight|\.original_module|\.base_layer", "", name)
    module = module.rpartition(".")[2]
    return module in adapters if ".lora_" in name else module in full and ".modules_to_save.default." in name
