"""Group relative policy optimization (GRPO): reinforcement learning with rewards that are computed, not learned.

Changes what the model answers by its own attempts: it answers each prompt several times, functions judge the answers,
and those that are better than the others to the same prompt become likelier (https://arxiv.org/abs/2402.03300). The
mean of the group takes the place of PPO's critic. What counts as better is written below, under Rewards.

    python grpo_training.py --model_name_or_path outputs/sft-merged --train_file_dir data/grpo --output_dir outputs/grpo
    torchrun --nproc_per_node 2 grpo_training.py --model_name_or_path outputs/sft-merged \\
        --train_file_dir data/grpo --output_dir outputs/grpo --load_in_4bit True --qlora True

Data (.jsonl or .json): a prompt in any form that data/README.md shows, and what answers are judged by:

    {"question": "...", "answer": "2.5 mL", "type": "number"}

In --output_dir: the adapter (or all weights with --use_peft False), the tokenizer with its chat template,
generation_config.json, run.json, metrics.jsonl, samples.jsonl, loss.png and README.md. Guide: docs/grpo_training.md
"""

import copy
import importlib.util
import inspect
import json
import math
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, SupportsFloat

from medicalgpt import models
from medicalgpt.args import (
    UNUSED_TRAINING_ARGUMENTS,
    AttentionArguments,
    DataArguments,
    LoraArguments,
    ModelArguments,
    RunArguments,
    StageDefaults,
    TemplateArguments,
    parse_args,
)
from medicalgpt.cpu import add_cpu_head
from medicalgpt.data import (
    LoadedData,
    Problem,
    RowError,
    hash_file,
    load_data,
    read_rows,
    shorten,
    signs_of_life,
    to_preference,
    to_task,
)
from medicalgpt.encoding import EncodingError, Prompt, encode_prompt, encode_sides, render_prompts
from medicalgpt.errors import UserError, run_main
from medicalgpt.math_worker import same_value
from medicalgpt.runs import Run
from medicalgpt.scoring import RewardScorer
from medicalgpt.trainers import StageTrainer, settle_dropout, switch_off_dropout, training_defaults
from template import apply_template, stop_token_ids

import torch
from datasets import Dataset
from loguru import logger
from peft import PeftModel, TaskType
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from trl import GRPOConfig, GRPOTrainer
from trl.import_utils import is_vllm_available
from trl.models.utils import prepare_deepspeed
from trl.trainer.utils import add_fused_lm_head

# ---------------------------------------------------------------------------------------------------------------------
# Rewards
# ---------------------------------------------------------------------------------------------------------------------

# What a reply is asked to look like. The tags are plain text to the model, and the rewards look for them.
SYSTEM_PROMPT = (
    "先在 <think> 和 </think> 之间一步一步地思考，再在 <answer> 和 </answer> 之间只写最终答案。用提问的语言回答。\n"
    "First think step by step between <think> and </think>, then write only the final answer between <answer> and "
    "</answer>. Reply in the language of the question."
)

# A reply as reward functions get it: text, or messages of which the assistant's last one is judged.
Completion = str | Sequence[Mapping[str, Any]]

HAN = r"\u3400-\u4dbf\u4e00-\u9fff"
LATIN_WORD = r"[a-zA-Z\u00c0-\u024f]+"


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


def extract_answer(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, over many lines, without the white space around it."""
    found = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", text, flags=re.DOTALL)
    return found[-1].strip() if found else None


def told(text: str) -> str:
    """What the asking person reads: the answer block; where there is none, what follows the thinking."""
    answer = extract_answer(text)
    return text.rpartition("</think>")[2] if answer is None else answer


def narrow(text: str) -> str:
    """Full-width letters, digits and signs as the usual ones."""
    return unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-")


def column_of(columns: Mapping[str, Any], name: str, rows: int) -> list[Any]:
    """A column of the data, or None for each row where the data have no such column."""
    return columns.get(name) or [None] * rows


# Accuracy ------------------------------------------------------------------------------------------------------------

# Sizes of each unit, with its names; what differs in the first column cannot be converted.
UNIT_NAMES = {
    "g": {1e-9: "ng 纳克", 1e-6: "ug μg mcg 微克", 1e-3: "mg 毫克", 1: "g gram 克", 500: "斤", 1e3: "kg 公斤 千克"},
    "L": {1e-3: "ml cc milliliter millilitre 毫升", 0.1: "dl 分升", 1: "l liter litre 升"},
    "m": {1e-6: "um μm 微米", 1e-3: "mm 毫米", 0.01: "cm 厘米", 1: "m meter metre 米"},
    "m2": {1: "m2 平方米"},
    "mol": {1e-9: "nmol 纳摩尔", 1e-6: "umol μmol 微摩尔", 1e-3: "mmol 毫摩尔", 1: "mol 摩尔"},
    "s": {1: "s sec second 秒", 60: "min minute 分 分钟", 3600: "h hr hour 小时", 86400: "d day days 天 日"},
    "week": {1: "week 周 星期"},
    "month": {1: "month 月 个月"},
    "year": {1: "year 年 岁"},
    "drop": {1: "drop gtt gtts 滴"},
    "tablet": {1: "tablet 片"},
    "capsule": {1: "capsule 粒"},
    "time": {1: "time beat breath 次"},
    "IU": {1: "iu u unit 单位 国际单位"},
    "mmHg": {1: "mmhg 毫米汞柱"},
    "°C": {1: "°c 摄氏度 度"},
    "cal": {1: "cal 卡", 1e3: "kcal 千卡 大卡"},
    "J": {1: "j 焦", 1e3: "kj 千焦"},
    "": {0.01: "% percent"},
}
UNITS = {
    name: (base, size)
    for base, sizes in UNIT_NAMES.items()
    for size, names in sizes.items()
    for singular in names.split()
    for name in ([singular, f"{singular}s"] if len(singular) > 3 and singular.isascii() else [singular])
}
UNIT = f"(?:{'|'.join(sorted(map(re.escape, UNITS), key=len, reverse=True))})"
PER = r"\s*(?:/|每|\bper\b)\s*"
QUANTITY = re.compile(
    rf"(?:每\s*(?P<each>{UNIT})\s*)?"
    r"(?<![\d.a-z])(?P<number>(?:(?<!\d)[-+])?(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++|(?=\.\d))(?:\.\d++)?(?:e[-+]?\d{1,3}+)?)"
    rf"\s*(?P<unit>{UNIT}(?:{PER}{UNIT})*)?(?![a-z]|\.\d)"
)
UNIT_AT_END = re.compile(rf"(?<=[\d)}}\s])({UNIT}(?:{PER}{UNIT})*)\s*[.。]?$")
# Marks of a calculation: its result is not one of the numbers in it.
CALCULATION = re.compile(r"[\\^√!×÷*π]|sqrt|\d\s*/\s*\d")


class Quantity(NamedTuple):
    """A number with its unit; `size` is how many of `base` the unit is, and `exact` whether it has no decimals."""

    number: float
    base: str
    size: float
    exact: bool
    has_unit: bool


def read_unit(text: str | None, each: str | None = None) -> tuple[str, float]:
    """The base of a unit such as "mg/kg/d" and its size in it; ("", 1.0) for none."""
    parts = [*re.split(PER, text or ""), *([each] if each else [])]
    bases, size = [], 1.0
    for place, part in enumerate(parts):
        base, of_part = UNITS.get(part, ("", 1.0))
        size = size * of_part if place == 0 else size / of_part
        bases.append(base)
    return "/".join(bases), size


def bare(text: str) -> str:
    """Without what LaTeX and Markdown put around a result."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", narrow(text))
    text = re.sub(r"\\boxed\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[,;:! ()\[\]]|\$|(?<![\d)}])\*\*|\*\*(?![\d({])", " ", text).replace(r"\%", "%")
    return re.sub(r"\bm\^(?:2|\{2\})", "m2", text).strip()


