"""The flag of front ends that can be sent images."""

from dataclasses import dataclass, field


@dataclass
class ImageServingArguments:
    """Of a front end that can be sent images."""

    accept_images: bool = field(
        default=False,
        metadata={
            "help": "Load the model's encoder of images too and accept images, for checkpoints of Qwen2.5-VL and "
            "Qwen3-VL. Requests are then answered in static batches."
        },
    )
