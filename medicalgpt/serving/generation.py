"""Choosing tokens: sampling settings, requests, answers, and the state of an answer while it is generated."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medicalgpt.args import ChatArguments
from medicalgpt.data.images import Picture
from medicalgpt.errors import UserError
from medicalgpt.models.templating import tool_format_of
from medicalgpt.models.tool_formats import ToolFormat, tool_names
from medicalgpt.serving.answer_parts import END_OF_THINK, THINK, CallPiece, CallReader
from medicalgpt.serving.guides import Guide, GuideError
from medicalgpt.serving.stop_strings import MAX_STOP_CHARS, StopFinder

import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Any]

# torch takes seeds below 2**63; half of that leaves room to add a row number.
MAX_SEED = 2**62
# Maximum number of alternatives per token.
MAX_TOP_LOG_PROBS = 20

# What a checkpoint's generation_config says of the model, not of how a token is chosen or where an answer ends. Tokens
# that must not be said at all, such as those of images, stay suppressed.
SETTINGS_OF_MODEL = frozenset(
    ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "suppress_tokens")
    + ("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory")
    + ("compile_config", "disable_compile", "continuous_batching_config", "transformers_version")
    # These follow from the request.
    + ("max_length", "max_new_tokens", "max_time", "stop_strings")
)

# Written by a decoder for bytes that are not a complete character.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and where an answer ends.

    Args:
        max_new_tokens: maximum tokens of one answer; fewer where the model's context ends first.
        min_new_tokens: the tokens that end an answer cannot be chosen before it has so many; stop strings still end it.
        temperature: the logits are divided by it; 0 always takes the most likely token (greedy).
        top_p: keep the most likely tokens that hold this share of the probability (https://arxiv.org/abs/1904.09751).
        top_k: keep the k most likely tokens; 0 keeps all.
        min_p: keep the tokens that are at least this share as likely as the most likely one
            (https://arxiv.org/abs/2407.01082); 0 keeps all. Applied before top_k and top_p.
        repetition_penalty: lowers the logits of tokens in the prompt or the answer by this factor
            (https://arxiv.org/abs/1909.05858); 1 is off.
        presence_penalty: subtracted from the logit of each token that the answer has already.
        frequency_penalty: subtracted from it once for each time that the answer has it.
        logit_bias: pairs of token id and what is added to its logit, before all penalties.
        stop: strings that end the answer; they are not part of it.
        seed: the same seed gives the same text. Unset: drawn from torch's global generator.
        log_probs: record the log-probability of each token as it was sampled; not for temperature 0.
        top_log_probs: record the model's log-probability of each token, before all of the above, and of this many of
            the most likely tokens in its place. Unset: nothing is recorded.

    Raises:
        ValueError: a value is outside of its range.
    """

    max_new_tokens: int = 512
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    log_probs: bool = False
    top_log_probs: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (all tokens) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "from -2 to 2"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "from -2 to 2"),
            (
                "logit_bias",
                all(token_id >= 0 and math.isfinite(bias) for token_id, bias in self.logit_bias),
                "of token ids from 0 on, each with a finite number",
            ),
            (
                "stop",
                all(0 < len(text) <= MAX_STOP_CHARS for text in self.stop),
                f"of strings that are not empty and have at most {MAX_STOP_CHARS} characters",
            ),
            ("log_probs", not self.log_probs or self.temperature > 0, "False at temperature 0"),
            (
                "top_log_probs",
                self.top_log_probs is None or 0 <= self.top_log_probs <= MAX_TOP_LOG_PROBS,
                f"from 0 to {MAX_TOP_LOG_PROBS}",
            ),
            ("seed", self.seed is None or 0 <= self.seed < MAX_SEED, "at least 0 and below 2**62"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)!r}, it must be {wanted}.")

    def with_seed_offset(self, offset: int) -> "Sampling":
        """The same settings with `seed + offset`, for answers drawn independently; without a seed, unchanged."""
        return self if self.seed is None else dataclasses.replace(self, seed=(self.seed + offset) % MAX_SEED)


