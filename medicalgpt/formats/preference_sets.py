"""Sets of preferences and of rated answers: a table; one entry, one published shape."""

from collections.abc import Callable, Mapping
from typing import Any

from medicalgpt.formats.shapes import SKIP, Preset, Row, is_transcript
from medicalgpt.formats.turns import parse_transcript
from medicalgpt.readers.problems import RowError


def _kto(row: Row, kind: str) -> dict[str, Any]:
    answer = next(name for name in ("completion", "response") if name in row)
    if row["label"] is not True:
        raise RowError("`label` is false: the answer is a bad example, and would be trained as a good one", SKIP, row)
    return {"question": row["prompt"], "answer": row[answer]}


def _is_kto(row: Row) -> bool:
    return isinstance(row["label"], bool) and bool({"completion", "response"} & set(row))


def _ultrafeedback(row: Row, kind: str) -> dict[str, Any]:
    return {"chosen": row["chosen"], "rejected": row["rejected"]}


def _is_ultrafeedback(row: Row) -> bool:
    """Both conversations begin with the prompt, which the row also has by itself."""
    for name in ("chosen", "rejected"):
        turns = row[name]
        if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, Mapping) for turn in turns):
            return False
        if row["prompt"] not in [turn.get("content", turn.get("value")) for turn in turns[:-1]]:
            return False
    return True


def _hh_rlhf(row: Row, kind: str) -> dict[str, Any]:
    return {name: parse_transcript(row[name]) for name in ("chosen", "rejected")}


def _steer_prompt(text: Any) -> Any:
    """HelpSteer's prompts of several turns as a list of them."""
    if not isinstance(text, str) or "<extra_id_1>" not in text:
        return text
    first, *rest = text.split("<extra_id_1>")
    turns = [{"role": "user", "content": first.strip()}]
    for part in rest:
        role, _, content = part.partition("\n")
        turns.append({"role": role.strip().lower(), "content": content.strip()})
    return turns


def _helpsteer(row: Row, kind: str) -> dict[str, Any]:
    question = {"question": _steer_prompt(row["prompt"])}
    # What was rated, badly perhaps, is not the correct answer of a task.
    return question if kind == "task" else {**question, "answer": row["response"]}


def _ultrafeedback_completions(row: Row, kind: str) -> dict[str, Any]:
    """The completion with the best rating and the one with the worst; of equal ones the first.

    The mean of the aspects is the rating; the overall score, which is wrong in a part of the set, only without them.
    """
    for rate in (_mean_rating, _overall_score):
        rated = [(rating, each["response"]) for each in row["completions"] if (rating := rate(each)) is not None]
        if len(rated) > 1:
            break
    else:
        raise RowError("fewer than two completions with a rating", SKIP, row["completions"])
    best, worst = max(rated, key=lambda pair: pair[0]), min(rated, key=lambda pair: pair[0])
    if best[0] == worst[0]:
        raise RowError(f"no completion is better than the others: all are rated {best[0]:g}", SKIP, row)
    return {"question": row["instruction"], "chosen": best[1], "rejected": worst[1]}


def _mean_rating(completion: Mapping[str, Any]) -> float | None:
    ratings = [aspect.get("Rating") for aspect in (completion.get("annotations") or {}).values() if aspect]
    # Some are "N/A".
    ratings = [float(rating) for rating in ratings if str(rating).strip().replace(".", "", 1).isdigit()]
    return sum(ratings) / len(ratings) if ratings else None


def _overall_score(completion: Mapping[str, Any]) -> float | None:
    score = completion.get("overall_score")
    return float(score) if isinstance(score, int | float) else None


def _has_responses(row: Row) -> bool:
    found = row["completions"]
    return isinstance(found, list) and all(isinstance(each, Mapping) and "response" in each for each in found)


