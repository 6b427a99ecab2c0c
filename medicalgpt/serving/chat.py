"""Answers from a chat model, for every front end: terminal, files, servers, evaluation, samples during training.

`ChatEngine` is stateless: callers pass the whole conversation each time and own the history. What the engine guarantees
is the same in `chat`, `stream` and `batch`: the prompt is exactly what the tokenizer's chat template renders, an answer
does not depend on the others in its batch, and text never ends in half a character.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from medicalgpt.data.images import Picture, write_image_tokens
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, loading, templating
from medicalgpt.models.attention import context_length
from medicalgpt.models.hub import Checkpoint
from medicalgpt.models.vision import Vision
from medicalgpt.serving.answer_parts import END_OF_THINK, THINK
from medicalgpt.serving.generation import (
    Answer,
    AnswerState,
    Chooser,
    GenerationRequest,
    Messages,
    Recorder,
    Sampling,
    Tools,
    ignored_settings,
    plain_settings,
    seed_of,
)
from medicalgpt.serving.guides import Thoughts
from medicalgpt.serving.running_batch import RunningBatch

import torch
from loguru import logger
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)


class PromptTooLongError(UserError, ValueError):
    """The rendered prompt leaves no room for an answer."""

    def __init__(self, prompt_tokens: int, context_length: int):
        super().__init__(
            f"The prompt has {prompt_tokens} tokens; this model's context of {context_length} tokens has room for "
            f"{context_length - 1} and an answer. Shorten the text or omit older turns."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class NoChatTemplateError(UserError, ValueError):
    """The tokenizer has no chat template."""


class ChatTemplateError(UserError, ValueError):
    """The tokenizer's chat template refuses a conversation."""


class SpecialTokenError(UserError, ValueError):
    """A text in a conversation contains a special token, which the tokenizer would not read as text."""


class NoImagesError(UserError, ValueError):
    """A conversation has images, and the model cannot be shown any."""