def plain_settings() -> dict[str, Any]:
    """Settings of `generate` that choose the most likely token, whatever a checkpoint's generation_config recommends.

    Sampling, beams, penalties, forced and forbidden words and least lengths: requests have their own (`Sampling`), or
    none, so that greedy means greedy in every front end, in evaluations and in samples during training. A value of
    None has to be passed as well, since the library fills in what is not passed from the checkpoint.
    """
    neutral = GenerationConfig._get_default_generation_params()
    names = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in SETTINGS_OF_MODEL]
    return {name: neutral.get(name) for name in names}


def ignored_settings(config: GenerationConfig) -> dict[str, Any]:
    """What a checkpoint's generation_config recommends and `plain_settings` does not follow."""
    plain = plain_settings()
    return {
        name: value for name, value in config.to_dict().items() if name in plain and value not in (None, plain[name])
    }


def sampling_from(arguments: ChatArguments) -> Sampling:
    """The sampling settings of the flags.

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
    """The model's log-probability of a token of its answer.

    Attributes:
        log_prob: its log-probability under the model, before temperature and penalties.
        top: the most likely tokens in its place, each with its log-probability, best first.
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
        completion_tokens: tokens generated, including the stop token.
        tool_calls: calls of the offered tools, in OpenAI form with arguments as a dict; they are not part of `text`.
            Anything that is not a well-formed call of an offered tool stays in `text`.
        token_ids: what the model generated, including the stop token.
        log_probs: of each of these tokens, as sampled, if requested.
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
class GenerationRequest:
    """One prompt to be answered: what every front end hands to a `Batcher` or a `ChatEngine`.

    Args:
        prompt_ids: the rendered prompt, from `ChatEngine.prompt_ids` or `completion_ids`.
        sampling: how tokens are chosen; greedy by default.
        tools: the tools offered in the prompt, whose calls are parsed out of the answer.
        on_start: called once, when the request leaves the queue.
        on_token: called at each token, in the thread that generates.
        on_text: called with each piece of text that is final, in the thread that generates.
        on_end: called with the answer as soon as it is complete, possibly before others in the batch.
        cancelled: called at every token; True ends the answer, and `on_end` is not called.
        on_error: called if this answer fails, while others in the batch continue. Unset: the error is raised for all.
        adapter: name of the engine that answers, where a batcher has several on one model.
        client: who asks. A batcher gives fair shares to its clients.
        pictures: the images whose tokens are in the prompt, in their order.
        guide: the grammar that the answer follows.
        on_call: called with each piece of a tool call. Unset: calls are known when the answer is complete. Pieces of
            a call that turns out to be malformed have been passed on by then; it is not among the answer's calls.
        thoughts_begun: the prompt ends within the model's reasoning.
    """

    prompt_ids: Sequence[int]
    sampling: Sampling = Sampling()
    tools: Tools | None = None
    on_start: Callable[[], Any] = lambda: None
    on_token: Callable[[], Any] = lambda: None
    on_text: Callable[[str], Any] = lambda text: None
    on_end: Callable[[Answer], Any] = lambda answer: None
    cancelled: Callable[[], bool] = lambda: False
    on_error: Callable[[Exception], Any] | None = None
    adapter: str | None = None
    client: str = ""
    pictures: Sequence[Picture] = ()
    guide: Guide | None = None
    on_call: Callable[[CallPiece], Any] | None = None
    thoughts_begun: bool = False