def _openai_preference(row: Row, kind: str) -> dict[str, Any]:
    prompt = {"messages": row["input"]["messages"], "tools": row["input"].get("tools")}
    return {**prompt, "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}


def _swift_preference(row: Row, kind: str) -> dict[str, Any]:
    """The better answer is the last of the turns, or has a field of its own."""
    if "messages" in row:
        *prompt, chosen = row["messages"]
        return {"messages": prompt, "chosen": chosen, "rejected": row["rejected_response"]}
    return {"chosen": row["response"], "rejected": row["rejected_response"]}


def _arena(row: Row, kind: str) -> dict[str, Any]:
    sides = ("conversation_a", "conversation_b")
    if row["winner"] not in ("model_a", "model_b"):
        raise RowError(f"`winner` is {row['winner']!r}: neither answer is better", SKIP, row)
    better, worse = sides if row["winner"] == "model_a" else sides[::-1]
    return {"chosen": row[better], "rejected": row[worse]}


def _steer_pair(prompt: str, answers: tuple[str, str], strength: str) -> Callable[[Row, str], dict[str, Any]]:
    """Negative: the first answer is better; positive: the second."""

    def convert(row: Row, kind: str) -> dict[str, Any]:
        value = row[strength]
        if not isinstance(value, int | float) or value == 0:
            raise RowError(f"`{strength}` is {value!r}: neither answer is better", SKIP, row)
        better, worse = answers if value < 0 else answers[::-1]
        return {"question": _steer_prompt(row[prompt]), "chosen": row[better], "rejected": row[worse]}

    return convert


PREFERENCE_SETS = (
    Preset(
        "ultrafeedback",
        "HuggingFaceH4/ultrafeedback_binarized",
        "MIT",
        ("preference",),
        ("prompt", "chosen", "rejected"),
        convert=_ultrafeedback,
        uses=("messages",),
        check=_is_ultrafeedback,
    ),
    Preset(
        "ultrafeedback-completions",
        "openbmb/UltraFeedback",
        "MIT",
        ("preference",),
        ("instruction", "completions"),
        convert=_ultrafeedback_completions,
        check=_has_responses,
    ),
    Preset(
        "openai-preference",
        "preference files of OpenAI's fine-tuning",
        "your own data",
        ("preference",),
        ("input", "preferred_output", "non_preferred_output"),
        convert=_openai_preference,
    ),
    Preset(
        "swift-preference",
        "preference files of ms-swift",
        "your own data",
        ("preference",),
        ("rejected_response",),
        convert=_swift_preference,
        uses=("messages", "response"),
        check=lambda row: "messages" in row or "response" in row,
        elsewhere={"chat": "To train on the better answer only: --ignore_fields rejected_response."},
    ),
    Preset(
        "chatbot-arena",
        "lmsys/chatbot_arena_conversations",
        "CC BY 4.0 (prompts); CC BY-NC 4.0 (answers)",
        ("preference",),
        ("conversation_a", "conversation_b", "winner"),
        convert=_arena,
    ),
    Preset(
        "hh-rlhf",
        "Anthropic/hh-rlhf",
        "MIT",
        ("preference",),
        ("chosen", "rejected"),
        convert=_hh_rlhf,
        check=lambda row: is_transcript("chosen")(row) and is_transcript("rejected")(row),
    ),
    Preset(
        "kto",
        "trl-lib/kto-mix-14k",
        "see its page",
        ("chat",),
        ("prompt", "label"),
        convert=_kto,
        uses=("completion", "response"),
        check=_is_kto,
    ),
    Preset(
        "helpsteer3",
        "nvidia/HelpSteer3 (preference)",
        "CC BY 4.0",
        ("preference",),
        ("context", "response1", "response2", "overall_preference"),
        convert=_steer_pair("context", ("response1", "response2"), "overall_preference"),
    ),
    Preset(
        "helpsteer2-preference",
        "nvidia/HelpSteer2 (preference)",
        "CC BY 4.0",
        ("preference",),
        ("prompt", "response_1", "response_2", "preference_strength"),
        convert=_steer_pair("prompt", ("response_1", "response_2"), "preference_strength"),
    ),
    Preset(
        "helpsteer",
        "nvidia/HelpSteer, nvidia/HelpSteer2",
        "CC BY 4.0",
        ("chat",),
        ("prompt", "response"),
        convert=_helpsteer,
        marks=("helpfulness", "correctness"),
        elsewhere={
            "preference": "They have one answer each, with ratings. Pairs of the answers to one prompt: python "
            "convert_dataset.py --in_file FILE --out_file pairs.jsonl --to preference --pair_by helpfulness."
        },
    ),
)
