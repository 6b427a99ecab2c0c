"""Answers from a chat model, for every front end: terminal, files, servers, evaluation, samples during training.

`ChatEngine` keeps no conversation. A caller passes all messages each time and owns the history. What the engine
promises is the same in `chat`, `stream` and `batch`: the prompt is exactly what the tokenizer's chat template
renders, an answer does not depend on the answers that are computed beside it, and text never ends in half a character.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from medicalgpt import models
from medicalgpt.attention import context_length
from medicalgpt.errors import UserError
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
            ("seed", self.seed is None or 0 <= self.seed < MAX_SEED, "at least 0 and below 2**62"),
        ):
            if not right:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be {wanted}.")


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
    """

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    tool_calls: tuple[dict[str, Any], ...] = ()
    token_ids: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()


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


class ChatEngine:
    """A model and its tokenizer, ready to answer.

    The engine may be called from several threads. It puts the model in evaluation mode while it answers and
    puts it back afterwards, so that a model in training can be sampled.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer, with a chat template.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model = model
        self.tokenizer = tokenizer
        self.context_length = context_length(model.config)
        self._special_ids = {
            token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        ends = model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, Sequence) else [ends]
        self._stop_ids = frozenset(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None)
        self._stop_strings = tuple(model.generation_config.stop_strings or ())

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

    def prompt_ids(self, messages: Messages, tools: Tools | None = None) -> list[int]:
        """Render a conversation up to the point where the answer begins.

        Returns:
            Token ids, exactly as the chat template renders them.

        Raises:
            PromptTooLongError: no room is left for an answer.
            NoChatTemplateError: the tokenizer has no chat template.
            ChatTemplateError: the template refuses these messages.
        """
        if not self.tokenizer.chat_template:
            raise NoChatTemplateError(
                "The tokenizer has no chat template, so a conversation cannot be put into tokens. Train one in: "
                "supervised_finetuning.py installs a template and saves it with the model; --template_name chooses it."
            )
        try:
            ids = self.tokenizer.apply_chat_template(
                list(messages), tools=tools, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except Exception as error:
            raise ChatTemplateError(f"The chat template cannot render these messages: {error}") from error
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
            PromptTooLongError, NoChatTemplateError, ChatTemplateError: see `prompt_ids`.
        """
        return self._generate([self.prompt_ids(messages, tools)], [sampling or Sampling()], [tools])[0].answer()

    def stream(
        self, messages: Messages, sampling: Sampling | None = None, tools: Tools | None = None
    ) -> "AnswerStream":
        """Answer one conversation piece by piece. Arguments and errors are those of `chat`.

        The pieces are the text as it is generated. The calls of tools in it are known when it is whole: they are in the
        answer at the end, and no longer in its text.
        """
        prompt, sampling = self.prompt_ids(messages, tools), sampling or Sampling()
        return AnswerStream(
            lambda on_text, cancelled: self._generate([prompt], [sampling], [tools], on_text, cancelled)[0]
        )

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
            PromptTooLongError, NoChatTemplateError, ChatTemplateError: for any conversation, before the first is
                answered.
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
            replies = self._generate(
                [prompts[index] for index in chosen],
                [dataclasses.replace(sampling, seed=seed + index) for index in chosen],
                [tools[index] for index in chosen],
            )
            answers.update(zip(chosen, (reply.answer() for reply in replies), strict=True))
            if progress is not None:
                progress(len(chosen))
        return [answers[index] for index in range(len(prompts))]

    def _generate(
        self,
        prompts: Sequence[list[int]],
        samplings: Sequence[Sampling],
        tools: Sequence[Tools | None],
        on_text: Callable[[str], Any] | None = None,
        cancelled: threading.Event | None = None,
    ) -> list["_Reply"]:
        """Run the model on prompts of any lengths until each has its answer, or until `cancelled` is set."""
        device = self.model.device
        replies = [self._reply_to(*each) for each in zip(prompts, samplings, tools, strict=True)]
        width = max(len(prompt) for prompt in prompts)
        # Any token will do as padding, since the attention mask hides it; a prompt's own is sure to be in the model.
        input_ids = torch.full((len(prompts), width), prompts[0][0], dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        # The current CUDA device belongs to a thread, and custom kernels run on it wherever their tensors are.
        sampler = _Sampler(samplings, prompts, device)
        on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with on_device, _evaluation_mode(self.model):
            self.model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max(reply.max_tokens for reply in replies),
                eos_token_id=sorted(self._stop_ids) or None,
                pad_token_id=prompts[0][0],
                use_cache=True,
                # Choosing the token is the work of _Sampler: whatever the model's generation_config says about
                # sampling would come on top, and would see the padding.
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,
                stop_strings=None,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([_Recorder(replies, on_text, cancelled)]),
            )
        for reply, log_probs in zip(replies, sampler.log_probs, strict=True):
            reply.log_probs = torch.stack(log_probs).tolist() if log_probs else []
        return replies

    def _reply_to(self, prompt: list[int], sampling: Sampling, tools: Tools | None = None) -> "_Reply":
        form = tool_format_of(self.tokenizer) if tools else None
        # Without its marks, a call could not be told from text.
        marks = {self._special_ids[mark] for mark in form.marks if mark in self._special_ids} if form else None
        stop = (*sampling.stop, *self._stop_strings)
        room = sampling.max_new_tokens
        if self.context_length is not None:
            room = min(room, self.context_length - len(prompt))
        return _Reply(
            tokenizer=self.tokenizer,
            prompt_tokens=len(prompt),
            max_tokens=room,
            # Special tokens are left out of decoded text, where they could not be found as strings.
            stop_ids=self._stop_ids.union(self._special_ids[text] for text in stop if text in self._special_ids),
            stop_strings=tuple(text for text in stop if text not in self._special_ids),
            read_calls=partial(form.parse, tools=tools) if form else None,
            hidden_ids=frozenset(self._special_ids.values()) - marks if marks else None,
        )