class ChatEngine:
    """A model and its tokenizer, ready to answer.

    The engine may be called from several threads. While it answers, the model is in evaluation mode; afterwards its
    mode is restored, so a model in training can be sampled.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer, with a chat template.
        generation_config: with the stop tokens; the model's by default.
        vision: of a model that is shown images, loaded with its encoder. Also an attribute.

    Attributes:
        name: of its adapter, if several can be chosen.
        siblings: the engines on the same model, by the names of their adapters; empty if there is only one.
        context_length: maximum number of tokens of a prompt and its answer; None if the model has no limit.
        special_ids: ids of the tokenizer's special tokens, by their text.
        stop_ids: tokens that end an answer.
        stop_strings: strings that end an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        generation_config: GenerationConfig | None = None,
        vision: Vision | None = None,
    ):
        self.model = model
        self.vision = vision
        self.tokenizer = tokenizer
        self.name: str | None = None
        self.siblings: Mapping[str, ChatEngine] = {}
        self.context_length = context_length(model.config)
        self.special_ids = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self.generation_config = generation_config or model.generation_config
        ends = self.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, Sequence) else [ends]
        self.stop_ids = frozenset(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None)
        self.stop_strings = tuple(self.generation_config.stop_strings or ())

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        *,
        lora_model: str | None = None,
        tokenizer_name_or_path: str | None = None,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        device_map: str | None = None,
        hub: str = "huggingface",
        revision: str | None = None,
        cache_dir: str | None = None,
        with_images: bool = False,
    ) -> "ChatEngine":
        """Load a model, an adapter folder (its base is found by itself), or a model and an adapter on top.

        Tokenizer, chat template and stop tokens are those saved with the adapter, where it has them.

        Args:
            device_map: as accelerate has it. Unset: one accelerator if there is any, the CPU otherwise.
            with_images: load the encoder of images too, so that prompts may have images.

        Raises:
            UserError: the model or adapter cannot be found, or they do not belong together; or the model cannot be
                shown images.
        """
        checkpoint = Checkpoint.resolve(
            model_name_or_path,
            adapter=lora_model,
            adapter_flag="--lora_model",
            tokenizer=tokenizer_name_or_path,
            hub=hub,
            revision=revision,
            cache_dir=cache_dir,
        )
        return cls.from_checkpoint(
            checkpoint,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            device_map=device_map,
            with_images=with_images,
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str = "auto",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        device_map: str | None = None,
        with_images: bool = False,
    ) -> "ChatEngine":
        """Load a checkpoint that is resolved already. For the rest see `from_pretrained`."""
        tokenizer = loading.checkpoint_tokenizer(checkpoint)
        vision = Vision.of(checkpoint, tokenizer) if with_images else None
        model = load_base(
            checkpoint,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            device_map=device_map,
            with_images=with_images,
        )
        if checkpoint.adapter:
            if Path(checkpoint.adapter.path, "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(checkpoint.adapter.path)
            model = adapters.attach_adapter(model, checkpoint.adapter)
        if ignored := ignored_settings(model.generation_config):
            named = ", ".join(f"{name} {value}" for name, value in ignored.items())
            logger.info(f"generation_config.json recommends {named}; answers follow the flags and requests instead")
        return cls(model, tokenizer, vision=vision)

    def prompt_ids(
        self,
        messages: Messages,
        tools: Tools | None = None,
        pictures: Sequence[Picture] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Render a conversation up to the point where the answer begins.

        Args:
            messages: with `pictures`, a content may be a list of parts, `{"type": "text", "text": ...}` and
                `{"type": "image"}`.
            pictures: the images of all messages, in their order.
            variables: of the chat template, `enable_thinking` for example.

        Returns:
            Token ids, exactly as the chat template renders them.

        Raises:
            PromptTooLongError: no room is left for an answer.
            NoChatTemplateError: the tokenizer has no chat template.
            ChatTemplateError: the template refuses these messages.
            SpecialTokenError: a text contains a special token, the end of a turn for example.
            NoImagesError: the model was loaded without its encoder of images, or has none.
        """
        if pictures and self.vision is None:
            raise NoImagesError(
                "This model takes text only: it has no encoder of images, or was loaded without it. Inference and "
                "servers load it for checkpoints of Qwen2.5-VL and Qwen3-VL, servers with --accept_images True."
            )
        if not self.tokenizer.chat_template:
            raise NoChatTemplateError(
                "The tokenizer has no chat template, so a conversation cannot be tokenized. Train with one: "
                "supervised_finetuning.py installs a template and saves it with the model; --template_name chooses it."
            )
        parts = [(message, templating.is_trusted(message.get("role"))) for message in messages]
        found = [
            token
            for part, trusted in [*parts, (tools, True), (variables, True)]
            for token in templating.special_tokens_in(self.tokenizer, part, self.stop_ids, trusted=trusted)
        ]
        if found:
            raise SpecialTokenError(
                f"The conversation contains {', '.join(dict.fromkeys(found))}, which this model's tokenizer reads as a "
                "special token. Remove it from the text, or write it another way."
            )
        if pictures:
            messages = write_image_tokens(messages, pictures, self.vision.tokens)
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages),
                tools=tools,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                **(variables or {}),
            )
        except Exception as error:
            raise ChatTemplateError(f"The chat template cannot render these messages: {error}") from error
        self.require_room(ids)
        return ids

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a raw text for the model to continue, without the chat template.

        A tokenizer that ends each text with its end token does not do so here: the model would begin another text.

        Raises:
            PromptTooLongError: no room is left for an answer.
            ValueError: the text has no tokens.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        bare = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not bare:
            raise ValueError("The text is empty, so there is nothing to continue.")
        begins = (start for start in range(len(ids) - len(bare) + 1) if ids[start : start + len(bare)] == bare)
        ids = ids[: next(begins, len(ids)) + len(bare)]
        self.require_room(ids)
        return ids

    def thoughts(self, prompt_ids: Sequence[int]) -> Thoughts:
        """Whether an answer to a rendered conversation begins with reasoning."""
        template = self.tokenizer.chat_template or ""
        # The mark may have as many tokens as characters, and white space may follow.
        end = self.tokenizer.decode(list(prompt_ids[-2 * len(END_OF_THINK) :]), skip_special_tokens=False).rstrip()
        if THINK not in template or end.endswith(END_OF_THINK):
            return "none"
        return "begun" if end.endswith(THINK) else "possible"

    def require_room(self, prompt_ids: Sequence[int]) -> None:
        """Raises PromptTooLongError if the prompt leaves no room for an answer in the model's context."""
        if self.context_length is not None and len(prompt_ids) >= self.context_length:
            raise PromptTooLongError(len(prompt_ids), self.context_length)

    def request(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        tools: Tools | None = None,
        pictures: Sequence[Picture] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> GenerationRequest:
        """Render a conversation into a request for its next answer.

        Args:
            messages: all turns so far, `{"role": ..., "content": ...}` each. They are not changed.
            sampling: greedy and at most 512 tokens by default.
            tools: what the template may offer to the model: JSON schemas or Python functions.
            pictures: the images of all messages, in their order.
            variables: of the chat template, see `prompt_ids`.

        Raises:
            PromptTooLongError, NoChatTemplateError, ChatTemplateError, SpecialTokenError, NoImagesError: see
                `prompt_ids`.
        """
        prompt_ids = self.prompt_ids(messages, tools, pictures, variables)
        return GenerationRequest(prompt_ids, sampling or Sampling(), tools, adapter=self.name, pictures=pictures)

    def chat(
        self,
        messages: Messages,
        sampling: Sampling | None = None,
        tools: Tools | None = None,
        pictures: Sequence[Picture] = (),
    ) -> Answer:
        """Render one conversation and answer it. Arguments and errors are those of `request`."""
        return self.generate([self.request(messages, sampling, tools, pictures)])[0]

    def stream(self, request: GenerationRequest) -> "AnswerStream":
        """Answer one prompt piece by piece.

        The pieces are the text of the answer. Tool calls are known when it is complete: they are in
        `AnswerStream.answer` at the end, and text that may become a call is held back until then.
        """
        return AnswerStream(self, request)

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Callable[[int], Any] | None = None,
        tools: Sequence[Tools | None] | None = None,
        pictures: Sequence[Sequence[Picture]] | None = None,
    ) -> list[Answer]:
        """Answer many prompts, `batch_size` of similar length at a time.

        Each answer is the same as if the prompt were answered alone. With a seed, prompt i is sampled with `seed + i`,
        whatever the batch size. (In 16 bits, sums round differently in batches of another shape, so a near tie between
        two tokens may be decided differently.)

        Args:
            prompts: token ids of each rendered prompt, see `prompt_ids`.
            progress: called with the number of new answers after each batch.
            tools: what was offered in each prompt, one entry for each.
            pictures: the images of each prompt, one entry for each.

        Returns:
            Answers in the order of `prompts`.

        Raises:
            PromptTooLongError: for any prompt, before the first is answered.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, it must be at least 1.")
        for prompt_ids in prompts:
            self.require_room(prompt_ids)
        sampling = sampling or Sampling()
        sampling = dataclasses.replace(sampling, seed=seed_of(sampling))
        tools = tools or [None] * len(prompts)
        pictures = pictures or [()] * len(prompts)
        requests = [
            GenerationRequest(prompt_ids, sampling.with_seed_offset(index), offered, pictures=own)
            for index, (prompt_ids, offered, own) in enumerate(zip(prompts, tools, pictures, strict=True))
        ]
        # Longest first: if memory is too small, the first batch shows it.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            answers.update(zip(chosen, self.generate([requests[index] for index in chosen]), strict=True))
            if progress is not None:
                progress(len(chosen))
        return [answers[index] for index in range(len(prompts))]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Answer | None]:
        """Generate the answers to prompts of any lengths in one batch. No answer depends on another.

        Returns:
            The answers, None where a request was cancelled or failed on its own.
        """
        states = [self.begin(request) for request in requests]
        self.extend(states)
        return [state.answer for state in states]

    def extend(
        self,
        states: Sequence[AnswerState],
        pause: Callable[[], bool] = lambda: False,
        batch: RunningBatch | None = None,
    ) -> None:
        """Continue answers in one batch until all of them have ended, or until `pause`, called at each token, is True.

        Args:
            batch: of the model, which has computed what its answers have so far. Without one, it is computed again.
        """
        device = self.model.device
        # The current CUDA device belongs to a thread, and custom kernels run on it wherever their tensors are.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, _evaluation_mode(self.model):
            if batch is None:
                self._generate_again(states, pause)
            else:
                batch.run(states, pause)

    def _generate_again(self, states: Sequence[AnswerState], pause: Callable[[], bool]) -> None:
        device = self.model.device
        prompts = [state.ids for state in states]
        width = max(map(len, prompts))
        # Any token can be padding, since the attention mask hides it; one of a prompt is certainly in the vocabulary.
        padding = prompts[0][0]
        input_ids = torch.full((len(states), width), padding, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, prompt in enumerate(prompts):
            input_ids[number, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[number, width - len(prompt) :] = 1
        pictures = [picture for state in states for picture in state.pictures]
        shown = self.vision.inputs(input_ids, (picture.decode() for picture in pictures)) if pictures else {}
        self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            **{name: tensor.to(device) for name, tensor in shown.items()},
            # Each request chooses its own tokens: what the model's generation_config recommends would come on top.
            **plain_settings()
            | {
                "max_new_tokens": max(state.max_tokens - len(state.token_ids) for state in states),
                "eos_token_id": sorted(self.stop_ids) or None,
                "pad_token_id": padding,
                "use_cache": True,
                "stop_strings": None,
                "max_time": None,
            },
            logits_processor=LogitsProcessorList([Chooser(states, width)]),
            stopping_criteria=StoppingCriteriaList([Recorder(states, pause)]),
        )

    def adapter_on(self, model: PreTrainedModel) -> AbstractContextManager:
        """A context in which a model has the adapter of this engine switched on, and no other."""
        return nullcontext()

    def begin(self, request: GenerationRequest) -> AnswerState:
        """The answer to a request before its first token."""
        return AnswerState(
            request,
            self.tokenizer,
            special_ids=self.special_ids,
            stop_ids=self.stop_ids,
            stop_strings=self.stop_strings,
            context_length=self.context_length,
            device=self.model.device,
        )


def load_base(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    device_map: str | None = None,
    with_images: bool = False,
) -> PreTrainedModel:
    """The base of a checkpoint, without its adapter, on its device. For the arguments see `from_pretrained`."""
    model = loading.load_model(
        AutoModelForCausalLM,
        checkpoint.source,
        config=checkpoint.config,
        dtype=dtype,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        device_map=device_map,
        revision=checkpoint.revision,
        cache_dir=checkpoint.cache_dir,
        with_towers=with_images,
    )
    # Quantized weights are on their device already.
    if device_map is None and not (load_in_4bit or load_in_8bit) and torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model


def settle(future: "Future[Answer]", answer: Answer | None = None, error: BaseException | None = None) -> None:
    """Set the answer or the error of a future, unless it was cancelled in the meantime."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer)


