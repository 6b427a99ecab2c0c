"""Rows with images in training: whether the base can be shown them, and what they rule out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import ImageSample, Sample, prompt_pictures, render_prompts
from medicalgpt.data.lengths import list_lengths
from medicalgpt.data.loading import LoadedData
from medicalgpt.data.prepared import load_and_encode
from medicalgpt.errors import UserError
from medicalgpt.formats.conversion import to_messages, to_messages_with_images
from medicalgpt.models.hub import Checkpoint, CheckpointError
from medicalgpt.models.templating import with_image_parts
from medicalgpt.models.vision import WITH_IMAGES, Vision
from medicalgpt.training.engines import are_weights_sharded

from datasets import Dataset
from loguru import logger
from transformers import PreTrainedTokenizerBase, TrainingArguments

FLAGS = ("image_min_pixels", "image_max_pixels")


@dataclass(frozen=True)
class ChatRows:
    """How conversations are read and encoded: with their images, or such that a row with images is refused.

    Attributes:
        vision: what the base needs to be shown images; None if they are refused.
    """

    vision: Vision | None

    @property
    def convert(self) -> Callable[..., dict[str, Any]]:
        """The converter of such rows."""
        return to_messages_with_images if self.vision else to_messages

    @property
    def sample(self) -> type:
        """What `encode_chat` makes of such a row."""
        return ImageSample if self.vision else Sample

    @property
    def options(self) -> dict[str, Any]:
        """Further arguments of `encode_chat`."""
        return {"images": self.vision.tokens} if self.vision else {}

    def load(
        self, arguments: DataArguments, encode: partial, **options: Any
    ) -> tuple[LoadedData, Dataset, Dataset | None]:
        """The rows and their samples; for the arguments and errors see `load_and_encode`."""
        return load_and_encode(arguments, self.convert, encode, sample=self.sample, **options)


def choose_rows(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, args: Any, data_args: DataArguments
) -> ChatRows:
    """Read images if the base can be shown any.

    Args:
        args: of the stage, with the flags of `FLAGS`.

    Raises:
        UserError: such a flag without effect, or bounds that contradict each other.
    """
    given = [name for name in FLAGS if getattr(args, name) is not None]
    prevented = next((name for name in ("streaming", "prepared_dir") if getattr(data_args, name)), None)
    reason = f"rows with images are not trained on with --{prevented}." if prevented else None
    if reason is None:
        try:
            bounds = {"min_pixels": args.image_min_pixels, "max_pixels": args.image_max_pixels}
            return ChatRows(Vision.of(checkpoint, tokenizer, **bounds, trains=True))
        except CheckpointError as error:
            reason = str(error)
    if given:
        raise UserError(f"--{given[0]} would have no effect: {reason}")
    if checkpoint.config.model_type in WITH_IMAGES:
        logger.info(f"rows with images will be refused: {reason}")
    return ChatRows(None)


def use_vision(
    vision: Vision | None,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    validation: Dataset | None,
) -> tuple[Vision | None, Dataset, Dataset | None]:
    """Decide by the encoded rows whether the model is to be shown images.

    Args:
        vision: of `ChatRows`.
        tokenizer: if so, its chat template learns to write images, for other programs.
        train, validation: samples of `ImageSample` if there is `vision`.

    Returns:
        `vision`, or None if no row has an image; and the samples, without `pictures` in that case.

    Raises:
        UserError: flags that do not work with images, or that have no effect without any.
    """
    if vision is None:
        return None, train, validation
    sides = [side for side in (train, validation) if side is not None]
    if not any(list_lengths(side, "pictures").any() for side in sides):
        if given := [name for name in FLAGS if getattr(args, name) is not None]:
            raise UserError(f"--{given[0]} would have no effect: no row has an image. Omit it.")
        return None, *(side and side.remove_columns("pictures") for side in (train, validation))
    if args.packing:
        raise UserError(
            "--packing True: rows with images are not packed, since positions that restart with each row of a block "
            "are not those of the rows and columns of an image. Omit it; rows of similar length share a batch."
        )
    if are_weights_sharded(args):
        raise UserError(
            "rows with images are not trained on with weights that are sharded (ZeRO-3, FSDP): a process whose batch "
            "has no image would not take part in gathering the encoder, and the others would wait for it. Use DDP or "
            "ZeRO-2."
        )
    if args.n_gpu > 1:
        raise UserError(
            f"a single process sees {args.n_gpu} GPUs, over which images cannot be divided. Start one process per GPU, "
            f"as with torchrun --nproc_per_node {args.n_gpu}, or make one visible, as with CUDA_VISIBLE_DEVICES=0."
        )
    tokens = vision.tokens
    logger.info(
        f"images are scaled to {tokens.min_pixels:,} to {tokens.max_pixels:,} pixels, one token per {tokens.side} x "
        f"{tokens.side}; the encoder stays as it is"
    )
    tokenizer.chat_template = with_image_parts(tokenizer, tokens.start + tokens.pad + tokens.end)
    return vision, train, validation


def render_samples(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]], count: int, vision: Vision | None
) -> dict[str, Any]:
    """Prompts of up to `count` rows and their images, as arguments of `Run.train_and_save`."""
    return {
        "sample_prompts": render_prompts(tokenizer, rows, count, vision and vision.tokens),
        "sample_pictures": prompt_pictures(rows, count),
    }
