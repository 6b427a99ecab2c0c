"""Answers from a chat model, for every front end: terminal, files, servers, evaluation, samples during training.

`ChatEngine` keeps no conversation. A caller passes all messages each time and owns the history. What the engine
promises is the same in `chat`, `stream` and `batch`: the prompt is exactly what the tokenizer's chat template
renders, an answer does not depend on the answers that are computed beside it, and text never ends in half a character.
"""

import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from medicalgpt.args import ChatArguments
from medicalgpt.errors import UserError
from medicalgpt.models import adapters, loading, templating
from medicalgpt.models.attention import context_length
from medicalgpt.models.hub import ADAPTER_CONFIG, fetch, recorded_positions, resolve_checkpoint
from medicalgpt.serving.generation import Answer, Chooser, Messages, Recorder, Request, Row, Sampling, Tools, seed_of

import torch
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
            f"{context_length - 1} and an answer. Shorten the text or leave out older turns."
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class NoChatTemplateError(UserError, ValueError):
    """The tokenizer cannot render any conversation."""


class ChatTemplateError(UserError, ValueError):
    """The tokenizer's chat template refuses a conversation."""


class SpecialTokenError(UserError, ValueError):
    """A text in a conversation spells a special token, so that the tokenizer would not read it as text."""


class ChatEngine:
    """A model and its tokenizer, ready to answer.

    The engine may be called from several threads. It puts the model in evaluation mode while it answers and
    puts it back afterwards, so that a model in training can be sampled.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer, with a chat template.

    Attributes:
        context_length: tokens of a prompt and its answer that the model can hold; None where it says none.
        special_ids: special tokens of the tokenizer, from text to id.
        stop_ids: tokens that end an answer.
        stop_strings: texts that end an answer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length(model.config)
        self.special_ids = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ends = model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, Sequence) else [ends]
        self.stop_ids = frozenset(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None)
        self.stop_strings = tuple(model.generation_config.stop_strings or ())

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
    ) -> "ChatEngine":
        """Load a model, an adapter folder (its base is found by itself), or a model and an adapter on top.

        Tokenizer, chat template and stop tokens are those saved with the adapter, where it has them.

        Args:
            device_map: as accelerate has it. Unset: one accelerator if there is any, the CPU otherwise.

        Raises:
            UserError: the model or adapter cannot be found, or they do not belong together.
        """
        base, adapter = resolve_checkpoint(model_name_or_path)
        if adapter and lora_model:
            raise UserError(
                f"{model_name_or_path} is an adapter already, and --lora_model names another: {lora_model}. Merge the "
                f"first one into its base: python merge_peft_adapter.py --lora_model {model_name_or_path}"
            )
        adapter = adapter or lora_model
        if adapter and Path(adapter).is_dir() and not Path(adapter, ADAPTER_CONFIG).is_file():
            raise UserError(f"{adapter} is no adapter: it has no {ADAPTER_CONFIG}. Check --lora_model.")
        base = fetch(base, hub, revision, cache_dir)
        from_adapter = adapter and Path(adapter, "tokenizer_config.json").is_file()
        tokenizer = loading.load_tokenizer(
            tokenizer_name_or_path or (adapter if from_adapter else base), revision=revision, cache_dir=cache_dir
        )
        model = loading.load_model(
            AutoModelForCausalLM,
            base,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            device_map=device_map,
            revision=revision,
            cache_dir=cache_dir,
            **recorded_positions(adapter),
        )
        # Quantized weights are on their device already.
        if device_map is None and not (load_in_4bit or load_in_8bit) and torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        if adapter:
            if Path(adapter, "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(adapter)
            model = adapters.attach_adapter(model, adapter)
        return cls(model, tokenizer)

    @classmethod
    def from_arguments(cls, arguments: ChatArguments) -> "ChatEngine":
        """Load what the flags say. Errors are those of `from_pretrained`."""
        return cls.from_pretrained(
            arguments.model_name_or_path,
            lora_model=arguments.lora_model,
            tokenizer_name_or_path=arguments.tokenizer_name_or_path,
            dtype=arguments.dtype,
            load_in_4bit=arguments.load_in_4bit,
            load_in_8bit=arguments.load_in_8bit,
            device_map=arguments.device_map,
            hub=arguments.hub,
            revision=arguments.model_revision,
            cache_dir=arguments.cache_dir,
        )

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Render a conversation up to the point where the answer begins.

        Returns:
            Token ids, exactly as the chat template renders them.

        Raises:
            PromptTooLongError: no room is left for an answer.
            NoChatTemplateError: the tokenizer has no chat template.
            ChatTemplateError: the template refuses these messages.
            SpecialTokenError: a text would be read as a special token, the end of a turn for example.
        """
        if not self.tokenizer.chat_template:
            raise NoChatTemplateError(
                "The tokenizer has no chat template, so a conversation cannot be put into tokens. Train one in: "
                "supervised_finetuning.py installs a template and saves it with the model; --template_name chooses it."
            )
        spelled = templating.special_tokens_in(
            self.tokenizer, json.dumps([list(messages), tools], ensure_ascii=False, default=str)
        )
        if spelled:
            raise SpecialTokenError(
                f"The conversation holds {', '.join(spelled)}, which this model's tokenizer reads as a special token. "
                "Take it out of the text, or write it in another way."
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise ChatTemplateError(f"The chat template cannot render these messages: {error}") from error
        return self._that_fit(ids)

    def completion_ids(self, text: str) -> list[int]:
        """Tokens of a raw text that the model shall go on with, without any chat template.

        Raises:
            PromptTooLongError: no room is left for an answer.
            ValueError: the text has no tokens.
        """
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if not ids:
            raise ValueError("The text is empty, so there is nothing to go on with.")
        return self._that_fit(ids)

    def _that_fit(self, ids: list[int]) -> list[int]:
        if self.context_length is not None and len(ids) >= self.context_length:
            raise PromptTooLongError(len(ids), self.context_length)
        return ids

    def chat(self, messages: Messages, sampling: Sampling | None = None, tools: Tools | None = None) -> Answer:
        """Answer one conversation.

        Args:
            messages: all turns so far, `{"role": ..., "content": ...}` each. They are not changed.
            sampling: greedy and at most 512 tokens by default.
            tools: what the template may offer to the model: JSON schemas or Python functions.

        Raises:
            PromptTooLongError, NoChatTemplateError, ChatTemplateError, SpecialTokenError: see `prompt_ids`.
        """
        request = Request(self.prompt_ids(messages, tools), sampling or Sampling(), tools)
        return self.generate([request])[0]

    def stream(
        self, messages: Messages, sampling: Sampling | None = None, tools: Tools | None = None
    ) -> "AnswerStream":
        """Answer one conversation piece by piece. Arguments and errors are those of `chat`.

        The pieces are the text of the answer. Calls of tools are known when it is whole: they are in the answer at the
        end, and what may become a call is held back until then.
        """
        prompt, sampling = self.prompt_ids(messages, tools), sampling or Sampling()

        def start(on_text: Callable[[str], Any]) -> tuple["Future[Answer]", Callable[[], Any]]:
            future: Future[Answer] = Future()

            def work() -> None:
                request = Request(prompt, sampling, tools, on_text, cancelled=future.cancelled)
                try:
                    (answer,) = self.generate([request])
                except BaseException as error:
                    settle(future, error=error)
                else:
                    settle(future, answer)

            thread = threading.Thread(target=work, name="ChatEngine.stream", daemon=True)
            thread.start()
            return future, thread.join

        return AnswerStream(start)

    def batch(
        self,
        conversations: Sequence[Messages],
        sampling: Sampling | None = None,
        batch_size: int = 8,
        progress: Callable[[int], Any] | None = None,
        tools: Sequence[Tools | None] | None = None,
    ) -> list[Answer]:
        """Answer many conversations, `batch_size` of similar length at a time.

        Each answer is the one that `chat` gives. With a seed, conversation i is sampled with `seed + i`, whatever
        the batch size. (In 16 bits, sums round differently in batches of another shape, so that a near tie between
        two tokens may fall the other way.)

        Args:
            progress: called with the number of new answers after each batch.
            tools: one entry for each conversation.

        Returns:
            Answers in the order of `conversations`.

        Raises:
            PromptTooLongError, NoChatTemplateError, ChatTemplateError, SpecialTokenError: for any conversation,
                before the first is answered.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, it must be at least 1.")
        sampling = sampling or Sampling()
        seed = seed_of(sampling)
        tools = tools or [None] * len(conversations)
        prompts = [self.prompt_ids(messages, offered) for messages, offered in zip(conversations, tools, strict=True)]
        # Longest first: if memory does not suffice, that shows in the first batch.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        answers: dict[int, Answer] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            requests = [
                Request(prompts[index], dataclasses.replace(sampling, seed=seed + index), tools[index])
                for index in chosen
            ]
            answers.update(zip(chosen, self.generate(requests), strict=True))
            if progress is not None:
                progress(len(chosen))
        return [answers[index] for index in range(len(prompts))]

    def generate(self, requests: Sequence[Request]) -> list[Answer | None]:
        """Run the model on prompts of any lengths until each has its answer. No answer depends on another.

        Returns:
            The answers, None where a request was cancelled or failed by itself.
        """
        device = self.model.device
        rows = [self.row(request) for request in requests]
        width = max(len(row.prompt_ids) for row in rows)
        # Any token will do as padding, since the attention mask hides it; a prompt's own is sure to be in the model.
        padding = rows[0].prompt_ids[0]
        input_ids = torch.full((len(rows), width), padding, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for number, row in enumerate(rows):
            input_ids[number, width - len(row.prompt_ids) :] = torch.tensor(row.prompt_ids)
            attention_mask[number, width - len(row.prompt_ids) :] = 1
        # The current CUDA device belongs to a thread, and custom kernels run on it wherever their tensors are.
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, _evaluation_mode(self.model):
            self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max(row.max_tokens for row in rows),
                eos_token_id=sorted(self.stop_ids) or None,
                pad_token_id=padding,
                use_cache=True,
                # Choosing the token is the work of the rows: whatever the model's generation_config says about
                # sampling would come on top, and would see the padding.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                stop_strings=None,
                logits_processor=LogitsProcessorList([Chooser(rows, width)]),
                stopping_criteria=StoppingCriteriaList([Recorder(rows)]),
            )
        return [row.answer for row in rows]

    def row(self, request: Request) -> "Row":
        """The growing answer to a request."""
        return Row(
            request,
            self.tokenizer,
            special_ids=self.special_ids,
            stop_ids=self.stop_ids,
            stop_strings=self.stop_strings,
            context_length=self.context_length,
            device=self.model.device,
        )


def settle(future: "Future[Answer]", answer: Answer | None = None, error: BaseException | None = None) -> None:
    """Give a future its answer or error, unless it was cancelled meanwhile."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(answer)


class AnswerStream(Iterator[str]):
    """The pieces of an answer while it is generated; joined, they are the text of the answer.

    Generation begins with the first piece that is asked for. It stops when the stream is closed, left as a context
    manager, or no longer referenced. An error in it is raised by `next`.

    Args:
        start: begins to generate. Given what is to be called with each piece, it returns the future answer, which may
            be cancelled, and a function that waits until nothing is generated any more.
    """

    def __init__(self, start: Callable[[Callable[[str], Any]], tuple["Future[Answer]", Callable[[], Any]]]):
        self._finished: list[Answer] = []
        self._pieces = _pieces(start, self._finished)

    @property
    def answer(self) -> Answer | None:
        """The whole answer after the last piece; None before, and if the stream was closed early."""
        return self._finished[0] if self._finished else None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating, which takes up to one step of the model."""
        self._pieces.close()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A function, not a method: without a reference to the stream, it ends as soon as the stream is dropped.
def _pieces(
    start: Callable[[Callable[[str], Any]], tuple["Future[Answer]", Callable[[], Any]]], finished: list[Answer]
) -> Iterator[str]:
    events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    future, wait = start(events.put)
    future.add_done_callback(lambda _: events.put(None))
    try:
        while (piece := events.get()) is not None:
            yield piece
        finished.append(future.result())
    finally:
        future.cancel()
        wait()


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout and the like off, and afterwards on again in just those modules where they were on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
