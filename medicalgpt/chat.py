"""Answers from a chat model, for every front end: terminal, files, servers, evaluation, samples during training.

`ChatEngine` keeps no conversation. A caller passes all messages each time and owns the history. What the engine
promises is the same in `chat`, `stream` and `batch`: the prompt is exactly what the tokenizer's chat template
renders, an answer does not depend on the answers that are computed beside it, and text never ends in half a character.
"""

import dataclasses
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medicalgpt import models
from medicalgpt.args import ChatArguments
from medicalgpt.attention import context_length
from medicalgpt.errors import UserError
from medicalgpt.tools import ToolFormat, beginning_at_end
from template import tool_format_of

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any]

# torch takes seeds below 2**63; half of that leaves room to add a row number.
MAX_SEED = 2**62
# As many likely tokens beside the chosen one as can be asked for.
MAX_TOP_LOG_PROBS = 20

# What a decoder writes for bytes that are no character, or not yet one.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where an answer ends.

    Args:
        max_new_tokens: most tokens of one answer; less where the model's context ends before.
        temperature: the scores are divided by it; 0 takes the best token every time (greedy).
        top_p: keep the likeliest tokens that hold this share of the probability (https://arxiv.org/abs/1904.09751).
        top_k: keep the k likeliest tokens; 0 keeps all.
        repetition_penalty: scores of tokens in the prompt or the answer are made worse by this factor
            (https://arxiv.org/abs/1909.05858); 1 does nothing.
        stop: strings that end the answer and are not part of it.
        seed: the same seed gives the same text. Unset: drawn from torch's global generator.
        log_probs: note how probable each token was in the draw; not for temperature 0.
        top_log_probs: note how probable the model finds each token, before all of the above, and so many of the
            likeliest ones beside it. Unset: nothing is noted.

    Raises:
        ValueError: a value is outside of its range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    log_probs: bool = False
    top_log_probs: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("stop", all(self.stop), "without empty strings"),
            ("log_probs", not self.log_probs or self.temperature > 0, "False where nothing is drawn"),
            (
                "top_log_probs",
                self.top_log_probs is None or 0 <= self.top_log_probs <= MAX_TOP_LOG_PROBS,
                f"from 0 to {MAX_TOP_LOG_PROBS}",
            ),
            ("seed", self.seed is None or 0 <= self.seed < MAX_SEED, "at least 0 and below 2**62"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be {wanted}.")


def sampling_from(arguments: ChatArguments) -> Sampling:
    """What the flags say of sampling.

    Raises:
        UserError: a value is outside of its range.
    """
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    stop = () if arguments.stop_str is None else (arguments.stop_str,)
    try:
        return Sampling(stop=stop, **{name: getattr(arguments, name) for name in names})
    except ValueError as error:
        raise UserError(f"--{error}") from error


@dataclass(frozen=True)
class TokenScore:
    """How probable the model found a token of its answer.

    Attributes:
        log_prob: its log-probability under the model, before temperature, penalties and the like.
        top: the likeliest tokens in its place, each with its log-probability, the best first.
    """

    token_id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Answer:
    """One finished answer.

    Attributes:
        text: the answer without stop token and stop string.
        finish_reason: "stop" if the model or a stop string ended it, "length" if the tokens ran out.
        prompt_tokens: tokens of the rendered prompt.
        completion_tokens: tokens generated, the stop token among them.
        tool_calls: calls of the tools that were offered, in OpenAI form with arguments as a dict; they are no part of
            `text`. What is no well-formed call of an offered tool stays in `text`.
        token_ids: what the model wrote, the stop token among it.
        log_probs: of each of these tokens, as it was drawn, if that was asked for.
        scores: of each of these tokens, if `top_log_probs` was set.
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    tool_calls: tuple[dict[str, Any], ...] = ()
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Request:
    """A prompt that waits for its answer, for `ChatEngine.generate`.

    Args:
        prompt_ids: the rendered prompt.
        sampling: how it is answered.
        tools: what was offered in it.
        on_text: called with each piece of text that has become certain, in the thread that generates.
        on_end: called with the answer as soon as it is there, which may be before those beside it.
        cancelled: asked at every token; True ends the answer, and `on_end` is not called.
        on_error: called if this answer fails, while those beside it go on. Unset: the error is raised for all.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling
    tools: Tools | None = None
    on_text: Callable[[str], Any] = lambda text: None
    on_end: Callable[[Answer], Any] = lambda answer: None
    cancelled: Callable[[], bool] = lambda: False
    on_error: Callable[[Exception], Any] | None = None


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
        base, adapter = models.resolve_checkpoint(model_name_or_path)
        if adapter and lora_model:
            raise UserError(
                f"{model_name_or_path} is an adapter already, and --lora_model names another: {lora_model}. Merge the "
                f"first one into its base: python merge_peft_adapter.py --lora_model {model_name_or_path}"
            )
        adapter = adapter or lora_model
        if adapter and Path(adapter).is_dir() and not Path(adapter, models.ADAPTER_CONFIG).is_file():
            raise UserError(f"{adapter} is no adapter: it has no {models.ADAPTER_CONFIG}. Check --lora_model.")
        base = models.fetch(base, hub, revision, cache_dir)
        from_adapter = adapter and Path(adapter, "tokenizer_config.json").is_file()
        tokenizer = models.load_tokenizer(
            tokenizer_name_or_path or (adapter if from_adapter else base), revision=revision, cache_dir=cache_dir
        )
        model = models.load_model(
            AutoModelForCausalLM,
            base,
            dtype=dtype,
            load_in_4bit=load_in_4bit,
            load_in_8bit=load_in_8bit,
            device_map=device_map,
            revision=revision,
            cache_dir=cache_dir,
            **models.recorded_positions(adapter),
        )
        # Quantized weights are on their device already.
        if device_map is None and not (load_in_4bit or load_in_8bit) and torch.accelerator.is_available():
            model.to(torch.accelerator.current_accelerator())
        if adapter:
            if Path(adapter, "generation_config.json").is_file():
                model.generation_config = GenerationConfig.from_pretrained(adapter)
            model = models.attach_adapter(model, adapter)
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
        spelled = models.special_tokens_in(
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
        seed = _seed_of(sampling)
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
                logits_processor=LogitsProcessorList([_Chooser(rows, width)]),
                stopping_criteria=StoppingCriteriaList([_Recorder(rows)]),
            )
        return [row.answer for row in rows]

    def row(self, request: Request) -> "Row":
        """The growing answer to a request."""
        return Row(self, request)


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


class Row:
    """One growing answer: chooses its tokens, decodes whole characters, finds stop strings, knows when it has ended.

    The draw of a token is the Gumbel-max trick (https://arxiv.org/abs/1411.0030): `argmax(score + Gumbel noise)` is
    distributed like a draw from `softmax(score)`. With a generator of its own, a row is the same alone and in any
    batch.

    Attributes:
        max_tokens: most tokens that it may have.
        ended: whether it needs no further token.
        answer: once it has ended, unless it was cancelled.
        token_ids: the answer so far, its stop token among it.
    """

    def __init__(self, engine: ChatEngine, request: Request):
        self.prompt_ids = request.prompt_ids
        self.max_tokens = request.sampling.max_new_tokens
        if engine.context_length is not None:
            self.max_tokens = min(self.max_tokens, engine.context_length - len(self.prompt_ids))
        self.ended = False
        self.answer: Answer | None = None
        self._request = request
        self._sampling = request.sampling
        self._generator = None
        if self._sampling.temperature > 0:
            self._generator = torch.Generator(engine.model.device).manual_seed(_seed_of(self._sampling))

        special = engine.special_ids
        self._tools: ToolFormat | None = tool_format_of(engine.tokenizer) if request.tools else None
        # Special tokens are left out of the text, where they could not be found as strings. The marks of a call are
        # kept: without them, it could not be told from text.
        stop = (*self._sampling.stop, *engine.stop_strings)
        self._stop_ids = engine.stop_ids.union(special[text] for text in stop if text in special)
        self._stop_strings = tuple(text for text in stop if text not in special)
        marks = self._tools.marks if self._tools else ()
        self._hidden_ids = frozenset(special.values()) - {special[mark] for mark in marks if mark in special}

        self._tokenizer = engine.tokenizer
        self.token_ids: list[int] = []
        # On the device until the end, since reading a number there makes the device wait.
        self._log_probs: list[torch.Tensor] = []
        self._scores: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # Text that is certain, how much of it was passed on, and text that may be the beginning of a stop string.
        self._text = ""
        self._passed_on = 0
        self._held = ""
        # A token's text can depend on the token before (spaces, bytes of a character), so that decoding starts at
        # `_context`, tokens before `_fresh` are decoded already, and `_seen` characters after them too.
        self._ids: list[int] = []
        self._context = 0
        self._fresh = 0
        self._seen = 0

    def choose(self, scores: torch.Tensor, before: torch.Tensor) -> None:
        """Change scores in place so that the best one is the next token.

        Args:
            scores: of the whole vocabulary, (vocabulary,), float32.
            before: tokens of the prompt and of the answer so far, (length,).
        """
        sampling = self._sampling
        plain = None if sampling.top_log_probs is None else scores.log_softmax(-1)
        if sampling.repetition_penalty != 1:
            said = before.unique()
            penalty = sampling.repetition_penalty
            scores[said] = torch.where(scores[said] > 0, scores[said] / penalty, scores[said] * penalty)
        if self._generator is not None:
            likely = _kept(scores, sampling)
            scores.copy_(_draw(likely, self._generator))
            if sampling.log_probs:
                self._log_probs.append(likely.log_softmax(-1)[scores.argmax()])
        if plain is not None:
            top = plain.topk(min(sampling.top_log_probs, len(plain)))
            self._scores.append((plain[scores.argmax()], top.indices, top.values))

    def add(self, token_id: int) -> None:
        """Take in the next token and pass on the text that became certain."""
        if self._request.cancelled():
            self.ended = True
            return
        try:
            self._add(token_id)
        except Exception as error:
            if self._request.on_error is None:
                raise
            self.ended = True
            self._request.on_error(error)

    def _add(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self._end(len(self._held), "stop")
            return
        self._ids.append(token_id)
        self._held += self._decode()
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0]
        if found:
            self._end(min(found), "stop")
        elif len(self.token_ids) == self.max_tokens:
            self._end(len(self._held), "length")
        else:
            unsure = max((beginning_at_end(self._held, stop) for stop in self._stop_strings), default=0)
            self._release(len(self._held) - unsure)
            self._pass_on(self._text[: self._tools.certain(self._text)] if self._tools else self._text)

    def _end(self, length: int, finish_reason: Literal["stop", "length"]) -> None:
        self._release(length)
        tools = self._request.tools
        text, calls = self._tools.parse(self._text, tools) if self._tools else (self._text, [])
        self._pass_on(text)
        self.ended = True
        # In a continuous batch, tokens may have been chosen behind the one that ended a stop string.
        log_probs = self._log_probs[: len(self.token_ids)]
        self.answer = Answer(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.token_ids),
            tool_calls=tuple(calls),
            token_ids=tuple(self.token_ids),
            log_probs=tuple(torch.stack(log_probs).tolist()) if log_probs else (),
            scores=tuple(
                TokenScore(token_id, log_prob.item(), tuple(zip(top_ids.tolist(), top.tolist(), strict=True)))
                for token_id, (log_prob, top_ids, top) in zip(self.token_ids, self._scores, strict=False)
            ),
        )
        self._request.on_end(self.answer)

    def _release(self, length: int) -> None:
        self._text += self._held[:length]
        self._held = self._held[length:]

    def _pass_on(self, text: str) -> None:
        if len(text) > self._passed_on:
            self._request.on_text(text[self._passed_on :])
            self._passed_on = len(text)

    def _decode(self) -> str:
        known = self._decoded(self._ids[self._context : self._fresh])
        fresh = self._decoded(self._ids[self._context :])[len(known) :]
        whole = fresh.rstrip(REPLACEMENT)
        piece = whole[self._seen :]
        self._seen = max(self._seen, len(whole))
        if whole and whole == fresh:
            self._context, self._fresh, self._seen = self._fresh, len(self._ids), 0
        return piece

    def _decoded(self, ids: list[int]) -> str:
        ids = [token_id for token_id in ids if token_id not in self._hidden_ids]
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class _Chooser(LogitsProcessor):
    """Lets each row choose among the scores of its next token."""

    def __init__(self, rows: Sequence[Row], width: int):
        self.rows = rows
        self.padding = [width - len(row.prompt_ids) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (batch, length); scores: (batch, vocabulary), float32."""
        refuse_nan(scores)
        for number, row in enumerate(self.rows):
            if not row.ended:
                row.choose(scores[number], input_ids[number, self.padding[number] :])
        return scores


class _Recorder(StoppingCriteria):
    """Hands each new token to its row, and ends the rows that have their answer."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """input_ids: (batch, length). Returns (batch,), True where a row has ended."""
        for row, token_id in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            if not row.ended:
                row.add(token_id)
        return torch.tensor([row.ended for row in self.rows], device=input_ids.device)


def refuse_nan(scores: torch.Tensor) -> None:
    """Raises UserError if a score is not a number."""
    if scores.isnan().any():
        raise UserError(
            "The model's scores are not numbers (NaN), so no token can be chosen. Weights in float16 overflow in "
            "many models: load them with --dtype bfloat16 or float32. If that is no cure, the weights are broken."
        )


def _kept(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return scores (vocabulary,) divided by the temperature, and those that top_k and top_p leave out at -inf."""
    # With the best score at 0, no temperature however small makes it overflow.
    scores = (scores - scores.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True)
        mass_before = probabilities.cumsum(-1) - probabilities
        scores = scores.masked_fill(mass_before.gather(0, order.argsort()) >= sampling.top_p, float("-inf"))
    return scores


def _draw(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return scores (vocabulary,) whose argmax is a draw from `softmax(scores)`."""
    noise = torch.empty_like(scores).exponential_(generator=generator)
    return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def _seed_of(sampling: Sampling) -> int:
    if sampling.seed is not None:
        return sampling.seed
    # Greedy answers draw nothing: a look at a model in training must not change the training's random numbers.
    return int(torch.randint(MAX_SEED, ())) if sampling.temperature > 0 else 0


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