class AnswerState:
    """One answer while it is generated: chooses its tokens, decodes whole characters, finds stop strings, and ends.

    Tokens are sampled with the Gumbel-max trick (https://arxiv.org/abs/1411.0030): `argmax(score + Gumbel noise)` is
    distributed like a sample from `softmax(score)`. With its own generator, an answer is the same alone and in any
    batch.

    Attributes:
        pictures: the images whose tokens are in the prompt, in their order.
        max_tokens: maximum number of tokens.
        ended: whether it needs no further token.
        answer: the complete answer once it has ended, unless it was cancelled.
        token_ids: the answer so far, including its stop token.

    Args:
        special_ids: ids of the special tokens by their text.
        stop_ids: ids that end an answer.
        stop_strings: strings that end an answer, in addition to those of the request.
        context_length: maximum number of tokens of prompt and answer together; None for no limit.
        device: where the scores are.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: PreTrainedTokenizerBase,
        *,
        special_ids: Mapping[str, int],
        stop_ids: frozenset[int],
        stop_strings: Sequence[str],
        context_length: int | None,
        device: torch.device,
    ):
        self.prompt_ids, self.pictures = request.prompt_ids, request.pictures
        self.max_tokens = request.sampling.max_new_tokens
        if context_length is not None:
            self.max_tokens = min(self.max_tokens, context_length - len(self.prompt_ids))
        self.ended = False
        self.answer: Answer | None = None
        self._request = request
        self._sampling = request.sampling
        self._generator = None
        if self._sampling.temperature > 0:
            self._generator = torch.Generator(device).manual_seed(seed_of(self._sampling))

        self._guided = request.guide.begin() if request.guide else None
        self._failure: Exception | None = None
        self._tools: ToolFormat | None = tool_format_of(tokenizer) if request.tools else None
        # Special tokens are not decoded, so as strings they could not be found. The marks of calls and of reasoning are
        # decoded: without them, neither could be distinguished from text.
        stop = (*self._sampling.stop, *stop_strings)
        self._stop_ids = stop_ids.union(special_ids[text] for text in stop if text in special_ids)
        self._stops = StopFinder([text for text in stop if text not in special_ids])
        marks = (THINK, END_OF_THINK, *(self._tools.marks if self._tools else ()))
        shown = {special_ids[mark] for mark in marks if mark in special_ids}
        self._hidden_ids = frozenset(special_ids.values()) - shown

        self._calls = self._call_reader() if self._tools and request.on_call else None

        self._tokenizer = tokenizer
        self.token_ids: list[int] = []
        # On the device until the end, since reading a number synchronizes with it.
        self._log_probs: list[torch.Tensor] = []
        self._scores: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        # Final text, how much of it is certain not to be a call, how much was passed on, and text that may be the
        # beginning of a stop string.
        self._text = ""
        self._safe = 0
        self._passed_on = 0
        self._held = ""
        # A token's text can depend on the token before (spaces, bytes of a character), so decoding starts at
        # `_context`; tokens before `_fresh` are decoded already, and so are `_seen` characters after them.
        self._ids: list[int] = []
        self._context = 0
        self._fresh = 0
        self._seen = 0
        request.on_start()

    @property
    def ids(self) -> list[int]:
        """The prompt and the answer so far."""
        return [*self.prompt_ids, *self.token_ids]

    def choose(self, scores: torch.Tensor, before: Callable[[], torch.Tensor]) -> None:
        """Change scores in place so that the highest one is the next token.

        Args:
            scores: of the whole vocabulary, (vocabulary,), float32.
            before: returns the tokens of the prompt and of the answer so far, (length,).
        """
        sampling = self._sampling
        plain = None if sampling.top_log_probs is None else scores.log_softmax(-1)
        for token_id, bias in sampling.logit_bias:
            scores[token_id] += bias
        if sampling.presence_penalty or sampling.frequency_penalty:
            said, counts = before()[len(self.prompt_ids) :].unique(return_counts=True)
            scores[said] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.repetition_penalty != 1:
            said = before().unique()
            penalty = sampling.repetition_penalty
            scores[said] = torch.where(scores[said] > 0, scores[said] / penalty, scores[said] * penalty)
        if sampling.min_new_tokens and len(before()) - len(self.prompt_ids) < sampling.min_new_tokens:
            scores[list(self._stop_ids)] = float("-inf")
        if self._guided is not None and self._failure is None:
            try:
                self._guided.restrict(scores, before()[len(self.prompt_ids) :])
            except GuideError as error:
                # Only this answer fails, with its next token.
                self._failure = error
        if self._generator is not None:
            likely = _kept(scores, sampling)
            scores.copy_(_draw(likely, self._generator))
            if sampling.log_probs:
                self._log_probs.append(likely.log_softmax(-1)[scores.argmax()])
        if plain is not None:
            top = plain.topk(min(sampling.top_log_probs, len(plain)))
            self._scores.append((plain[scores.argmax()], top.indices, top.values))

    def add(self, token_id: int) -> None:
        """Add the next token and pass on the text that is now final."""
        if self._request.cancelled():
            self.ended = True
            return
        try:
            if self._failure is not None:
                raise self._failure
            self._add(token_id)
        except Exception as error:
            if self._request.on_error is None:
                raise
            self.ended = True
            self._request.on_error(error)

    def _add(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self._request.on_token()
        if token_id in self._stop_ids:
            self._end(len(self._held), "stop")
            return
        self._ids.append(token_id)
        piece = self._decode()
        self._held += piece
        begun = self._stops.feed(piece)
        if begun is not None:
            self._end(len(self._held) - begun, "stop")
        elif len(self.token_ids) == self.max_tokens:
            self._end(len(self._held), "length")
        else:
            self._release(len(self._held) - self._stops.held)
            self._safe = self._tools.safe_length(self._text, self._safe) if self._tools else len(self._text)
            self._pass_on(self._text, self._safe)
            self._pass_on_calls()

    def _call_reader(self) -> CallReader | None:
        """For formats in which the beginning of a call cannot be text."""
        shape = self._tools.shape
        if shape.head is None or not (shape.trigger or self._guided):
            return None
        return CallReader(self._tools, tool_names(self._request.tools), self._request.thoughts_begun)

    def _pass_on_calls(self) -> None:
        for piece in self._calls.feed(self._text, self._safe) if self._calls else ():
            self._request.on_call(piece)

    def _end(self, length: int, finish_reason: Literal["stop", "length"]) -> None:
        self._release(length)
        self._pass_on_calls()
        tools = self._request.tools
        text, calls = self._tools.parse(self._text, tools) if self._tools else (self._text, [])
        self._pass_on(text, len(text))
        self.ended = True
        # In a continuous batch, tokens may have been chosen after the one that completed a stop string.
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

    def _pass_on(self, text: str, length: int) -> None:
        if length > self._passed_on:
            self._request.on_text(text[self._passed_on : length])
            self._passed_on = length

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


class Chooser(LogitsProcessor):
    """Lets each answer choose its next token from the scores."""

    def __init__(self, states: Sequence[AnswerState], width: int):
        self.states = states
        self.padding = [width - len(state.ids) for state in states]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids: (batch, length); scores: (batch, vocabulary), float32."""
        refuse_nan(scores)
        for number, state in enumerate(self.states):
            if not state.ended:
                before = input_ids[number, self.padding[number] :]
                state.choose(scores[number], lambda before=before: before)
        return scores


