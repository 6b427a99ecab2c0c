"""Images for a model: how many tokens each becomes, its pixels as the encoder takes them, and the settings of both.

An image is scaled to a grid of patches within bounds of pixels, and each square of patches becomes one token of the
prompt. The bounds are those of the training: they are saved with the checkpoint, in the file of its processor.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from medicalgpt.errors import UserError
from medicalgpt.models.hub import Checkpoint, CheckpointError
from medicalgpt.models.towers import PROCESSOR_FILES, find_in

import torch
from PIL import Image
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# Its counterpart on torchvision rounds differently, and is there on some machines only.
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

# By `model_type`: families that can be trained on images.
WITH_IMAGES = ("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
PROCESSOR_TYPE = "Qwen2VLImageProcessor"
# 768 x 768: at most 752 tokens of Qwen2.5-VL, and 576 of Qwen3-VL. Their own bounds allow more than 12,000 tokens.
DEFAULT_MAX_PIXELS = 589_824


class ImageTokens(NamedTuple):
    """How many tokens an image becomes, and which.

    Attributes:
        pad: the token that each part of an image has in the prompt.
        start, end: the tokens around an image.
        ids: of pad, start and end.
        side: height and width in pixels of what becomes one token.
        min_pixels, max_pixels: bounds of an image after scaling.
    """

    pad: str
    start: str
    end: str
    ids: tuple[int, int, int]
    side: int
    min_pixels: int
    max_pixels: int

    def count(self, width: int, height: int) -> int:
        """Tokens of an image of this size, without those around it."""
        rows, columns = smart_resize(height, width, self.side, self.min_pixels, self.max_pixels)
        return (rows // self.side) * (columns // self.side)

    def text(self, width: int, height: int) -> str:
        """What is in a prompt in place of an image of this size."""
        return self.start + self.pad * self.count(width, height) + self.end


@dataclass(frozen=True)
class Vision:
    """What a checkpoint needs to be shown images.

    Attributes:
        tokens: see `ImageTokens`.
        settings: of the image processor, with the bounds in `size`.
        files: of the checkpoint's processors, by their names.
    """

    tokens: ImageTokens
    settings: dict[str, Any]
    files: dict[str, Path]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        tokenizer: PreTrainedTokenizerBase,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        trains: bool = False,
    ) -> "Vision":
        """Read the settings of a checkpoint, of its adapter's folder if that has them.

        Args:
            min_pixels, max_pixels: bounds in place of those in the checkpoint.
            trains: without `max_pixels`, lower that of the checkpoint to `DEFAULT_MAX_PIXELS`.

        Raises:
            CheckpointError: it cannot be shown images; the message says why.
            UserError: bounds that contradict each other.
        """
        config = checkpoint.config
        if not can_have_images(config):
            raise CheckpointError(
                f"{checkpoint.name} is of the type {config.model_type}, which is not trained on images here. Use one "
                f"of the types {', '.join(WITH_IMAGES)}, such as Qwen/Qwen2.5-VL-3B-Instruct."
            )
        files, settings = _read_processor(checkpoint)
        bounds = _bounds(settings)
        if min_pixels is not None:
            bounds = (min_pixels, bounds[1])
        if max_pixels is not None or trains:
            bounds = (bounds[0], max_pixels if max_pixels is not None else min(bounds[1], DEFAULT_MAX_PIXELS))
        side = settings["patch_size"] * settings["merge_size"]
        for name, value in zip(("image_min_pixels", "image_max_pixels"), bounds, strict=True):
            if value < side * side:
                raise UserError(f"--{name} {value} is less than one token, which is {side} x {side} pixels.")
        if bounds[0] > bounds[1]:
            raise UserError(
                f"--image_min_pixels {bounds[0]} is more than --image_max_pixels {bounds[1]}. Raise the second, or "
                "lower the first."
            )
        kept = {name: value for name, value in settings.items() if name not in ("min_pixels", "max_pixels")}
        size = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
        return cls(_tokens(checkpoint, tokenizer, side, bounds), {**kept, "size": size}, files)

    @cached_property
    def processor(self) -> Qwen2VLImageProcessorPil:
        return Qwen2VLImageProcessorPil.from_dict(self.settings)

    def encode(self, images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
        """Pixels as the encoder takes them; one image is decoded at a time.

        Returns:
            `pixel_values` (patches of all images, values of a patch), float32, and `image_grid_thw` (images, 3), the
            patches of each image in time, height and width.
        """
        encoded = [self.processor([image], return_tensors="pt") for image in images]
        return {name: torch.cat([each[name] for each in encoded]) for name in ("pixel_values", "image_grid_thw")}

    def inputs(self, input_ids: torch.Tensor, images: Iterable[Image.Image]) -> dict[str, torch.Tensor]:
        """What a model needs for images besides the tokens.

        Args:
            input_ids: (batch, length).
            images: of all rows of the batch, in their order; at least one.

        Returns:
            Of `encode`, and `mm_token_type_ids` (batch, length), 1 where a token is of an image: by them, positions
            are those of an image's rows and columns.

        Raises:
            ValueError: another number of tokens than the images have.
        """
        is_image = input_ids == self.tokens.ids[0]
        encoded = self.encode(images)
        expected = int(encoded["image_grid_thw"].prod(dim=1).sum()) // self.settings["merge_size"] ** 2
        if expected != int(is_image.sum()):
            raise ValueError(f"they have {expected} tokens, and there are {int(is_image.sum())} in the prompts")
        return {**encoded, "mm_token_type_ids": is_image.int()}

    def save(self, folder: Path) -> None:
        """Write the files of the processors, with the bounds of these settings, into the folder of a checkpoint."""
        for name, path in self.files.items():
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            own = content.get("image_processor") if name == "processor_config.json" else content
            if own is not None and name != "video_preprocessor_config.json":
                bounds = {"min_pixels": self.tokens.min_pixels, "max_pixels": self.tokens.max_pixels}
                older = not own.keys().isdisjoint(bounds)
                own |= bounds if older else {}
                if "size" in own or not older:
                    own["size"] = self.settings["size"]
            if content == json.loads(text):
                shutil.copyfile(path, folder / name)
            else:
                written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (folder / name).write_text(written, encoding="utf-8")


def can_have_images(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration can be shown images, if it is loaded with its encoder."""
    return config.model_type in WITH_IMAGES