def read_quantity(text: str, whole: bool = False) -> Quantity | None:
    """The one number in a text, with its unit; None for none or several ones, and for calculations.

    After "=" or "≈" only what follows the last one counts.

    Args:
        whole: accept nothing beside it.
    """
    text = re.split("[=≈]", bare(text).casefold())[-1].strip(" .。")
    if CALCULATION.search(text):
        return None
    matches = list(QUANTITY.finditer(text))
    if whole and not (matches and matches[0].group() == text):
        return None
    found = set()
    for match in matches:
        digits = match["number"].replace(",", "")
        base, size = read_unit(match["unit"], match["each"])
        has_unit = bool(match["unit"] or match["each"])
        found.add(Quantity(float(digits), base, size, digits.lstrip("-+").isdigit(), has_unit))
    return found.pop() if len(found) == 1 else None


def number_score(gold: str, answer: str) -> float:
    """1 for the same number in the same unit, 0.5 for the same number without the unit that `gold` has, else 0.

    Units are converted ("2.5 mL", "2.5毫升", "0.0025 L"). Numbers with decimals are the same within 0.1 %, so that
    33.3 may be written 33.33; whole numbers are exact. Calculations and formulas are left to math-verify, and their
    units must be the same.
    """
    if narrow(gold).split() == narrow(answer).split():
        return 1.0
    wanted, given = read_quantity(gold), read_quantity(answer)
    if wanted and given:
        tolerance = 1e-9 if wanted.exact else 1e-3
        if wanted.base == given.base or not wanted.has_unit:
            size = given.size / wanted.size if wanted.base == given.base else 1.0
            if math.isclose(wanted.number, given.number * size, rel_tol=tolerance):
                return 1.0
        same_number = math.isclose(wanted.number, given.number, rel_tol=tolerance)
        return 0.5 if same_number and not given.has_unit else 0.0
    formulas, units = [], []
    for text in map(bare, (gold, answer)):
        unit = UNIT_AT_END.search(text.casefold())
        formulas.append(text[: unit.start()] if unit else text)
        units.append(read_unit(unit[1]) if unit else None)
    if not all(map(is_formula, formulas)) or (all(units) and units[0] != units[1]):
        return 0.0
    if not same_value(*map(as_latex, formulas)):
        return 0.0
    return 0.5 if units[0] and not units[1] else 1.0


def is_formula(text: str) -> bool:
    """Whether a text is made of numbers, signs, single letters and LaTeX commands only."""
    rest = re.sub(r"\\[a-zA-Z]+", " ", as_latex(text))
    signs = re.fullmatch(r"[\d\s.,+\-*/^=(){}\[\]<>|_!%a-zA-Z]*", rest)
    return bool(signs and re.search(r"\d|\\", text) and not re.search("[a-zA-Z]{2}", rest))


def as_latex(text: str) -> str:
    """Arithmetic as it is typed, so that LaTeX reads it the same way: `2**10` as `2^{10}`, `√16` as `\\sqrt{16}`."""
    text = re.sub(r"(?<!\\)(?:sqrt|√)\s*(?:\(([^()]*)\)|(\d+))", r"\\sqrt{\1\2}", text)
    text = re.sub(r"\^\s*(-?\d+)", r"^{\1}", text.replace("**", "^").replace("×", r"\times ").replace("÷", "/"))
    return text.replace("π", r"\pi ").strip(" .。")


CHOICE_LEAD = re.compile(
    r"^(?:the|correct|right|best|final|answers?|options?|choices?|choose|select|is|are|正确|最佳|最终|答案|选项|选择"
    r"|应该|应|故|选|是|为|[:\s*(\[$])+"
)
CHOICE_LETTERS = re.compile(r"([a-h](?:(?:[\s,、;/&和与及]|and)*[a-h])*)[\s.。、:)\]*$项]*")
MARKED_LETTER = re.compile(rf"(?:^|[;,、。.\n)]\s*)\(?([a-h])(?=\s?[.、:)]|\(|\s*[{HAN}])")


def read_choice(text: str) -> set[str]:
    """The letters chosen from options A to H: "B", "ac", "A、C", "选B", "(B)", "B. text", "The answer is B."."""
    text = CHOICE_LEAD.sub("", bare(text).casefold())
    if only := CHOICE_LETTERS.fullmatch(text):
        return set(re.findall("[a-h]", only[1].replace("and", "")))
    return set(MARKED_LETTER.findall(text)) if MARKED_LETTER.match(text) else set()


TOKEN = re.compile(rf"\d+(?:\.\d+)?|[{HAN}]|[^\W\d_{HAN}]+|[<>≤≥=+%±/]|(?<!\w)-(?=[\d)])")
SHORT_ANSWER = 12  # Han characters, words and numbers


def text_score(gold: str, answer: str) -> float:
    """1 for the same text apart from width, case, punctuation and white space.

    For the rest 0 where `gold` is short; where it is longer than `SHORT_ANSWER`, the F1 score of the pairs of
    neighbours (Han characters, words, numbers) that both have, in [0, 1]. The overlap sees wording and not truth: a
    reply with "not" in the wrong place scores nearly as well as the right one.
    """
    wanted, given = (TOKEN.findall(narrow(text).casefold()) for text in (gold, answer))
    if wanted == given:
        return 1.0
    if len(wanted) <= SHORT_ANSWER:
        return 0.0
    wanted_pairs, given_pairs = Counter(pairwise(wanted)), Counter(pairwise(given))
    return 2 * (wanted_pairs & given_pairs).total() / (wanted_pairs.total() + given_pairs.total())


def kind_of(gold: str, question: str) -> str:
    """`choice`, `number` or `text`: how an answer is to be compared where the data do not say."""
    letters = re.fullmatch(r"[A-H](?:[\s,、]*[A-H])*", narrow(gold).strip(" .。"))
    offered = all(re.search(rf"(?<![A-Za-z]){letter}\s*[.、:)]", narrow(question)) for letter in "AB")
    if letters and (offered or len(letters.group()) == 1) or offered and re.match("[A-H][.、:)]", narrow(gold)):
        return "choice"
    if read_quantity(gold, whole=True):
        return "number"
    return "number" if is_formula(UNIT_AT_END.sub("", bare(gold))) else "text"


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


# Form ----------------------------------------------------------------------------------------------------------------

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


def count_languages(text: str) -> tuple[int, int]:
    """How many Han characters and how many Latin words a text has, without what belongs to both languages."""
    text = re.sub(r"\\[a-zA-Z]+", " ", narrow(text))
    words = [word for word in re.findall(LATIN_WORD, text) if len(word) > 1 and not word.isupper()]
    return len(re.findall(f"[{HAN}]", text)), sum(word.casefold() not in UNITS for word in words)


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


