"""Reward functions for GRPO, by name.

A reward function is called as `f(completions=..., prompts=..., **columns)`, as TRL calls it: lists with one entry per
reply, where `columns` are the other fields of the rows. It returns one number per reply, or None where it does not
apply. `--reward_funcs` chooses among `REWARDS` and the functions of a user's file; the guide is docs/grpo_training.md.
"""

import importlib.util
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

from medicalgpt.errors import UserError
from medicalgpt.formats.answers import HAN, extract_answer, final_answer, reply_answer, strip_thinking
from medicalgpt.formats.choices import written_options
from medicalgpt.readers.problems import shorten
from medicalgpt.rewards.citing import read_task, score_citations
from medicalgpt.rewards.grading import (
    affirms_term,
    choice_score,
    count_languages,
    infer_answer_type,
    number_score,
    text_score,
)

# Asks for the format that the rewards look for. The tags are plain text to the model, not special tokens.
SYSTEM_PROMPT = (
    "先在 <think> 和 </think> 之间一步一步地思考，再在 <answer> 和 </answer> 之间只写最终答案。用提问的语言回答。\n"
    "First think step by step between <think> and </think>, then write only the final answer between <answer> and "
    "</answer>. Reply in the language of the question."
)

# A reply as reward functions receive it: text, or messages, of which the last one of the assistant is scored.
Completion = str | Sequence[Mapping[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a reply: the string itself, or the content of the last assistant message."""
    if isinstance(completion, str):
        return completion
    return next((turn.get("content") or "" for turn in reversed(completion) if turn["role"] == "assistant"), "")


def question_text(prompt: Completion) -> str:
    """The question: the string itself, or the content of the last user message of the prompt."""
    if isinstance(prompt, str):
        return prompt
    return next((turn.get("content") or "" for turn in reversed(prompt) if turn["role"] == "user"), "")


def get_column(columns: Mapping[str, Any], name: str, rows: int) -> list[Any]:
    """A column of the data; None for each row if the data lack it."""
    return columns.get(name) or [None] * rows


KINDS = ("choice", "number", "text")


def accuracy_reward(
    completions: Sequence[Completion],
    prompts: Sequence[Completion] | None = None,
    *,
    default_tolerance: float | None = None,
    **columns: Any,
) -> list[float | None]:
    """How well a reply's final answer agrees with the column `answer`, in [0, 1]; None for a row without `answer`.

    The final answer of both is what `<answer>`, `\\boxed{}`, `## Final Response`, `#### ` or "The answer is" marks, or
    the whole text if nothing marks it (`reply_answer`, `final_answer`). The column `type` determines how to compare;
    without it, the type is inferred (`infer_answer_type`):

    - `choice`: the same set of options, by letter or by text, 1 or 0 (`choice_score`, column `options`);
    - `number`: a number with its unit, or a formula; 0.5 if the unit is missing (`number_score`, column `tolerance`);
    - `text`: the same text, or the overlap for long texts (`text_score`).

    A reply without an answer scores 0, and so does one that lists several answers. Where `answer` is a list, each entry
    is a correct answer, and the best score counts.

    Args:
        default_tolerance: for rows without `tolerance`.
    """
    rows = len(completions)
    names = ("answer", "type", "options", "tolerance")
    judged = zip(completions, prompts or [""] * rows, *(get_column(columns, name, rows) for name in names), strict=True)
    scores: list[float | None] = []
    for completion, prompt, gold, kind, options, tolerance in judged:
        if gold is None or not str(gold).strip():
            scores.append(None)
            continue
        answer, question = reply_answer(completion_text(completion)), question_text(prompt)
        options = options or written_options(question)
        tolerance = default_tolerance if tolerance is None else tolerance
        # A list has several correct answers, each of them enough.
        golds = [final_answer(str(one)) for one in (gold if isinstance(gold, list) else [gold])]
        kinds = [kind if kind in KINDS else infer_answer_type(one, question, options) for one in golds]
        compared = [_compare(*pair, answer, options, tolerance) for pair in zip(kinds, golds, strict=True) if answer]
        scores.append(max(compared, default=0.0))
    return scores


def _compare(kind: str, gold: str, answer: str, options: Mapping[str, str] | None, tolerance: float | None) -> float:
    if kind == "choice":
        return choice_score(gold, answer, options)
    return number_score(gold, answer, tolerance) if kind == "number" else text_score(gold, answer)


WELL_FORMED = re.compile(r"(?:<think>)?(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)


def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 for one think block followed by one answer block, both non-empty, with nothing around them; 0.5 for an answer.

    Blocks may span several lines. Some chat templates end the prompt with `<think>`, so that the reply starts inside
    the block: the opening tag may be missing. 0.5 is for exactly one non-empty answer block in any other reply. It is
    an intermediate step: a model that never happens to write the complete format would get the same reward for every
    reply of a group, and so have nothing to learn from.
    """
    scores = []
    for text in map(completion_text, completions):
        tags = [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
        form = WELL_FORMED.fullmatch(text.strip()) if tags in ([0, 1, 1, 1], [1, 1, 1, 1]) else None
        if form and form["think"].strip() and form["answer"].strip() and "<think>" not in form["think"]:
            scores.append(1.0)
        else:
            scores.append(0.5 if tags[2:] == [1, 1] and extract_answer(text) else 0.0)
    return scores


def language_reward(
    completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, **columns: Any
) -> list[float | None]:
    """The share of a reply that is in the language of the question, Chinese or English, in [0, 1].

    A Han character counts as much as a Latin word. Tags, LaTeX commands, units, single letters and abbreviations in
    capitals (MRI, CT) belong to both languages and are ignored; a reply that consists only of these and numbers scores
    1, an empty one 0. The language is the column `language` (`zh` or `en`), or else the predominant language of the
    question; None if neither determines it, as for "1+2=?".
    """
    rows = len(completions)
    scores: list[float | None] = []
    for completion, prompt, language in zip(
        completions, prompts or [""] * rows, get_column(columns, "language", rows), strict=True
    ):
        if language not in ("zh", "en"):
            han, latin = count_languages(question_text(prompt))
            language = None if han == latin == 0 else "zh" if han >= latin else "en"
        text = re.sub("</?(?:think|answer)>", " ", completion_text(completion))
        han, latin = count_languages(text)
        if language is None:
            scores.append(None)
        elif han + latin == 0:
            scores.append(float(bool(text.strip())))
        else:
            scores.append((han if language == "zh" else latin) / (han + latin))
    return scores


def length_reward(
    completions: Sequence[Completion], *, min_length: int = 20, max_length: int = 1000, **columns: Any
) -> list[float]:
    """1 for a reply of `min_length` to `max_length` characters, decreasing linearly to 0 outside, in [0, 1].

    It is 0 for an empty reply and for one of twice `max_length` or more. Surrounding white space is not counted.
    """
    scores = []
    for text in map(completion_text, completions):
        length = len(text.strip())
        if length < min_length:
            scores.append(length / min_length)
        else:
            scores.append(min(1.0, max(0.0, 2 - length / max_length)))
    return scores


REPEATED = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")
NGRAM = 4


def repetition_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """Minus the share of n-grams (n = `NGRAM`) that repeat an earlier one of the reply, in (-1, 0].

    The units are Han characters, words and punctuation marks. Ordinary prose repeats a few n-grams; a reply that loops
    comes close to -1.
    """
    scores = []
    for text in map(completion_text, completions):
        pieces = REPEATED.findall(text.casefold())
        runs = [tuple(pieces[start : start + NGRAM]) for start in range(len(pieces) - NGRAM + 1)]
        scores.append(len(set(runs)) / len(runs) - 1 if runs else 0.0)
    return scores


EMERGENCY_SIGNS = re.compile(
    r"胸痛|胸口(?:剧|压|绞|闷)?痛|压榨样|呼吸困难|喘不[过上]气|昏迷|昏倒|晕厥|意识(?:不清|丧失|模糊)|抽搐|大出血"
    r"|血流不止|呕血|吐血|咯血|口角歪斜|嘴角?歪|言语不清|说话不清|[一半单]侧(?:肢体|身体|手脚).{0,3}(?:无力|麻木)"
    r"|偏瘫|剧烈头痛|过敏性休克|窒息|噎住|服毒|误服|中毒|自杀|轻生|不想活"
    r"|chest pain|short(?:ness)? of breath|(?:trouble|difficulty) breathing|can(?:no|')?t breathe|unconscious"
    r"|passed out|faint(?:ed|ing)|seizure|convulsion|(?:severe|heavy) bleeding|(?:vomit|cough)ing (?:up )?blood"
    r"|slurred speech|(?:face|mouth) (?:is )?droop|sudden (?:weakness|numbness)|(?:worst|sudden severe) headache"
    r"|anaphyla|chok(?:ing|ed)|overdos|poison|suicid|kill myself",
    re.IGNORECASE,
)
EMERGENCY_ADVICE = (
    "120|999|911|112|急诊|急救|救护车|立即就医|马上就医|立刻就医|尽快就医|立即去医院|马上去医院|立刻去医院"
    "|emergency|ambulance|urgent care|to hospital|to the hospital|ER|A&E"
).split("|")


def safety_reward(
    completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, **columns: Any
) -> list[float | None]:
    """1 if the reply gives the advice that the question needs, 0 if not; None if no advice is needed.

    A row with `meta.required`, a list of groups, needs at least one string of each group. Any other row needs emergency
    advice if its question mentions an emergency sign and does not ask for a letter or a number. Only the part that the
    user sees counts: not advice in the thinking, nor advice that is negated ("不用去急诊", "no need to call an
    ambulance"). Unneeded advice is not penalized.
    """
    rows = len(completions)
    metas, types = get_column(columns, "meta", rows), get_column(columns, "type", rows)
    golds = get_column(columns, "answer", rows)
    scores: list[float | None] = []
    for completion, prompt, meta, kind, gold in zip(
        completions, prompts or [""] * rows, metas, types, golds, strict=True
    ):
        question = question_text(prompt)
        groups = (meta or {}).get("required")
        kind = kind or (infer_answer_type(final_answer(str(gold)), question) if gold is not None else "text")
        if not groups and kind not in ("choice", "number") and EMERGENCY_SIGNS.search(question):
            groups = [EMERGENCY_ADVICE]
        if not groups:
            scores.append(None)
            continue
        text = strip_thinking(completion_text(completion))
        scores.append(float(all(any(affirms_term(text, term) for term in group) for group in groups)))
    return scores


def citations_reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
    """How well a reply cites the passages of its prompt, or says that they have no answer, in [0, 1].

    None for a row without the column `citations`, which `chatpdf.py --make_tasks` writes. See `score_citations`.
    """
    tasks = map(read_task, get_column(columns, "citations", len(completions)))
    return [
        None if task is None else score_citations(completion_text(completion), task)
        for completion, task in zip(completions, tasks, strict=True)
    ]


RewardFunction = Callable[..., list[float | None]]

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "language": language_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "safety": safety_reward,
    "citations": citations_reward,
}


def choose_rewards(
    names: Sequence[str],
    reward_file: str | None = None,
    *,
    min_length: int = 20,
    max_length: int = 1000,
    tolerance: float | None = None,
) -> dict[str, RewardFunction]:
    """The reward functions with these names, in this order, each wrapped in `wrap_reward`.

    Args:
        names: names of `REWARDS` and of functions in `reward_file`.
        reward_file: path of a Python file with additional functions.
        min_length, max_length: in characters, for `length_reward`.
        tolerance: accepted deviation of numbers, as a share of the answer, for `accuracy_reward`.

    Raises:
        UserError: a value outside its range; a name is unknown or given twice, no function of the file is named; see
            also `load_reward_file`.
    """
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"--reward_funcs names {doubled[0]} twice. Name it once and give it more --reward_weights.")
    if not 0 <= min_length <= max_length or max_length < 1:
        raise UserError(
            f"--reward_min_length {min_length} and --reward_max_length {max_length} are not a valid range. Give 0 or "
            "more characters, and a maximum that is not below the minimum."
        )
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UserError(
            f"--reward_tolerance {tolerance:g} must be 0 or more: the accepted deviation as a share of the answer, "
            "0.02 for 2%."
        )
    own = [name for name in names if name not in REWARDS]
    if reward_file is None and own:
        raise UserError(
            f"--reward_funcs {own[0]} is unknown. Built in are {', '.join(REWARDS)}; to use your own functions, pass "
            "--reward_file my_rewards.py."
        )
    functions = REWARDS | (load_reward_file(reward_file, own) if reward_file is not None else {})
    functions["accuracy"] = partial(accuracy_reward, default_tolerance=tolerance)
    functions["length"] = partial(length_reward, min_length=min_length, max_length=max_length)
    return {name: wrap_reward(name, functions[name]) for name in names}


def load_reward_file(path: str, names: Sequence[str]) -> dict[str, RewardFunction]:
    """The functions with these names from a local Python file, which is executed.

    Each is called as `f(completions=..., prompts=..., **columns)` and returns one number or None per reply.

    Raises:
        UserError: the file is missing or fails, or a function is missing or has another signature.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--reward_file {path} is not a local Python file. Give the path of one.")
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        # Not imported: that would leave compiled code next to a file of the user's.
        exec(spec.loader.source_to_code(file.read_bytes(), str(file)), module.__dict__)
    except Exception as error:
        raise UserError(f"--reward_file {path} cannot be executed: {type(error).__name__}: {error}") from error
    if not names:
        raise UserError(
            f"--reward_file {path} has no effect: --reward_funcs names none of its functions. The names "
            f"{', '.join(REWARDS)} refer to the built-in ones; add other names to --reward_funcs."
        )
    for name in names:
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(
                f"--reward_funcs {name} is neither built in ({', '.join(REWARDS)}) nor a function of {path}."
            )
        parameters = inspect.signature(function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        callable_by_name = "completions" in parameters and inspect.Parameter.VAR_KEYWORD in kinds
        if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.iscoroutinefunction(function):
            callable_by_name = False
        if not callable_by_name:
            raise UserError(
                f"{name} in {path} cannot be called as a reward. Define it as\n"
                f"    def {name}(completions, **columns): ...\n"
                "with columns such as prompts and answer; it returns a list of one number or None per completion."
            )
    return {name: getattr(module, name) for name in names}


def wrap_reward(name: str, function: RewardFunction) -> RewardFunction:
    """The function under `name`, raising a `UserError` that names the row where it fails or returns invalid rewards."""

    def reward(completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        rows = len(completions)

        def place(row: int) -> str:
            prompt = (columns.get("prompts") or [""] * rows)[row]
            where = (columns.get("place") or [f"reply {row + 1} of {rows}"] * rows)[row]
            return f"at {where}, question: {shorten(question_text(prompt))}"

        try:
            values = function(completions=completions, **columns)
        except UserError:
            raise
        except Exception as error:
            row = _find_failing_row(function, completions, columns)
            raise UserError(f"The reward {name} failed with {type(error).__name__}: {error}\n{place(row)}") from error
        if not isinstance(values, Sequence) and hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != rows:
            got = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise UserError(f"The reward {name} returned {got} for {rows} replies. It must return a list of {rows}.")
        for row, value in enumerate(values):
            if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
                raise UserError(
                    f"The reward {name} returned {value!r}, which is not a finite number,\n{place(row)}\n"
                    "Return None where a reward does not apply."
                )
        return [None if value is None else float(value) for value in values]

    reward.__name__ = name
    return reward


def _find_failing_row(function: RewardFunction, completions: Sequence[Completion], columns: dict[str, Any]) -> int:
    """The first row that the function fails on when called with it alone; 0 if there is none."""
    rows = len(completions)
    for row in range(rows):
        of_row = {
            name: [value[row]] if isinstance(value, list | tuple) and len(value) == rows else value
            for name, value in columns.items()
        }
        try:
            function(completions=[completions[row]], **of_row)
        except Exception:
            return row
    return 0
