"""What a stage shows of a few held-out rows before and after training."""

from collections.abc import Sequence
from typing import Protocol

from medicalgpt.data.images import Picture
from medicalgpt.logs import is_main_process
from medicalgpt.models.attention import context_length
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from medicalgpt.training.preview import decode_shortened

import torch
from loguru import logger
from transformers import PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled


class SampleLogger(Protocol):
    """What a stage shows of a few held-out rows before and after training.

    Attributes:
        shown: what is written of each row besides the answers: name and text.
    """

    shown: list[dict[str, str]]

    def answers(self) -> list[str]:
        """One text for each row, as the model is now; an empty list on every process but the first."""
        ...


class GreedyAnswers:
    """Greedy answers to a few fixed prompts, to show what training changed (a `SampleLogger`).

    They come from the engine of the front ends, so that these give the same answers afterwards. Off under ZeRO-3 and
    FSDP, where each token would gather all weights.

    Args:
        prompts: token ids.
        pictures: the images of each prompt, if the model is shown any.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: list[int],
        prompts: list[list[int]],
        pictures: Sequence[list[Picture]] = (),
    ):
        sharded = is_deepspeed_zero3_enabled() or trainer.is_fsdp_enabled
        if prompts and sharded:
            logger.info("no sample answers: the weights are sharded over the processes")
        room = context_length(trainer.model.config)
        pictures = pictures or [[] for _ in prompts]
        both = [pair for pair in zip(prompts, pictures, strict=True) if room is None or len(pair[0]) < room]
        fitting, self.pictures = [ids for ids, _ in both], [own for _, own in both]
        if len(fitting) < len(prompts):
            logger.info(
                f"{len(prompts) - len(fitting)} sample prompt(s) skipped: they fill the context of {room} tokens"
            )
        self.trainer, self.tokenizer, self.stop_ids = trainer, tokenizer, stop_ids
        self.prompts = [] if sharded else fitting
        self.shown = [{"prompt": decode_shortened(tokenizer, ids)} for ids in self.prompts]

    def answers(self, max_new_tokens: int = 64) -> list[str]:
        """Generated answers to all prompts; an empty list on every process but the first."""
        if not self.prompts or not is_main_process():
            return []
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        engine = ChatEngine(model, self.tokenizer, vision=self.trainer.vision)
        # Those that will be saved; a base's own may be others.
        engine.stop_ids, engine.stop_strings = frozenset(self.stop_ids), ()
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=bool(self.trainer.args.bf16)):
            # In 16 bits, sums round differently in batches of another size, and front ends mostly answer one at a time.
            answers = engine.batch(self.prompts, Sampling(max_new_tokens), batch_size=1, pictures=self.pictures)
        return [answer.text for answer in answers]