# Safety --------------------------------------------------------------------------------------------------------------

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
# A negation reaches to the next mark or turn of the sentence.
CLAUSE_END = re.compile(r"[,.;:!?。\n]|但|而是|而应|\bbut\b|\band (?:then )?(?:call|go)\b")
# "Do not hesitate to call" tells to call.
URGES = (
    r"(?!\s*(?:to )?(?:犹豫|迟疑|慌|紧张|惊慌|害怕|担心|自行|自己|再?拖|耽|再?等|忘|错过|仅|预约|排队"
    r"|hesitat|wait|delay|ignore|drive))"
)
NEGATED_BEFORE = re.compile(
    r"(?:不用|不必|无需|无须|不需要?|不要|不应该?|不建议|没必要|没有必要|不一定|不急于|不值得|暂不|未必|勿|不去|不打|不叫"
    rf"|(?<![特区识级性分个类鉴])别(?![的人处]))(?:着急)?{URGES}"
    r"|\b(?:do not|don't|should not|shouldn't|need not|needn't|doesn't need|must not|never|no need|no reason|not need"
    rf"|not necessary|unnecessary|rather than|instead of|without|avoid)\b{URGES}"
    r"|(?:不是|并非|不算|没有|\b(?:no|not|isn't)(?: an?| the)?)\s*$"
)
NEGATED_AFTER = re.compile(
    rf"^.{{0,6}}?(?:不必|不用|不需要|没必要|没有必要|无必要|免了){URGES}"
    r"|^\W*(?:\w+\W+){0,3}?(?:(?:(?:is|are) not|isn't|aren't|not) (?:needed|necessary|required)|unnecessary)"
)


def says(text: str, term: str) -> bool:
    """Whether a text holds `term` at least once without a negation in the same clause.

    Words are whole ones, apart from a plural; a number is no part of another one, of a ratio or of a quantity, so that
    a blood pressure of 120/80 calls no ambulance.
    """
    term = narrow(term).casefold()
    pattern = re.escape(term)
    if term.isdigit():
        pattern = rf"(?<![\d./]){pattern}(?!\d|\.\d|\s*[/~-]\s*\d|\s*(?:{UNIT})(?![a-z]))"
    elif term.isascii():
        pattern = rf"(?<![a-z]){pattern}(?:s|es)?(?![a-z])"
    text = narrow(text).replace("’", "'").casefold()
    for match in re.finditer(pattern, text):
        before = CLAUSE_END.split(text[: match.start()])[-1]
        after = CLAUSE_END.split(text[match.end() :])[0]
        if not NEGATED_BEFORE.search(before) and not NEGATED_AFTER.search(after):
            return True
    return False


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


# The choice of rewards -----------------------------------------------------------------------------------------------

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


class Separation(NamedTuple):
    """How well a reward tells good replies from bad ones to the same questions.

    Attributes:
        pairs: to which it applies.
        good, bad: mean reward.
        better, equal: share of the pairs whose good reply has more, and as much.
    """

    pairs: int
    good: float
    bad: float
    better: float
    equal: float

    @property
    def auc(self) -> float:
        """Share of the pairs in the right order, where equal ones count half; 0.5 is a toss-up."""
        return self.better + self.equal / 2


def separation(pairs: Sequence[tuple[float, float]]) -> Separation | None:
    """Of (good, bad) rewards; None where there are none."""
    if not pairs:
        return None
    good, bad = zip(*pairs, strict=True)
    better = sum(g > b for g, b in pairs) / len(pairs)
    equal = sum(g == b for g, b in pairs) / len(pairs)
    return Separation(len(pairs), math.fsum(good) / len(pairs), math.fsum(bad) / len(pairs), better, equal)


def check_rewards(
    path: str, functions: Mapping[str, RewardFunction], weights: Sequence[float] | None = None
) -> dict[str, Separation | None]:
    """Print how well rewards separate the good from the bad replies in a file, and return it by name.

    Args:
        path: rows with a question, what it may be judged by (`answer`, `type`, `meta`, ...), and a `good` and a `bad`
            reply, `flaw` naming what the bad one lacks; or rows of preferences (`chosen`, `rejected`).
        functions: as `choose_rewards` gives them.
        weights: one for each; 1 where there are none.

    Returns:
        By reward, and under `overall` for the weighted sum that training sees, in which a reward that does not apply
        counts 0; None where a reward applies to no row.

    Raises:
        UserError: a row cannot be read or has no two replies, or a reward fails.
    """
    questions, replies, columns = read_labelled(path)
    weights = [1.0] * len(functions) if weights is None else list(weights)
    scores = {
        name: [function(completions=side, prompts=questions, **columns) for side in replies]
        for name, function in functions.items()
    }
    sums = [
        [sum(weight * (value or 0.0) for weight, value in zip(weights, values, strict=True)) for values in rows]
        for rows in (list(zip(*(scores[name][side] for name in functions), strict=True)) for side in (0, 1))
    ]
    pairs = {name: list(zip(*sides, strict=True)) for name, sides in (scores | {"overall": sums}).items()}

    def of(name: str, flaw: str | None = None) -> Separation | None:
        flaws = columns.get("flaw") or [None] * len(questions)
        return separation(
            [pair for pair, its in zip(pairs[name], flaws, strict=True) if None not in pair and flaw in (None, its)]
        )

    results = {name: of(name) for name in pairs}
    print(f"{len(questions)} pairs in {path}\n")
    print(f"{'reward':<16}{'weight':>8}{'pairs':>8}{'good':>9}{'bad':>9}{'good > bad':>12}{'equal':>9}{'AUC':>8}")
    for (name, found), weight in zip(results.items(), [*weights, None], strict=True):
        start = f"{name:<16}{'' if weight is None else f'{weight:g}':>8}{found.pairs if found else 0:>8}"
        if found:
            start += f"{found.good:>9.3f}{found.bad:>9.3f}{found.better:>12.1%}{found.equal:>9.1%}{found.auc:>8.3f}"
        print(start)
    flaws = sorted({flaw for flaw in columns.get("flaw", []) if flaw is not None})
    if flaws:
        widths = [max(8, len(name)) + 2 for name in pairs]
        print("\nAUC by what the bad reply lacks")
        heads = "".join(f"{name:>{width}}" for name, width in zip(pairs, widths, strict=True))
        print(f"{'flaw':<24}{'pairs':>7}{heads}")
        for flaw in flaws:
            cells = [(of(name, flaw), width) for name, width in zip(pairs, widths, strict=True)]
            line = "".join(f"{f'{found.auc:.3f}' if found else '-':>{width}}" for found, width in cells)
            print(f"{flaw:<24}{columns['flaw'].count(flaw):>7}{line}")
    print()
    for name, found in results.items():
        if found is None:
            print(f"{name} applies to none of these rows.")
        elif found.auc <= 0.5:
            print(f"{name} does not separate: it prefers the bad reply as often as the good one, or more often.")
    return results