class AnswerStream(Iterator[str]):
    """The pieces of an answer while it is generated; joined, they are the text of the answer and its tool calls.

    Generation runs in a thread of its own from the first piece on. It stops when the stream is closed, left as a
    context manager, or no longer referenced. An error in it is raised by `next`.
    """

    def __init__(self, generate: Callable[[Callable[[str], Any], threading.Event], "_Reply"]):
        self._finished: list[Answer] = []
        self._pieces = _run_in_thread(generate, self._finished)

    @property
    def answer(self) -> Answer | None:
        """The whole answer after the last piece; None before, and if the stream was closed early."""
        return self._finished[0] if self._finished else None

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating; returns when the thread has ended, which takes up to one step of the model."""
        self._pieces.close()

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# A function, not a method: without a reference to the stream, it ends as soon as the stream is dropped.
def _run_in_thread(
    generate: Callable[[Callable[[str], Any], threading.Event], "_Reply"], finished: list[Answer]
) -> Iterator[str]:
    events: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    cancelled = threading.Event()

    def work() -> None:
        try:
            reply = generate(events.put, cancelled)
            if not cancelled.is_set():
                finished.append(reply.answer())
            events.put(None)
        except BaseException as error:
            events.put(error)

    thread = threading.Thread(target=work, name="ChatEngine.stream", daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        cancelled.set()
        thread.join()


class _Reply:
    """One growing answer: decodes whole characters, finds stop strings, knows when it has ended.

    Attributes:
        text: what is certain to be in the answer.
        finish_reason: None while it grows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        max_tokens: int,
        stop_ids: frozenset[int],
        stop_strings: tuple[str, ...],
        read_calls: Callable[[str], tuple[str, list[dict[str, Any]]]] | None = None,
        hidden_ids: frozenset[int] | None = None,
    ):
        self.max_tokens = max_tokens
        self.text = ""
        self.finish_reason: Literal["stop", "length"] | None = None
        self._tokenizer = tokenizer
        self._prompt_tokens = prompt_tokens
        self._token_ids: list[int] = []
        self.log_probs: list[float] = []
        self._stop_ids = stop_ids
        self._stop_strings = stop_strings
        self._read_calls = read_calls
        # Unset: all special tokens are left out of the text.
        self._hidden_ids = hidden_ids
        # Text that may be the beginning of a stop string.
        self._held = ""
        # A token's text can depend on the token before (spaces, bytes of a character), so that decoding starts at
        # `_context`, tokens before `_fresh` are decoded already, and `_seen` characters after them too.
        self._ids: list[int] = []
        self._context = 0
        self._fresh = 0
        self._seen = 0

    def add(self, token_id: int) -> str:
        """Take in the next token and return the text that became certain."""
        self._token_ids.append(token_id)
        if token_id in self._stop_ids:
            return self._release(len(self._held), "stop")
        self._ids.append(token_id)
        self._held += self._decode()
        found = [at for at in map(self._held.find, self._stop_strings) if at >= 0]
        if found:
            return self._release(min(found), "stop")
        if len(self._token_ids) == self.max_tokens:
            return self._release(len(self._held), "length")
        return self._release(len(self._held) - self._unsure(), None)

    def answer(self) -> Answer:
        text, calls = self._read_calls(self.text) if self._read_calls else (self.text, [])
        ids = tuple(self._token_ids)
        # A row that has ended is drawn for until the last one of its batch has.
        log_probs = tuple(self.log_probs[: len(ids)])
        return Answer(text, self.finish_reason, self._prompt_tokens, len(ids), tuple(calls), ids, log_probs)

    def _decode(self) -> str:
        known = self._text(self._ids[self._context : self._fresh])
        fresh = self._text(self._ids[self._context :])[len(known) :]
        whole = fresh.rstrip(REPLACEMENT)
        piece = whole[self._seen :]
        self._seen = max(self._seen, len(whole))
        if whole and whole == fresh:
            self._context, self._fresh, self._seen = self._fresh, len(self._ids), 0
        return piece

    def _text(self, ids: list[int]) -> str:
        if self._hidden_ids is not None:
            ids = [token_id for token_id in ids if token_id not in self._hidden_ids]
        return self._tokenizer.decode(
            ids, skip_special_tokens=self._hidden_ids is None, clean_up_tokenization_spaces=False
        )

    def _unsure(self) -> int:
        """Length of the longest end of the held text that a stop string begins with."""
        return max(
            (
                length
                for stop in self._stop_strings
                for length in range(1, len(stop))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _release(self, length: int, finish_reason: Literal["stop", "length"] | None) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self.text += text
        self.finish_reason = finish_reason
        return text


class _Recorder(StoppingCriteria):
    """Hands each new token to its reply, and ends the rows whose reply has ended."""

    def __init__(
        self, replies: Sequence[_Reply], on_text: Callable[[str], Any] | None, cancelled: threading.Event | None
    ):
        self.replies = replies
        self.on_text = on_text
        self.cancelled = cancelled

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """input_ids: (batch, length). Returns (batch,), True where a row has ended."""
        for reply, token_id in zip(self.replies, input_ids[:, -1].tolist(), strict=True):
            if reply.finish_reason is None:
                text = reply.add(token_id)
                if text and self.on_text is not None:
                    self.on_text(text)
        stopped = self.cancelled is not None and self.cancelled.is_set()
        ended = [stopped or reply.finish_reason is not None for reply in self.replies]
        return torch.tensor(ended, device=input_ids.device)


class _Sampler(LogitsProcessor):
    """Changes scores so that the best one is a fair draw, each row with its own settings and its own generator.

    The draw is the Gumbel-max trick (https://arxiv.org/abs/1411.0030): `argmax(score + Gumbel noise)` is distributed
    like a draw from `softmax(score)`. A row is therefore the same alone and in any batch.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[list[int]], device: torch.device):
        width = max(len(prompt) for prompt in prompts)
        self.padding = [width - len(prompt) for prompt in prompts]
        self.samplings = samplings
        self.generators = [
            torch.Generator(device).manual_seed(_seed_of(sampling)) if sampling.temperature > 0 else None
            for sampling in samplings
        ]
        self.log_probs: list[list[torch.Tensor]] = [[] for _ in samplings]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (batch, length); scores: (batch, vocabulary), float32."""
        if scores.isnan().any():
            raise UserError(
                "The model's scores are not numbers (NaN), so no token can be chosen. Weights in float16 overflow in "
                "many models: load them with --dtype bfloat16 or float32. If that is no cure, the weights are broken."
            )
        for row, sampling in enumerate(self.samplings):
            if sampling.repetition_penalty != 1:
                said = input_ids[row, self.padding[row] :].unique()
                before = scores[row, said]
                penalty = sampling.repetition_penalty
                scores[row, said] = torch.where(before > 0, before / penalty, before * penalty)
            if sampling.temperature > 0:
                likely = _kept(scores[row], sampling)
                scores[row] = _draw(likely, self.generators[row])
                if sampling.log_probs:
                    self.log_probs[row].append(likely.log_softmax(-1)[scores[row].argmax()])
        return scores


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
