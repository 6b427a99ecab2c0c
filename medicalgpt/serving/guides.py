"""Answers that follow a grammar: JSON of a schema, or calls of tools, decided token by token while decoding.

    guide = GuideMaker(engine).guide(json_grammar(schema))
    engine.generate([GenerationRequest(prompt_ids, guide=guide)])

llguidance computes which tokens may follow (https://github.com/guidance-ai/llguidance). Grammars are in its dialect of
Lark.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from medicalgpt.errors import UserError
from medicalgpt.models.tool_formats import AnyText, CallShape, Maybe

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Compiled grammars that are kept, and the longest one.
MAX_KEPT = 64
MAX_GRAMMAR_CHARS = 100_000
# White space in JSON is where json.dumps has it, and little more: a model that is unsure of its next token would go on
# with it for ever.
GAP = r"[\x20\x0A]{0,20}"
SEPARATORS = {"whitespace_flexible": False, "item_separator": f",{GAP}", "key_separator": f":{GAP}"}
ANY_OBJECT = {"type": "object"}
# Of the reasoning before an answer: the model has none, may write some, or the prompt has begun it.
Thoughts = Literal["none", "possible", "begun"]


class GuideError(UserError, ValueError):
    """A grammar cannot be compiled, or became too complex while an answer followed it."""


class Guide:
    """A compiled grammar, which any number of answers can follow.

    Args:
        matcher: at the beginning of the grammar.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, stop_ids: Sequence[int]):
        self._matcher = matcher
        self._stop_ids = list(stop_ids)

    def begin(self) -> "GuidedAnswer":
        """The grammar before the first token of an answer."""
        return GuidedAnswer(self._matcher.deep_copy(), self._stop_ids)


class GuidedAnswer:
    """How far one answer has come in its grammar."""

    def __init__(self, matcher: LLMatcher, stop_ids: list[int]):
        self._matcher = matcher
        self._stop_ids = stop_ids
        self._consumed = 0

    def restrict(self, scores: torch.Tensor, answer_ids: torch.Tensor) -> None:
        """Set the scores of all tokens that may not come next to -inf, in place.

        Args:
            scores: of the whole vocabulary, (vocabulary,).
            answer_ids: the answer so far, (length,).

        Raises:
            GuideError: the grammar has become too complex.
        """
        new = answer_ids[self._consumed :].tolist()
        self._consumed += len(new)
        # In a continuous batch, tokens are chosen behind the end of an answer before it is noticed.
        if not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        self._require_sound()
        if self._matcher.is_stopped():
            scores.fill_(float("-inf"))
            scores[self._stop_ids] = 0
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._require_sound()
        allowed = torch.zeros(len(scores), dtype=torch.bool)
        known = np.unpackbits(bits, bitorder="little")[: len(scores)].astype(bool)
        allowed[: len(known)] = torch.from_numpy(known)
        scores.masked_fill_(~allowed.to(scores.device), float("-inf"))

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GuideError(f"The answer cannot be held to its schema any further: {first_line(self._matcher)}.")


def first_line(matcher: LLMatcher) -> str:
    return matcher.get_error().strip().partition("\n")[0].rstrip(".")