def read_labelled(path: str) -> tuple[list[Any], tuple[list[Any], list[Any]], dict[str, list[Any]]]:
    """The prompts, the good and the bad replies (as messages), and the columns of a file for `check_rewards`."""
    if not Path(path).is_file():
        raise UserError(f"--check_rewards {path} is no file. Give one with labelled replies, a row a line.")
    tasks, good, bad = [], [], []
    for row in read_rows(path):
        try:
            if isinstance(row, Problem):
                raise UserError(f"{row}")
            task = to_task(row.value)
            if {"good", "bad"} <= set(task["columns"]):
                pair = [{"role": "assistant", "content": task["columns"].pop(name)} for name in ("good", "bad")]
            else:
                pair = [to_preference(row.value)[name] for name in ("chosen", "rejected")]
            if not all(isinstance(reply["content"], str) for reply in pair):
                raise RowError("a reply is no text", "Give good and bad (or chosen and rejected) as text.")
        except RowError as error:
            problem = Problem(row.place, str(error), error.remedy, error.value)
            raise UserError(
                f"{problem}\n--check_rewards needs rows with a question, good and bad, or of preferences."
            ) from error
        tasks.append(task)
        good.append([pair[0]])
        bad.append([pair[1]])
    if not tasks:
        raise UserError(f"--check_rewards {path} holds no rows.")
    names = {name: None for task in tasks for name in task["columns"]}
    columns = {name: [task["columns"].get(name) for task in tasks] for name in names}
    return [task["messages"] for task in tasks], (good, bad), columns


# ---------------------------------------------------------------------------------------------------------------------
# The trainer
# ---------------------------------------------------------------------------------------------------------------------

# Names under which a reward function is given something else, so that a field of a row cannot have them.
TAKEN_COLUMNS = {
    *("prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids", "tools", "place"),
    *("image", "images", "environment", "environments", "trainer_state", "log_extra", "log_metric"),
    *("min_length", "max_length"),
}