class AnswerStream(Iterator[str]):
    """The pieces of an answer while it is generated; joined, they are the text of the answer.

    Generation begins when the first piece is requested, in its own thread. It stops when the stream is closed,
    left as a context manager, or no longer referenced. An error in it is raised by `next`.
    """

    def __init__(self, engine: ChatEngine, request: GenerationRequest):
        self._finished: list[Answer] = []
        self._pieces = _pieces(engine, request, self._finished)

    @property
    def answer(self) -> Answer | None:
        """The complete answer after the last piece; None before, and if the stream was closed early."""
        return self._finished[0] if self._finished else None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating, which takes up to one forward pass."""
        self._pieces.close()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A function, not a method: without a reference to the stream, it ends as soon as the stream is dropped.
def _pieces(engine: ChatEngine, request: GenerationRequest, finished: list[Answer]) -> Iterator[str]:
    events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    future: Future[Answer] = Future()
    request = dataclasses.replace(request, on_text=events.put, cancelled=future.cancelled)

    def work() -> None:
        try:
            (answer,) = engine.generate([request])
        except BaseException as error:
            settle(future, error=error)
        else:
            settle(future, answer)

    thread = threading.Thread(target=work, name="ChatEngine.stream", daemon=True)
    future.add_done_callback(lambda _: events.put(None))
    thread.start()
    try:
        while (piece := events.get()) is not None:
            yield piece
        finished.append(future.result())
    finally:
        future.cancel()
        thread.join()


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, training mode is restored in exactly those modules that were in it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