class GuideMaker:
    """Compiles grammars for the tokens of one model, and keeps the last ones.

    Compiling takes milliseconds, seconds for the largest grammars: call it off the event loop.

    Args:
        vocabulary: number of scores that the model gives.
        stop_ids: tokens that end an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, stop_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._stop_ids = sorted(stop_ids)
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[str, Guide] = OrderedDict()
        self._lock = threading.Lock()

    def guide(self, grammar: str) -> Guide:
        """Compile a grammar, or return it from the last ones.

        Raises:
            GuideError: it is too large or wrong, or this tokenizer cannot be guided.
        """
        if len(grammar) > MAX_GRAMMAR_CHARS:
            raise GuideError(
                f"it has {len(grammar)} characters with all that belongs to it, and at most {MAX_GRAMMAR_CHARS} are "
                "accepted."
            )
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = self._compiled(grammar)
            self._kept.move_to_end(grammar)
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
            return self._kept[grammar]

    def _compiled(self, grammar: str) -> Guide:
        if self._tokens is None:
            self._tokens = self._read_tokens()
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            # Without the line of the grammar, which is none of the client's.
            problem = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", first_line(matcher))
            raise GuideError(f"no answer can be held to it: {problem}. Change it, or ask for the format in the prompt.")
        return Guide(matcher, self._stop_ids)

    def _read_tokens(self) -> LLTokenizer:
        if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._stop_ids:
            raise GuideError(
                "no answer of this model can be held to it: its tokenizer has no fast version, or no token ends its "
                "answers. Ask for the format in the prompt."
            )
        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=self._vocabulary, eos_token=self._stop_ids)


class _Lark:
    """The text of a grammar, with literals in the terms of one tokenizer.

    Args:
        special_ids: ids of the tokenizer's special tokens, by their text. As text they cannot be generated.
    """

    def __init__(self, special_ids: Mapping[str, int]):
        self.special_ids = special_ids
        self.rules = ["TEXT: /(.|\\n)*/"]

    def literal(self, text: str) -> str:
        """Terms that match exactly a text."""
        for mark, token_id in self.special_ids.items():
            if mark in text:
                before, _, after = text.partition(mark)
                return " ".join(filter(None, (self.literal(before), f"<[{token_id}]>", self.literal(after))))
        return json.dumps(text, ensure_ascii=False) if text else ""

    def until(self, name: str, mark: str) -> str:
        """A rule that matches any text up to a mark, and the mark."""
        if mark in self.special_ids:
            self.rules.append(f"{name}: TEXT {self.literal(mark)}")
        else:
            self.rules.append(f"{name}[lazy]: TEXT {self.literal(mark)}")
        return name

    def terms(self, parts: Sequence[Any]) -> str:
        """Terms that match the parts of a call, see `CallShape`."""
        found = []
        for part in parts:
            if isinstance(part, str):
                found.append(self.literal(part))
            elif isinstance(part, Maybe):
                found.append(f"({self.terms(part.parts)}){'*' if part.repeats else '?'}")
            elif isinstance(part, AnyText):
                name = f"TEXT_{len(self.rules)}"
                without = "".join(f" & ~(TEXT {json.dumps(each)} TEXT)" for each in part.without)
                self.rules.append(f"{name}: TEXT{without}")
                self.rules.append(f"{name.lower()}[lazy]: {name} {self.literal(part.end)}")
                found.append(name.lower())
            else:
                found.append(self.json(part))
        return " ".join(filter(None, found))

    def calls(self, name: str, shape: CallShape, tools: Mapping[str, Any], begun: str = "") -> str:
        """Terms that match one call of any of the tools, whose beginning `begun` is matched already."""
        for number, (tool, schema) in enumerate(tools.items()):
            parts = shape.parts(tool, schema)
            self.rules.append(f"{name}_{number}: {self.terms([parts[0].removeprefix(begun), *parts[1:]])}")
        return f"({' | '.join(f'{name}_{number}' for number in range(len(tools)))})"

    def json(self, schema: Any) -> str:
        """Terms that match the JSON values of a schema."""
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": SEPARATORS}
        return f"%json {json.dumps(schema, ensure_ascii=False)}"

    def thoughts(self, thoughts: Thoughts) -> str:
        """Terms that match reasoning before the answer."""
        if thoughts == "none":
            return ""
        self.until("thoughts_end", "</think>")
        self.rules.append("GAP: /[ \\n]*/")
        if thoughts == "begun":
            return "thoughts_end GAP"
        self.rules.append(f"thoughts: {self.literal('<think>')} thoughts_end GAP")
        return "thoughts?"

    def grammar(self, start: str) -> str:
        return "\n".join(["%llguidance {}", f"start: {start}", *self.rules, ""])


def json_grammar(schema: Any, special_ids: Mapping[str, int], thoughts: Thoughts = "none") -> str:
    """The grammar of an answer that is JSON of a schema, after reasoning if there is any.

    Args:
        special_ids: of the tokenizer, by their text.
    """
    lark = _Lark(special_ids)
    lark.rules.append(f"value: {lark.json(schema)}")
    return lark.grammar(f"{lark.thoughts(thoughts)} value")


def call_grammar(
    shape: CallShape,
    tools: Mapping[str, Any],
    special_ids: Mapping[str, int],
    thoughts: Thoughts = "none",
    *,
    parallel: bool = True,
    otherwise: Any = None,
) -> str:
    """The grammar of an answer that is one or several calls of tools.

    Args:
        shape: how the model writes calls.
        tools: the JSON schema of each tool's arguments, by its name.
        special_ids: of the tokenizer, by their text.
        parallel: several calls are allowed, if the shape can write them.
        otherwise: the schema of JSON that the answer may be in place of calls; None if it has to call.
    """
    lark = _Lark(special_ids)
    begin, calls, more = lark.literal(shape.begin), lark.calls("call", shape, tools), ""
    if shape.between is not None and parallel:
        more = f"({lark.literal(shape.between)} {calls})*"
    answer = f"{begin} {calls} {more} {lark.literal(shape.end)}"
    if otherwise is not None:
        lark.rules.append(f"value: {lark.json(otherwise)}")
        answer = f"(value | {answer})"
    return lark.grammar(f"{lark.thoughts(thoughts)} {answer}")


def text_or_call_grammar(
    shape: CallShape,
    tools: Mapping[str, Any],
    special_ids: Mapping[str, int],
    thoughts: Thoughts = "none",
    *,
    parallel: bool = True,
) -> str:
    """The grammar of an answer that is text, calls, or text and then calls. The shape needs a `trigger`.

    The arguments are those of `call_grammar`.
    """
    lark = _Lark(special_ids)
    # The rule that finds the mark in the text matches the beginning of the first call as well.
    first = lark.literal(shape.begin.removeprefix(shape.trigger))
    calls = lark.calls("call", shape, tools)
    first += f" {calls if shape.begin else lark.calls('first', shape, tools, shape.trigger)}"
    more = f"({lark.literal(shape.between)} {calls})*" if parallel else ""
    begun = lark.thoughts(thoughts) if thoughts == "begun" else ""
    trigger, end = lark.until("trigger", shape.trigger), lark.literal(shape.end)
    return lark.grammar(f"{begun} (TEXT | {trigger} {first} {more} {end})")
