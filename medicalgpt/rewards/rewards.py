"""Reward functions for GRPO, by name."""

import importlib.util
import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, SupportsFloat

from medicalgpt.data.sources import shorten
from medicalgpt.errors import UserError
from medicalgpt.rewards.grading import (
    HAN,
    count_languages,
    extract_answer,
    kind_of,
    number_score,
    read_choice,
    says,
    text_score,
    told,
)

# What a reply is asked to look like. The tags are plain text to the model, and the rewards look for them.
SYSTEM_PROMPT = (
    "先在 <think> 和 </think> 之间一步一步地思考，再在 <answer> 和 </answer> 之间只写最终答案。用提问的语言回答。\n"
    "First think step by step between <think> and </think>, then write only the final answer between <answer> and "
    "</answer>. Reply in the language of the question."
)

# A reply as reward functions get it: text, or messages of which the assistant's last one is judged.
Completion = str | Sequence[Mapping[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a reply: itself, or the content of the last message of the assistant."""
    if isinstance(completion, str):
        return completion
    return next((turn.get("content") or "" for turn in reversed(completion) if turn["role"] == "assistant"), "")


def question_text(prompt: Completion) -> str:
    """What was asked: the prompt itself, or the content of the last message of the user in it."""
    if isinstance(prompt, str):
        return prompt
    return next((turn.get("content") or "" for turn in reversed(prompt) if turn["role"] == "user"), "")


def column_of(columns: Mapping[str, Any], name: str, rows: int) -> list[Any]:
    """A column of the data, or None for each row where the data have no such column."""
    return columns.get(name) or [None] * rows


def accuracy_reward(
    completions: Sequence[Completion], prompts: Sequence[Completion] | None = None, **columns: Any
) -> list[float | None]:
    """Whether the answer block says what the column `answer` says, in [0, 1]; None where a row has no `answer`.

    The column `type` says how to compare, and where it is missing the answer itself does (`kind_of`):

    - `choice`: the same set of letters, 1 or 0 (`read_choice`);
    - `number`: a number with its unit, or a formula; 0.5 where the unit is missing (`number_score`);
    - `text`: the same text, or for long ones the overlap with it (`text_score`).

    A reply without an answer block scores 0, and so does one that lists several answers.
    """
    rows = len(completions)
    golds, types = column_of(columns, "answer", rows), column_of(columns, "type", rows)
    scores: list[float | None] = []
    for completion, gold, kind, prompt in zip(completions, golds, types, prompts or [""] * rows, strict=True):
        if gold is None or not str(gold).strip():
            scores.append(None)
            continue
        gold, answer = extract_answer(str(gold)) or str(gold), extract_answer(completion_text(completion))
        if kind not in ("choice", "number", "text"):
            kind = kind_of(gold, question_text(prompt))
        if not answer:
            scores.append(0.0)
        elif kind == "choice":
            scores.append(float(read_choice(gold) == read_choice(answer) != set()))
        elif kind == "number":
            scores.append(number_score(gold, answer))
        else:
            scores.append(text_score(gold, answer))
    return scores


WELL_FORMED = re.compile(r"(?:<think>)?(?P<think>.*?)</think>\s*<answer>(?P<answer>.*?)</answer>", re.DOTALL)


def format_reward(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1 for one block of thinking and then one answer, both filled and with nothing around them; 0.5 for one answer.

    Blocks may have many lines. Some chat templates write `<think>` as the end of the prompt, so that the reply starts
    inside of it: the opening tag may be missing. The half is for exactly one filled answer block in any other reply,
    and it is a step on the way: a model that never happens to write the whole form gets the same reward for each
    reply of a group, and with that nothing to learn from.
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
    capitals (MRI, CT) belong to both languages and are left out; a reply of nothing but these and numbers scores 1,
    an empty one 0. The language is that of the column `language` (`zh`, `en`), or that of most of the question; None
    where neither says it, as for "1+2=?".
    """
    rows = len(completions)
    scores: list[float | None] = []
    for completion, prompt, language in zip(
        completions, prompts or [""] * rows, column_of(columns, "language", rows), strict=True
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
    """1 for a reply of `min_length` to `max_length` characters, falling in a straight line to 0 beyond, in [0, 1].

    It reaches 0 for an empty reply, and for one twice as long as `max_length`. White space around it is not counted.
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
    """Minus the share of runs of `NGRAM` pieces that stood in the reply before, in (-1, 0]; 0 where none repeats.

    Pieces are Han characters, words and marks. Prose repeats a few; a reply that goes in circles comes close to -1.
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
    """1 where the reply gives the advice that the question needs, 0 where not, None where it needs none.

    A row with `meta.required`, a list of groups, needs at least one string of each group. Another row needs emergency
    advice where its question names an emergency sign and asks for no letter and no number. Read is what the asking
    person reads: advice in the thinking does not count, and neither does one that is negated ("不用去急诊", "no need to
    call an ambulance"). Advice to rows that do not need it is not punished.
    """
    rows = len(completions)
    metas, types = column_of(columns, "meta", rows), column_of(columns, "type", rows)
    golds = column_of(columns, "answer", rows)
    scores: list[float | None] = []
    for completion, prompt, meta, kind, gold in zip(
        completions, prompts or [""] * rows, metas, types, golds, strict=True
    ):
        question = question_text(prompt)
        groups = (meta or {}).get("required")
        kind = kind or (kind_of(str(gold), question) if gold is not None else "text")
        if not groups and kind not in ("choice", "number") and EMERGENCY_SIGNS.search(question):
            groups = [EMERGENCY_ADVICE]
        text = told(completion_text(completion))
        scores.append(float(all(any(says(text, term) for term in group) for group in groups)) if groups else None)
    return scores


RewardFunction = Callable[..., list[float | None]]

REWARDS: dict[str, RewardFunction] = {
    "accuracy": accuracy_reward,
    "format": format_reward,
    "language": language_reward,
    "length": length_reward,
    "repetition": repetition_reward,
    "safety": safety_reward,
}


def choose_rewards(
    names: Sequence[str], reward_file: str | None = None, *, min_length: int = 20, max_length: int = 1000
) -> dict[str, RewardFunction]:
    """The reward functions of those names, in their order, each of which reports what it does wrong (`checked`).

    Args:
        names: those of `REWARDS` and of functions in `reward_file`.
        reward_file: path of a Python file with further functions.
        min_length, max_length: characters, for `length_reward`.

    Raises:
        UserError: a name is unknown or given twice, nothing of the file is named, or as `load_reward_file`.
    """
    if doubled := [name for name, times in Counter(names).items() if times > 1]:
        raise UserError(f"--reward_funcs names {doubled[0]} twice. Name it once and give it more --reward_weights.")
    if not 0 <= min_length <= max_length or max_length < 1:
        raise UserError(
            f"--reward_min_length {min_length} and --reward_max_length {max_length} are no band of lengths in "
            "characters. Give 0 or more, and a maximum that is not below the minimum."
        )
    own = [name for name in names if name not in REWARDS]
    if reward_file is None and own:
        raise UserError(
            f"--reward_funcs {own[0]} is unknown. There are {', '.join(REWARDS)}; functions of your own come from "
            "--reward_file my_rewards.py."
        )
    functions = REWARDS | (load_reward_file(reward_file, own) if reward_file is not None else {})
    functions["length"] = partial(length_reward, min_length=min_length, max_length=max_length)
    return {name: checked(name, functions[name]) for name in names}


def load_reward_file(path: str, names: Sequence[str]) -> dict[str, RewardFunction]:
    """The functions of those names from a Python file on this machine, which is run.

    Each is called as `f(completions=..., prompts=..., **columns)` and returns a number or None for each reply.

    Raises:
        UserError: the file is missing or fails, or has no such function, or one that cannot be called so.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"--reward_file {path} is no Python file on this machine. Give the path of one.")
    spec = importlib.util.spec_from_file_location(f"reward_file_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--reward_file {path} cannot be run: {type(error).__name__}: {error}") from error
    if not names:
        raise UserError(
            f"--reward_file {path} has no effect: --reward_funcs names none of its functions. Those of the names "
            f"{', '.join(REWARDS)} are the built-in ones; add others to --reward_funcs."
        )
    for name in names:
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(
                f"--reward_funcs {name} is neither built in ({', '.join(REWARDS)}) nor a function of {path}."
            )
        parameters = inspect.signature(function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        sound = "completions" in parameters and inspect.Parameter.VAR_KEYWORD in kinds
        if inspect.Parameter.POSITIONAL_ONLY in kinds or inspect.iscoroutinefunction(function):
            sound = False
        if not sound:
            raise UserError(
                f"{name} in {path} cannot be called as a reward. Define it as\n"
                f"    def {name}(completions, **columns): ...\n"
                "with columns such as prompts and answer; it returns a list with a number or None for each completion."
            )
    return {name: getattr(module, name) for name in names}


def checked(name: str, function: RewardFunction) -> RewardFunction:
    """The same function under `name`, which ends the run with a `UserError` where it fails or returns no rewards."""

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
            row = _failing_row(function, completions, columns)
            raise UserError(f"The reward {name} failed with {type(error).__name__}: {error}\n{place(row)}") from error
        if not isinstance(values, Sequence) and hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != rows:
            got = f"{len(values)} values" if isinstance(values, list | tuple) else f"a {type(values).__name__}"
            raise UserError(f"The reward {name} returned {got} for {rows} replies. It must return a list of {rows}.")
        for row, value in enumerate(values):
            if value is not None and not (isinstance(value, SupportsFloat) and math.isfinite(value)):
                raise UserError(
                    f"The reward {name} returned {value!r}, which is no finite number,\n{place(row)}\n"
                    "Return None where a reward does not apply."
                )
        return [None if value is None else float(value) for value in values]

    reward.__name__ = name
    return reward


def _failing_row(function: RewardFunction, completions: Sequence[Completion], columns: dict[str, Any]) -> int:
    """The first row that the function fails on by itself; 0 where it fails on none."""
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
