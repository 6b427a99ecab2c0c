"""The form of OpenAI's responses: chat and text completions, whole and as chunks of a stream."""

import codecs
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from medicalgpt.serving.answer_parts import CallPiece, ThoughtReader, split_thoughts
from medicalgpt.serving.generation import Answer, TokenScore
from medicalgpt.serving.openai_schema import ChatRequest, CompletionRequest, Generation
from medicalgpt.serving.served_models import ServedModel, token_text

# Represents a log-probability of minus infinity, for which JSON has no number.
LEAST_LOG_PROB = -9999.0


class Form:
    """The form of responses, whole and streamed: what chat and text completions have in common.

    Args:
        prompts: number of prompts; each has the same number of answers.
    """

    def __init__(self, model: ServedModel, body: Generation, prompts: int = 1):
        self.model = model
        self.body = body
        self.prompts = prompts
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def framed(self, object_name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": object_name, "created": self.created, "model": self.model.name}
        return {**head, "choices": choices}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self.choice(number, answer) for number, answer in enumerate(answers)]
        return self.framed(self.object_name, choices) | {"usage": self.usage(answers)}

    # Whether a stream ends with an event of its own.
    ends_with_done = True

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """An event of a stream."""
        return self._with_usage(self.framed(self.chunk_name, [choice]), None)

    def closing(self, answers: Sequence[Answer]) -> list[dict[str, Any]]:
        """The events after those of all answers."""
        if not self._tells_usage:
            return []
        return [self._with_usage(self.framed(self.chunk_name, []), self.usage(answers))]

    def failure(self, error: dict[str, Any]) -> dict[str, Any]:
        """The last event of a stream that fails."""
        return error

    @property
    def _tells_usage(self) -> bool:
        return self.body.stream_options is not None and bool(self.body.stream_options.include_usage)

    def _with_usage(self, event: dict[str, Any], usage: dict[str, int] | None) -> dict[str, Any]:
        return {**event, "usage": usage} if self._tells_usage else event

    def usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        prompt = sum(answer.prompt_tokens for answer in answers[:: len(answers) // self.prompts])
        completion = sum(answer.completion_tokens for answer in answers)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def scores_of_text(self, answer: Answer) -> Sequence[TokenScore]:
        scores = answer.scores
        # The token that ends a turn is not part of the text.
        if scores and answer.finish_reason == "stop" and scores[-1].token_id in self.model.engine.stop_ids:
            scores = scores[:-1]
        return scores

    def read(self, scores: Sequence[TokenScore]) -> list[tuple[bytes | None, float, list[tuple[bytes | None, float]]]]:
        """Each token's bytes with its log-probability, and the most likely tokens in its place."""
        bytes_of = self.model.bytes_of
        return [
            (
                bytes_of(score.token_id),
                max(score.log_prob, LEAST_LOG_PROB),
                [(bytes_of(token_id), max(log_prob, LEAST_LOG_PROB)) for token_id, log_prob in score.top],
            )
            for score in scores
        ]


def called(call: dict[str, Any]) -> dict[str, Any]:
    """A call in the form of the API, with its arguments as text."""
    return {
        "id": call.get("id") or call_id(),
        "type": "function",
        "function": {
            "name": call["function"]["name"],
            "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
        },
    }


def call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class ChatForm(Form):
    """Args:
    thoughts_begun: the prompt ends within the model's reasoning.
    """

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"
    body: ChatRequest

    def __init__(self, model: ServedModel, body: ChatRequest, thoughts_begun: bool):
        super().__init__(model, body)
        self.thoughts_begun = thoughts_begun
        self._readers = [ThoughtReader(thoughts_begun) for _ in range(body.n or 1)]
        # Calls of each answer that have been streamed.
        self._streamed = [0] * (body.n or 1)

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        calls = [called(call) for call in calls_of(answer, self.body)]
        thought, said = split_thoughts(answer.text, self.thoughts_begun)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            message |= {"content": said or None, "tool_calls": calls}
        return {
            "index": number,
            "message": message,
            "logprobs": self._log_probs(answer),
            "finish_reason": self._finish_reason(answer),
        }

    def opening(self, number: int) -> list[dict[str, Any]]:
        """Chunks before the first piece of a stream."""
        return [self._chunk(number, {"role": "assistant", "content": ""})]

    def piece(self, number: int, piece: str | CallPiece) -> list[dict[str, Any]]:
        """Chunks for a piece of an answer."""
        if isinstance(piece, str):
            return self._text(number, *self._readers[number].feed(piece))
        call: dict[str, Any] = {"index": piece.index, "function": {"arguments": piece.arguments}}
        if piece.name is not None:
            self._streamed[number] = piece.index + 1
            call |= {"id": call_id(), "type": "function", "function": {"name": piece.name, "arguments": ""}}
        return [self._chunk(number, {"tool_calls": [call]})]

    def ending(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        """Chunks after the last piece: tool calls that were not streamed, and the rest."""
        chunks = self._text(number, *self._readers[number].feed("", last=True))
        for position, call in enumerate(calls_of(answer, self.body)):
            if position >= self._streamed[number]:
                chunks.append(self._chunk(number, {"tool_calls": [{"index": position, **called(call)}]}))
        last = {"logprobs": self._log_probs(answer), "finish_reason": self._finish_reason(answer)}
        return [*chunks, self.chunk({"index": number, "delta": {}, **last})]

    def _text(self, number: int, thought: str, said: str) -> list[dict[str, Any]]:
        parts = (("reasoning_content", thought), ("content", said))
        return [self._chunk(number, {name: text}) for name, text in parts if text]

    def _finish_reason(self, answer: Answer) -> str:
        return "tool_calls" if answer.tool_calls else answer.finish_reason

    def _chunk(self, number: int, delta: dict[str, Any]) -> dict[str, Any]:
        return self.chunk({"index": number, "delta": delta, "logprobs": None, "finish_reason": None})

    def _log_probs(self, answer: Answer) -> dict[str, Any] | None:
        def entry(known: bytes | None, log_prob: float) -> dict[str, Any]:
            return {"token": token_text(known), "logprob": log_prob, "bytes": None if known is None else list(known)}

        if not self.body.logprobs:
            return None
        content = [
            {**entry(known, log_prob), "top_logprobs": [entry(*each) for each in top]}
            for known, log_prob, top in self.read(self.scores_of_text(answer))
        ]
        return {"content": content, "refusal": None}


def calls_of(answer: Answer, body: ChatRequest) -> Sequence[dict[str, Any]]:
    """The calls of an answer. A format of calls without a mark cannot be held to a single one."""
    return answer.tool_calls[:1] if body.parallel_tool_calls is False else answer.tool_calls


class CompletionForm(Form):
    """Args:
    prompts: the token ids of each prompt.
    prompt_scores: of each prompt, of its tokens but the first; None unless they are asked for.
    """

    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"
    body: CompletionRequest

    def __init__(
        self,
        model: ServedModel,
        body: CompletionRequest,
        prompts: Sequence[Sequence[int]],
        prompt_scores: Sequence[Sequence[TokenScore]] | None = None,
    ):
        super().__init__(model, body, len(prompts))
        self._prompt_ids = prompts
        self._prompt_scores = prompt_scores
        tokenizer = model.engine.tokenizer
        self._echoed = [tokenizer.decode(ids, skip_special_tokens=False) if body.echo else "" for ids in prompts]

    def choice(self, number: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": number,
            "text": self._echoed[self._prompt_of(number)] + answer.text,
            "logprobs": self._log_probs(number, answer),
            "finish_reason": answer.finish_reason,
        }

    def opening(self, number: int) -> list[dict[str, Any]]:
        prompt = self._echoed[self._prompt_of(number)]
        return self.piece(number, prompt) if prompt else []

    def piece(self, number: int, text: str) -> list[dict[str, Any]]:
        return [self.chunk({"index": number, "text": text, "logprobs": None, "finish_reason": None})]

    def ending(self, number: int, answer: Answer) -> list[dict[str, Any]]:
        return [self.chunk({**self.choice(number, answer), "text": ""})]

    def _prompt_of(self, number: int) -> int:
        return number // (self.body.n or 1)

    def _log_probs(self, number: int, answer: Answer) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        prompt = self._prompt_of(number)
        rows: list[tuple[bytes | None, float | None, list[tuple[bytes | None, float]]]] = []
        if self._prompt_scores is not None:
            # Nothing comes before the first token.
            rows.append((self.model.bytes_of(self._prompt_ids[prompt][0]), None, []))
            rows += self.read(self._prompt_scores[prompt])
        rows += self.read(self.scores_of_text(answer))
        decoder, offsets, length = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        for known, _, _ in rows:
            offsets.append(length)
            length += len(decoder.decode(known or b""))
        return {
            "tokens": [token_text(known) for known, _, _ in rows],
            "token_logprobs": [log_prob for _, log_prob, _ in rows],
            "top_logprobs": [
                None if own is None else {token_text(known): log_prob for known, log_prob in top}
                for _, own, top in rows
            ],
            "text_offset": offsets,
        }