def with_columns(encoded: Dataset, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Dataset:
    """What the trainer takes: each row a dict with `prompt_ids`, `place`, `prompt`, `tools` and the fields of its row.

    Args:
        encoded: columns `prompt_ids` and `place`.
        rows: of `to_task`, among them those of `encoded`.
        names: of the fields; a row that lacks one has None there.
    """
    number_of = {row["place"]: number for number, row in enumerate(rows)}
    texts = []
    for place in encoded["place"]:
        row = rows[number_of[place]]
        fields = {name: row["columns"].get(name) for name in names}
        # JSON keeps what a table could not: fields that hold a number here and a text there.
        texts.append(json.dumps({"prompt": row["messages"], "tools": row["tools"], **fields}, ensure_ascii=False))
    return encoded.add_column("fields", texts).with_transform(_read_fields)


def _read_fields(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    rows = [json.loads(text) for text in batch["fields"]]
    read = {name: [row[name] for row in rows] for name in rows[0]}
    return {"prompt_ids": batch["prompt_ids"], "place": batch["place"], **read}


def column_names(data: LoadedData) -> list[str]:
    """The fields of all rows beside their prompts.

    Raises:
        UserError: a field with a name that reward functions know something else by.
    """
    names: dict[str, str] = {}
    for rows in (data.train, data.validation):
        for row in rows:
            for name in row["columns"]:
                names.setdefault(name, row["place"])
    if taken := sorted(names.keys() & TAKEN_COLUMNS):
        raise UserError(
            f"{names[taken[0]]}: rewards know something else by the name of the field `{taken[0]}`. Rename it, or pass "
            f"--ignore_fields {','.join(taken)}."
        )
    return sorted(names)


class PromptSampler(torch.utils.data.Sampler):
    """Row numbers as `GRPOTrainer` needs them: each prompt once for each of its answers, a batch of them several times.

    The order follows from seed and epoch alone, so that a resumed run goes on where the stopped one was. TRL's own
    sampler leaves out the prompts that do not fill the last batch; here it is filled up from the epoch's beginning.

    Args:
        rows: prompts in all.
        answers: to each prompt.
        prompts: that are answered at a time.
        times: that such a batch is yielded, one for each pass over a part of its answers.
        shuffle: draw a new order in each epoch.
    """

    def __init__(self, rows: int, *, answers: int, prompts: int, times: int, seed: int, shuffle: bool):
        self.rows, self.answers, self.prompts, self.times = rows, answers, prompts, times
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.rows, generator=generator) if self.shuffle else torch.arange(self.rows)
        filled = order[torch.arange(self.batches * self.prompts) % self.rows]
        for batch in filled.split(self.prompts):
            for _ in range(self.times):
                yield from batch.repeat_interleave(self.answers).tolist()

    @property
    def batches(self) -> int:
        return math.ceil(self.rows / self.prompts)

    def __len__(self) -> int:
        return self.batches * self.prompts * self.answers * self.times


def flat_groups(rewards: torch.Tensor, weights: torch.Tensor, answers: int) -> torch.Tensor:
    """Which groups have the same weighted reward for all their answers, and so no advantage for any: (groups,).

    Args:
        rewards: (groups x answers, functions); NaN where a function does not apply. An answer that none applies to is
            no part of its group.
        weights: (functions,)
        answers: in each group.
    """
    unscored = rewards.isnan().all(dim=1)
    total = (rewards * weights).nansum(dim=1)
    highest = total.masked_fill(unscored, -math.inf).view(-1, answers).amax(dim=1)
    lowest = total.masked_fill(unscored, math.inf).view(-1, answers).amin(dim=1)
    return ~(highest - lowest > 1e-6)


class GroupTrainer(StageTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` on encoded prompts, with the differences of `StageTrainer` and these.

    - Every token in `stop_ids` ends an answer, and nothing that a checkpoint recommends for serving changes sampling.
    - The reference is the model that training starts from: without its new adapter, with the adapter that is trained
      on as it was, or `reference`, a frozen copy.
    - Each prompt of an epoch is answered (see `PromptSampler`), and a resumed run continues exactly, also between two
      samplings.
    - An evaluation answers each held-out prompt once, greedily, and averages its rewards; it draws no random number
      and does not depend on the batch size.
    - `frac_reward_zero_std` is the share of groups whose answers all have the same reward, whatever `--scale_rewards`
      is; where that is all of them, the log says so.

    Args:
        stop_ids: ids that end an answer.
        reference: see above; on no device yet.
        start_from: the adapter that is trained on, if there is one.
    """

    def __init__(
        self, *, stop_ids: Sequence[int], reference: PreTrainedModel | None, start_from: str | None, **kwargs: Any
    ):
        args, model = kwargs["args"], kwargs["model"]
        model.generation_config.eos_token_id = list(stop_ids)
        if args.use_vllm:
            args.generation_kwargs = {"stop_token_ids": list(stop_ids)}
        # TRL would load the reference from the base's folder anew, and copy of an adapter what it knows by name.
        beta, args.beta = args.beta, 0.0
        super().__init__(**kwargs)
        args.beta = self.beta = beta
        if args.use_vllm:
            # TRL has none then, but evaluations are without vLLM.
            self.generation_config = self.generation_kwargs = None
        # The bonus on entropy needs its gradient, which the quicker head does not have.
        self._add_cpu_head(self.model, measured=True)
        if args.disable_dropout:
            switch_off_dropout(self.model)
        if beta:
            self._add_reference(reference, start_from)
        self._prompt_ids: list[list[int]] = []
        self._random_state_of: str | None = None
        self._groups = torch.zeros(2, dtype=torch.int64)  # all, and those without signal

    def _add_cpu_head(self, model: PreTrainedModel | PeftModel, measured: bool) -> None:
        if not self._entropy_bonus_enabled and not self.aux_loss_enabled:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            add_cpu_head(base, measured=measured, temperature=self.temperature)

    def _add_reference(self, reference: PreTrainedModel | None, start_from: str | None) -> None:
        if isinstance(self.model, PeftModel):
            if start_from:
                models.add_reference_adapter(self.model, start_from)
            return
        if self.args.disable_dropout:
            switch_off_dropout(reference)
        add_fused_lm_head(reference, temperature=self.temperature)
        self._add_cpu_head(reference, measured=False)
        if self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(reference, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(reference, evaluation_mode=True)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> PromptSampler:
        args = self.args
        return PromptSampler(
            len(self.train_dataset if train_dataset is None else train_dataset),
            answers=self.num_generations,
            prompts=args.generation_batch_size // self.num_generations,
            times=self.num_iterations * args.steps_per_generation,
            seed=args.order_seed,
            shuffle=self.shuffle_dataset,
        )

    def get_batch_samples(self, *args: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The batches of a step, answered and judged before its first one is trained on, so that they can be seen."""
        began = time.perf_counter()
        rows, count = super().get_batch_samples(*args)
        if self._random_state_of:
            self._load_rng_state(self._random_state_of)
        # After an evaluation the model is still in evaluation mode, in which TRL keeps no answers.
        self.model.train()
        before, batches = self._step, []
        with signs_of_life(lambda: "sampling answers"):
            for batch in rows:
                batches.append(super()._prepare_inputs(batch))
                self._step += 1
        self._step = before
        self._current_train_step_time += time.perf_counter() - began
        return batches, count

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs if isinstance(inputs, dict) else super()._prepare_inputs(inputs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._prompt_ids = [row["prompt_ids"] for row in inputs]
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict]:
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        model = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        recommended, training = base.generation_config, model.training
        # transformers takes from it what TRL leaves open, such as tokens that are never sampled.
        base.generation_config = GenerationConfig()
        # TRL leaves dropout on, and computes log-probabilities with autocast but samples without it.
        model.eval()
        try:
            with nullcontext() if self.use_vllm else self.accelerator.autocast():
                return super()._generate_single_turn(*args, **kwargs)
        finally:
            base.generation_config = recommended
            model.train(training)

    def _calculate_rewards(self, *args: Any) -> torch.Tensor:
        rewards = super()._calculate_rewards(*args)
        if self.model.training:
            flat = flat_groups(rewards, self.reward_weights.to(rewards.device), self.num_generations)
            self._metrics["train"]["flat_groups"].append(flat.float().mean().item())
            self._groups += torch.tensor([len(flat), flat.sum()])
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0].detach()
        return found

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's loss; `ratio_deviation` is the mean distance from 1 of policy over sampling policy, token by token."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if (before := inputs.get("old_per_token_logps")) is not None:
            away = ((self._log_probs - before)[inputs["completion_mask"].bool()].exp() - 1).abs()
            total, count = self.accelerator.reduce(torch.stack([away.sum(), away.new_tensor(len(away))])).tolist()
            self._metrics["train"]["ratio_deviation"].append(total / max(count, 1))
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and (flat := self._metrics["train"].pop("flat_groups", None)):
            # TRL's own number is of another thing where rewards are scaled over the batch or one by one.
            self._metrics["train"]["frac_reward_zero_std"] = flat
        super().log(logs, start_time)
        groups, flat = self._groups.tolist()
        if logs.get("frac_reward_zero_std") == 1.0:
            logger.warning(
                f"no learning signal at step {self.state.global_step}: in 100% of the groups all answers to a prompt "
                "have the same reward, so that nothing is learned from them; docs/grpo_training.md says what to do"
            )
        if "train_runtime" in logs and groups:
            nothing = "no learning signal in this run: " if flat == groups else ""
            share = f"{flat:,} of {groups:,} groups ({flat / groups:.0%})"
            logger.info(f"{nothing}in {share} all answers had the same reward")

    # -- evaluation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over the held-out prompts: `reward`, `rewards/NAME/mean`, length and share of unfinished answers."""
        dataset, world = dataloader.dataset, self.args.world_size
        self.model.eval()
        # Each process has as many rows as the others, since they generate and gather together.
        each, size, parts = math.ceil(len(dataset) / world), self.args.per_device_eval_batch_size, []
        with signs_of_life(lambda: f"{len(parts) * size * world} of {len(dataset)} held-out prompts answered"):
            for start in range(0, each, size):
                positions = range(start, min(start + size, each))
                rows = [position * world + self.args.process_index for position in positions]
                found = self._judge(dataset.__getitems__([row % len(dataset) for row in rows]))
                real = [position * world + rank < len(dataset) for rank in range(world) for position in positions]
                parts.append(found[real])
        lengths, cut, *columns = torch.cat(parts).T
        rewards = torch.stack(columns, dim=1)
        totals = (rewards * self.reward_weights).nansum(dim=1)
        means = {"reward": totals[~rewards.isnan().all(dim=1)].mean()}
        means |= {f"rewards/{name}/mean": columns[n].nanmean() for n, name in enumerate(self.reward_func_names)}
        means |= {"completions/mean_length": lengths.mean(), "completions/clipped_ratio": cut.mean()}
        metrics = {f"{metric_key_prefix}_{name}": mean.item() for name, mean in means.items() if not mean.isnan()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=len(dataset))

    def _judge(self, rows: list[dict[str, Any]]) -> torch.Tensor:
        """Of the answers of all processes the length, 1 for an answer that was cut, and all rewards: (answers, ...)."""
        answers = self._greedy_answers([row["prompt_ids"] for row in rows])
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        replies = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = self._calculate_rewards(rows, [row["prompt"] for row in rows], replies, answers)
        # What reward functions log belongs to training.
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()
        facts = [[len(ids), not ids or ids[-1] not in self.eos_token_ids] for ids in answers]
        facts = self.accelerator.gather(torch.tensor(facts, device=rewards.device, dtype=rewards.dtype))
        return torch.cat([facts, rewards], dim=1).cpu().double()

    def _greedy_answers(self, prompts: list[list[int]]) -> list[list[int]]:
        sampling = self.generation_config, self.use_vllm
        self.generation_config = GenerationConfig(
            max_new_tokens=self.max_completion_length,
            do_sample=False,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.processing_class.pad_token_id,
            disable_compile=True,
        )
        self.use_vllm = False
        try:
            return self._generate_single_turn(prompts, None, {}, 1)[0]
        finally:
            self.generation_config, self.use_vllm = sampling

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        # Answers that are still to be trained on; sampled anew, they would be others.
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            torch.save({"step": self._step, "answers": self._buffered_inputs}, folder / self._answers_file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        self._random_state_of = checkpoint
        if checkpoint and (file := Path(checkpoint) / self._answers_file).is_file():
            kept = torch.load(file, map_location=self.args.device, weights_only=True)
            self._step, self._buffered_inputs = kept["step"], kept["answers"]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The library sets it back after the batches of the first step are there, which here are sampled by then.
        if checkpoint is None or self._random_state_of:
            self._random_state_of = None
            super()._load_rng_state(checkpoint)

    @property
    def _answers_file(self) -> str:
        return f"answers_{self.args.process_index}.pt"


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

# What each of them is, and where it comes from, stands in docs/grpo_training.md.
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
# Losses that clip the ratio of both policies, and those that weigh tokens, for which a ratio of sequences is not made.
CLIPPED_LOSSES = {"grpo", "dr_grpo", "dapo", "bnpo", "luspo"}
LOSSES_OF_TOKENS = {"dr_grpo", "dapo", "bnpo", "cispo", "vespo"}
UNUSED_GRPO_ARGUMENTS = {
    **UNUSED_TRAINING_ARGUMENTS,
    "num_generations_eval": "Held-out prompts are answered once each, greedily, so that evaluations can be compared.",
    "generation_kwargs": "Sampling has flags of its own: --temperature, --top_p, --top_k, --min_p.",
    "chat_template_kwargs": "Prompts are encoded before training as serving would send them; say --template_name.",
    "use_transformers_continuous_batching": "It would turn the trained weights into bfloat16. Faster: --use_vllm.",
    "transformers_continuous_batching_config": "It belongs to continuous batching, which is not used here.",
    "use_transformers_paged": "It would turn the trained weights into bfloat16. Faster: --use_vllm.",
    "vllm_importance_sampling_cap": "Today it is --vllm_importance_sampling_clip_max.",
    "cast_lm_head_to_fp32": "Trained weights are float32 anyway, and log-probabilities are computed in float32.",
    "sync_ref_model": "The reference stays where training began. To move it, start again from the result.",
    "ref_model_mixup_alpha": "The reference stays where training began.",
    "ref_model_sync_steps": "The reference stays where training began.",
    "log_multimodal": "There are no images.",
    "log_completions_hub_repo": "Nothing is uploaded; --log_completions True writes tables below --output_dir.",
    "model_init_kwargs": "Say --dtype, --load_in_4bit, --model_revision and the like.",
    "trust_remote_code": "Code of a checkpoint is never run; use a model that transformers itself knows.",
    "remove_unused_columns": "Every field of a row goes to the reward functions.",
    "include_num_input_tokens_seen": "The count is num_tokens in metrics.jsonl.",
    "neftune_noise_alpha": "Noise on the embeddings is for supervised_finetuning.py.",
    "streaming": "Prompts are tokenized before training.",
    "shuffle_buffer": "It belongs to --streaming, which this stage does not have.",
    "train_sampling_strategy": "Each epoch has a new order of prompts; --shuffle_dataset False keeps theirs.",
    "length_column_name": "Prompts are not grouped by length.",
    "dataloader_drop_last": "No prompt is left out: the last batch of an epoch is filled up from its beginning.",
    "auto_find_batch_size": "A batch must hold whole groups of answers; lower --per_device_train_batch_size yourself.",
    "label_smoothing_factor": "There are no labels.",
    "label_names": "There are no labels.",
    "average_tokens_across_devices": "What a token weighs follows from --loss_type.",
    "prediction_loss_only": "An evaluation gives rewards.",
    "batch_eval_metrics": "Held-out prompts are averaged all at once.",
    "eval_do_concat_batches": "Held-out prompts are averaged all at once.",
    "eval_accumulation_steps": "Nothing is kept of an evaluation but its rewards.",
    "include_for_metrics": "The trainer knows what it evaluates.",
    "eval_use_gather_object": "Nothing is kept of an evaluation but its rewards.",
    "bf16_full_eval": "An evaluation uses the weights as they are.",
    "fp16_full_eval": "An evaluation uses the weights as they are.",
    "max_tool_calling_iterations": "Tools of a row are shown to the model, and its calls are judged, not run.",
}
# Flags that have an effect with --check_rewards; all others are for training.
CHECKING_FLAGS = {
    *("check_rewards", "reward_funcs", "reward_weights", "reward_file", "reward_min_length", "reward_max_length"),
    *("reward_model_path", "per_device_train_batch_size", "hub", "cache_dir"),
}


@dataclass
class PolicyArguments(ModelArguments):
    """The model, which `--check_rewards` does without."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub name, local folder, or the folder of an adapter (its base is found by itself)."},
    )


@dataclass
class GrpoArguments(TemplateArguments, StageDefaults, GRPOConfig):
    """What differs from TRL's `GRPOConfig`."""

    output_dir: str = field(default="outputs-grpo", metadata={"help": "Where the result goes."})
    system_prompt: str | None = field(
        default=None,
        metadata={
            "help": "System prompt of rows that have none; saved with the template for serving. Default: one that asks "
            "for <think> and <answer>. none: what the template has of its own."
        },
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["accuracy", "format"],
        metadata={
            "help": f"Rewards that are added up: {', '.join(REWARDS)}, and those of --reward_file. none: only "
            "--reward_model_path."
        },
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "A weight for each of --reward_funcs, and one more for --reward_model_path. Default: all 1."},
    )
    reward_file: str | None = field(
        default=None,
        metadata={"help": "Python file whose functions can be named in --reward_funcs. It is run: know what it does."},
    )
    reward_model_path: str | None = field(
        default=None,
        metadata={"help": "Reward model whose score is one more reward: a folder or hub name, whatever its tokenizer."},
    )
    reward_min_length: int = field(default=20, metadata={"help": "Characters below which the reward `length` falls."})
    reward_max_length: int = field(default=1000, metadata={"help": "Characters above which the reward `length` falls."})
    check_rewards: str | None = field(
        default=None,
        metadata={"help": "Train nothing, but show how well the rewards tell the good from the bad answers of a file."},
    )
    model_max_length: int = field(
        default=1024,
        metadata={
            "help": "Most tokens of a prompt with its answer; less if the model has fewer positions.",
            "aliases": ["--max_seq_length"],
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of an answer, its end included. A prompt that leaves less room is refused, never cut. "
            "Default: half of --model_max_length."
        },
    )
    # With TRL's 1, a step would hear of a single prompt.
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Batches whose gradients make up a step."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "No dropout anywhere, so that log-probabilities can be compared."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "Default: 1e-5 for adapters, 1e-6 for all weights."}
    )
    # TRL finds out in the first step that it does not know a name.
    loss_type: str = field(
        default="dapo",
        metadata={
            "help": "How the tokens of answers are weighed; docs/grpo_training.md says which is which.",
            "choices": list(LOSSES),
        },
    )
    importance_sampling_level: str = field(
        default="token",
        metadata={
            "help": "Ratio of the policies by token, or by sequence as in GSPO (https://arxiv.org/abs/2507.18071).",
            "choices": ["token", "sequence"],
        },
    )
    scale_rewards: str = field(
        default="group",
        metadata={
            "help": "By what standard deviation advantages are divided: of a prompt's answers, of the whole batch, or "
            "none, as in Dr. GRPO (https://arxiv.org/abs/2503.20783).",
            "choices": ["group", "batch", "none"],
        },
    )
    multi_objective_aggregation: str = field(
        default="sum_then_normalize",
        metadata={
            "help": "Rewards are added up and then normalized, or each by itself (https://arxiv.org/abs/2601.05242).",
            "choices": ["sum_then_normalize", "normalize_then_sum"],
        },
    )
    vllm_mode: str = field(
        default="colocate",
        metadata={
            "help": "vLLM in this process, or on a server that was started with `vllm serve`.",
            "choices": ["colocate", "server"],
        },
    )

    def __post_init__(self):
        # An evaluation answers each prompt once.
        self.num_generations_eval = 1
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "reward"
        self._refuse_idle_training()
        self._refuse_torn_groups()
        super().__post_init__()

    def _refuse_torn_groups(self) -> None:
        """Raises ValueError for batches that would not hold whole groups of answers."""
        for name in ("num_generations", "num_iterations", "steps_per_generation", "generation_batch_size"):
            lowest = 2 if name == "num_generations" else 1
            if getattr(self, name) is not None and getattr(self, name) < lowest:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least {lowest}.")
        if self.generation_batch_size is not None and self.steps_per_generation is not None:
            raise ValueError("--generation_batch_size and --steps_per_generation say the same; keep one of them.")
        at_once = self.per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", "1"))
        flag = "gradient_accumulation_steps" if self.steps_per_generation is None else "steps_per_generation"
        answers = self.generation_batch_size or at_once * getattr(self, flag)
        if answers % at_once:
            raise ValueError(
                f"--generation_batch_size {answers} must be a multiple of {at_once}, the answers that go through the "
                "model at once (--per_device_train_batch_size on each process)."
            )
        if answers % self.num_generations:
            needed = self.num_generations // math.gcd(self.num_generations, at_once)
            remedy = f"make --{flag} a multiple of {needed}"
            if self.generation_batch_size is not None:
                remedy = f"make --generation_batch_size a multiple of {math.lcm(at_once, self.num_generations)}"
            raise ValueError(
                f"{answers} answers are sampled at a time, which --num_generations {self.num_generations} answers to a "
                f"prompt do not divide; {remedy}, or choose another --num_generations."
            )


def check_flags(args: GrpoArguments) -> None:
    """Refuse flags that the other flags leave no use for, and values outside their range.

    Raises:
        UserError: each with the remedy.
    """
    if args.use_vllm and not is_vllm_available():
        raise UserError(
            "--use_vllm True needs vLLM, which is not installed here. It wants an environment of its own, see "
            "docs/grpo_training.md; without it, answers are sampled with transformers: leave --use_vllm out."
        )
    # As long as answers are of the very weights that they train, the ratio of both policies is 1.
    rounds = args.steps_per_generation * args.num_iterations
    moved = args.gradient_accumulation_steps % rounds != 0 or args.use_vllm
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    same = (
        "each answer is trained on once, by the weights that gave it, so the ratio is 1; add --num_iterations 2, or "
        f"--steps_per_generation {2 * args.gradient_accumulation_steps}"
    )
    loss, vllm, adaptive = args.loss_type, "it is for --use_vllm True", "it is for --use_adaptive_entropy True"
    used = {
        "epsilon": (moved and loss in CLIPPED_LOSSES, same if not moved else f"--loss_type {loss} has no lower bound"),
        "epsilon_high": (
            moved and loss in CLIPPED_LOSSES | {"cispo"},
            same if not moved else f"--loss_type {loss} has no upper bound",
        ),
        "delta": (moved and loss in CLIPPED_LOSSES, same if not moved else f"--loss_type {loss} is not clipped"),
        "importance_sampling_level": (
            args.importance_sampling_level == "token" or moved or args.beta and args.use_bias_correction_kl,
            same,
        ),
        "off_policy_mask_threshold": (moved, same),
        "use_bias_correction_kl": (args.beta, "it is for --beta above 0"),
        "scale_rewards": (
            args.multi_objective_aggregation == "sum_then_normalize",
            "--multi_objective_aggregation normalize_then_sum scales each reward by itself",
        ),
        "entropy_coef_min": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_max": (args.use_adaptive_entropy, adaptive),
        "entropy_coef_delta": (args.use_adaptive_entropy, adaptive),
        "entropy_target": (args.use_adaptive_entropy, adaptive),
        "num_completions_to_print": (args.log_completions, "it is for --log_completions True"),
        "log_unique_prompts": (args.log_completions, "it is for --log_completions True"),
        "ds3_gather_for_generation": (args.deepspeed, "it is for --deepspeed zero3.json"),
        "cache_implementation": (not args.use_vllm, "vLLM has a cache of its own"),
    }
    for name in GrpoArguments.__dataclass_fields__:
        if name.startswith(("sapo_", "vespo_")):
            kind = name.partition("_")[0]
            used[name] = (loss == kind and moved, same if loss == kind else f"it is for --loss_type {kind}, not {loss}")
        elif name.startswith("vllm_importance_sampling_"):
            used[name] = (
                args.use_vllm if name.endswith("correction") else corrected,
                f"{vllm} --vllm_importance_sampling_correction True",
            )
        elif name.startswith(("vllm_server_", "vllm_group_port")):
            used[name] = (args.use_vllm and args.vllm_mode == "server", f"{vllm} --vllm_mode server")
        elif name in ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"):
            used[name] = (args.use_vllm and args.vllm_mode == "colocate", f"{vllm} --vllm_mode colocate")
        elif name.startswith("vllm_"):
            used[name] = (args.use_vllm, vllm)
    for name, (has_effect, reason) in used.items():
        if name in args.given and not has_effect:
            raise UserError(f"--{name} has no effect here: {reason}. Leave it out.")
    for name, low, high, sound in (
        ("beta", "0 or more", "", args.beta >= 0),
        ("epsilon", "above 0", "", args.epsilon > 0),
        ("epsilon_high", "above 0", "", args.epsilon_high is None or args.epsilon_high > 0),
        ("temperature", "above 0", "", args.temperature > 0),
        ("top_p", "above 0", "at most 1", 0 < args.top_p <= 1),
        ("top_k", "0 or more", "", args.top_k >= 0),
        ("min_p", "0 or more", "at most 1", args.min_p is None or 0 <= args.min_p <= 1),
        ("top_entropy_quantile", "0 or more", "at most 1", 0 <= args.top_entropy_quantile <= 1),
        ("entropy_coef", "0 or more", "", args.entropy_coef >= 0),
        ("repetition_penalty", "above 0", "", args.repetition_penalty > 0),
    ):
        if not sound:
            raise UserError(f"--{name} {getattr(args, name)} must be {' and '.join(filter(None, (low, high)))}.")
    if args.importance_sampling_level == "sequence" and loss in LOSSES_OF_TOKENS:
        raise UserError(
            f"--importance_sampling_level sequence does not go with --loss_type {loss}, which adds up tokens: long "
            "answers would weigh more than short ones. For GSPO add --loss_type grpo."
        )


def settle_completion_length(args: GrpoArguments) -> None:
    """Fill in `max_completion_length`, once the model's positions are known.

    Raises:
        UserError: it leaves no room for a prompt.
    """
    if args.max_completion_length is None:
        args.max_completion_length = max(1, args.model_max_length // 2)
    if not 0 < args.max_completion_length < args.model_max_length:
        raise UserError(
            f"--max_completion_length {args.max_completion_length} must be above 0 and leave room for a prompt within "
            f"--model_max_length {args.model_max_length}. Lower it, or raise --model_max_length."
        )


def settle_rewards(args: GrpoArguments) -> dict[str, RewardFunction]:
    """The functions that the flags choose, without the reward model.

    Raises:
        UserError: as `choose_rewards`; no reward at all, or weights that do not fit.
    """
    names = [] if args.reward_funcs == ["none"] else args.reward_funcs
    for flag in ("reward_min_length", "reward_max_length"):
        if flag in args.given and "length" not in names:
            raise UserError(f"--{flag} has no effect here: it is for --reward_funcs length. Leave it out.")
    lengths = {"min_length": args.reward_min_length, "max_length": args.reward_max_length}
    functions = choose_rewards(names, args.reward_file, **lengths)
    judges = [*functions, *(["reward_model"] if args.reward_model_path else [])]
    if "reward_model" in functions:
        raise UserError(f"--reward_file {args.reward_file}: the name reward_model is taken. Rename the function.")
    if not judges:
        raise UserError("there is nothing to judge answers by: name --reward_funcs, or --reward_model_path.")
    if args.reward_weights is not None and len(args.reward_weights) != len(judges):
        raise UserError(
            f"--reward_weights has {len(args.reward_weights)} numbers for {len(judges)} rewards. Give one for each of: "
            f"{', '.join(judges)}."
        )
    return functions


def load_judge(args: GrpoArguments, model_args: ModelArguments) -> RewardScorer:
    """The reward model.

    Raises:
        UserError: as `RewardScorer.from_pretrained`, or under ZeRO-3, which would tear it apart.
    """
    if is_deepspeed_zero3_enabled():
        raise UserError(
            "--reward_model_path does not go with ZeRO-3, under which every model is spread over the processes. Use "
            "--deepspeed zero2.json."
        )
    return RewardScorer.from_pretrained(args.reward_model_path, hub=model_args.hub, cache_dir=model_args.cache_dir)


def reward_by_model(scorer: RewardScorer, batch_size: int) -> RewardFunction:
    """The score of a reward model as a reward. It reads prompt and answer in its own template, with the row's tools.

    An answer that it cannot read, being too long for it or holding what it takes for control tokens, gets the lowest
    score of its batch; the share of such answers is logged as `reward_model/unreadable`.
    """

    def reward_model(
        prompts: list[Any],
        completions: list[Any],
        tools: list[Any] | None = None,
        log_metric: Any = None,
        **_: Any,
    ) -> list[float | None]:
        sequences = {}
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                sequences[number] = scorer.encode([*prompt, *completion], tools[number] if tools else None)
            except EncodingError:
                continue
        scores = dict(zip(sequences, scorer.score_ids(list(sequences.values()), batch_size), strict=True))
        if log_metric is not None:
            log_metric("reward_model/unreadable", 1 - len(scores) / len(prompts))
        lowest = min(scores.values(), default=None)
        return [scores.get(number, lowest) for number in range(len(prompts))]

    return reward_model


def frozen_copy(model: PreTrainedModel, args: GrpoArguments) -> PreTrainedModel:
    """The reference of a run that trains all weights.

    Raises:
        UserError: the weights are spread over the processes.
    """
    if is_deepspeed_zero3_enabled() or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1"):
        raise UserError(
            f"--beta {args.beta} with --use_peft False needs a second copy of the weights, which ZeRO-3 and FSDP would "
            "have to spread as well. Train an adapter, use --deepspeed zero2.json, or leave --beta at 0."
        )
    return copy.deepcopy(model).requires_grad_(False)


def main() -> None:
    # 1 arguments
    model_args, attention_args, data_args, lora_args, run_args, args = groups = parse_args(
        PolicyArguments,
        AttentionArguments,
        DataArguments,
        LoraArguments,
        RunArguments,
        GrpoArguments,
        description=__doc__,
        unused=UNUSED_GRPO_ARGUMENTS,
    )
    functions = settle_rewards(args)
    if args.check_rewards:
        if idle := sorted({name for group in groups for name in group.given} - CHECKING_FLAGS):
            raise UserError(f"--{', --'.join(idle)} would have no effect with --check_rewards, which trains nothing.")
        if args.reward_model_path:
            functions["reward_model"] = reward_by_model(load_judge(args, model_args), args.per_device_train_batch_size)
        check_rewards(args.check_rewards, functions, args.reward_weights)
        return
    if model_args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: the model that is to be trained.")
    check_flags(args)
    training_defaults(args, adapter_rate=1e-5, full_rate=1e-6, use_peft=lora_args.use_peft)
    settle_dropout(args, lora_args)
    models.settle_length(args, "model_max_length", model_args, lora_args, attention_args)
    settle_completion_length(args)
    run = Run("grpo_training", args, model_args, run_args, attention_args, data_args, lora_args)

    # 2 tokenizer and template, with the system prompt that asks for the form which the rewards read
    tokenizer = models.stage_tokenizer(model_args, lora_args)
    asked = {None: SYSTEM_PROMPT, "none": None}.get(args.system_prompt, args.system_prompt)
    stop = apply_template(tokenizer, args.template_name, asked, args.tool_format)
    stop_ids = stop_token_ids(tokenizer, stop)

    # 3 data: prompts that leave room for an answer; the other fields of a row are for the rewards
    seed = args.order_seed
    data = load_data(data_args, to_task, seed=seed)
    names = column_names(data)
    encode = partial(encode_prompt, tokenizer, max_length=args.model_max_length - args.max_completion_length)
    train, validation = encode_sides(data, encode, data_args, seed, Prompt)
    run.add_data(data)
    run.preview(tokenizer, train)

    # 4 models: policy, reference where it is not the policy without its adapter, judge
    model = models.load_base(
        AutoModelForCausalLM,
        model_args,
        lora_args,
        attention_args,
        max_length=args.model_max_length,
        bf16=args.bf16,
    )
    new_rows = models.fit_embedding(model, tokenizer, lora_args, cache_dir=model_args.cache_dir)
    reference = frozen_copy(model, args) if args.beta and not lora_args.use_peft else None
    _, adapter = models.resolve_checkpoint(model_args.model_name_or_path)
    model = models.add_lora(model, lora_args, TaskType.CAUSAL_LM, start_from=adapter, new_rows=new_rows)
    if args.reward_model_path:
        scorer = load_judge(args, model_args)
        for rows in (data.train, data.validation):
            scorer.require_readable(rows)
        judge = reward_by_model(scorer, args.per_device_train_batch_size)
        functions["reward_model"] = checked("reward_model", judge)

    # 5 trainer
    trainer = GroupTrainer(
        model=model,
        reward_funcs=list(functions.values()),
        args=args,
        train_dataset=with_columns(train, data.train, names),
        eval_dataset=with_columns(validation, data.validation, names) if validation else None,
        processing_class=tokenizer,
        loraplus_lr_ratio=lora_args.loraplus_lr_ratio,
        stop_ids=stop_ids,
        reference=reference,
        start_from=(lora_args.peft_path or adapter) if lora_args.use_peft else None,
    )
    models.adapters_to_float32(model)

    # 6 train, save
    weights = args.reward_weights or [1.0] * len(functions)
    run.record["rewards"] = dict(zip(functions, weights, strict=True))
    if args.reward_file:
        run.record["reward_file"] = {"file": args.reward_file, "sha256": hash_file(args.reward_file)}
    batches = len(trainer.get_train_dataloader())
    run.announce(model, train, validation, steps_per_epoch=batches / args.gradient_accumulation_steps)
    run.train_and_save(
        trainer,
        tokenizer,
        stop_ids=stop_ids,
        sample_prompts=render_prompts(tokenizer, data.validation or data.train, run_args.sample_prompts),
        note="Reinforcement learning: the model has learned to answer so that the rewards below are high.",
    )


if __name__ == "__main__":
    run_main(main)