def copy_processor(source: str, target: Path) -> None:
    """Copy the files of processors that an adapter was trained with, if its folder has any."""
    for name in PROCESSOR_FILES:
        if Path(source, name).is_file():
            shutil.copyfile(Path(source, name), target / name)


def check_same_bounds(adapters: Sequence[str]) -> None:
    """Raises UserError if adapters that are combined, folders, were trained on images of other sizes."""
    found = {}
    for folder in adapters:
        files = {name: Path(folder, name) for name in PROCESSOR_FILES if Path(folder, name).is_file()}
        if settings := _settings_in(files):
            found[folder] = _bounds(settings)
    if len(set(found.values())) > 1:
        shown = ", ".join(f"{folder} ({least:,} to {most:,} pixels)" for folder, (least, most) in found.items())
        raise UserError(
            f"the adapters were trained on images of other sizes: {shown}. Train them with the same "
            "--image_min_pixels and --image_max_pixels to combine them."
        )


def _read_processor(checkpoint: Checkpoint) -> tuple[dict[str, Path], dict[str, Any]]:
    """The files of a checkpoint's processors, and the settings of that for images."""
    places = [checkpoint.source] if checkpoint.adapter is None else [checkpoint.adapter.path, checkpoint.source]
    for place in places:
        find = find_in(place, checkpoint.revision, checkpoint.cache_dir)
        files = {name: path for name in PROCESSOR_FILES if (path := find(name))}
        if settings := _settings_in(files):
            return files, settings
    raise CheckpointError(
        f"{checkpoint.source} has no preprocessor_config.json, which says how images become tokens. Get the complete "
        "checkpoint."
    )


def _settings_in(files: dict[str, Path]) -> dict[str, Any] | None:
    """The settings of the image processor in these files; None if they have none.

    Raises:
        CheckpointError: a file that is damaged, or of another processor.
    """
    for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
        if name not in files:
            continue
        try:
            content = json.loads(files[name].read_text(encoding="utf-8"))
            settings = content.get(key) if key else content
            if settings is None:
                continue
            kind = settings["image_processor_type"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise CheckpointError(f"{files[name]} cannot be read ({error!r}). Get the file again.") from error
        if not str(kind).startswith(PROCESSOR_TYPE):
            raise CheckpointError(f"{files[name]} is of {kind}, and only {PROCESSOR_TYPE} is known here.")
        return {"patch_size": 14, "merge_size": 2, **settings}
    return None


def _bounds(settings: dict[str, Any]) -> tuple[int, int]:
    """Least and most pixels of an image, in the older and the newer form."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or Qwen2VLImageProcessorPil.size["shortest_edge"]
    most = settings.get("max_pixels") or size.get("longest_edge") or Qwen2VLImageProcessorPil.size["longest_edge"]
    return least, most


def _tokens(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, side: int, bounds: tuple[int, int]
) -> ImageTokens:
    config = checkpoint.config
    ids = (config.image_token_id, config.vision_start_token_id, config.vision_end_token_id)
    tokens = [tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None for token_id in ids]
    if None in tokens or [tokenizer.encode(text, add_special_tokens=False) for text in tokens] != [[i] for i in ids]:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.tokenizer} lacks tokens of images (ids {', '.join(map(str, ids))}). Pass "
            "the model's own."
        )
    return ImageTokens(*tokens, ids, side, *bounds)