class Recorder(StoppingCriteria):
    """Adds each new token to its answer, and stops the answers that have ended; all, if they are to pause."""

    def __init__(self, states: Sequence[AnswerState], pause: Callable[[], bool]):
        self.states = states
        self.pause = pause

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """input_ids: (batch, length). Returns (batch,), True where an answer has ended."""
        for state, token_id in zip(self.states, input_ids[:, -1].tolist(), strict=True):
            if not state.ended:
                state.add(token_id)
        pause = self.pause()
        return torch.tensor([pause or state.ended for state in self.states], device=input_ids.device)


def refuse_nan(scores: torch.Tensor) -> None:
    """Raises UserError if a score is not a number."""
    if scores.isnan().any():
        raise UserError(
            "The model's scores are not numbers (NaN), so no token can be chosen. Weights in float16 overflow in "
            "many models: load them with --dtype bfloat16 or float32. If that does not help, the weights are broken."
        )


def _kept(scores: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return scores (vocabulary,) divided by the temperature, with those that are excluded at -inf."""
    # With the best score at 0, no temperature however small makes it overflow.
    scores = (scores - scores.max()) / sampling.temperature
    if sampling.min_p > 0:
        scores = scores.masked_fill(scores < math.log(sampling.min_p), float("-inf"))
    if 0 < sampling.top_k < len(scores):
        scores = scores.masked_fill(scores < scores.topk(sampling.top_k).values[-1], float("-inf"))
    if sampling.top_p < 1:
        probabilities, order = scores.softmax(-1).sort(descending=True)
        mass_before = probabilities.cumsum(-1) - probabilities
        scores = scores.masked_fill(mass_before.gather(0, order.argsort()) >= sampling.top_p, float("-inf"))
    return scores


def _draw(scores: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return scores (vocabulary,) whose argmax is a sample from `softmax(scores)`."""
    noise = torch.empty_like(scores).exponential_(generator=generator)
    return scores - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()


def seed_of(sampling: Sampling) -> int:
    if sampling.seed is not None:
        return sampling.seed
    # Greedy answers need no random numbers: sampling a model in training must not change those of the training.
    return int(torch.randint(MAX_SEED, ())) if sampling.temperature > 0 else 0
