"""Measure what each stage changed, on held-out text, questions, preferences and tasks.

    python eval_pipeline.py --models base=outputs/tiny-base pt=outputs/pt sft=outputs/sft-merged \\
        dpo=outputs/dpo-merged --first_chat_model sft --text_file_dir data/pretrain \\
        --chat_file data/finetune/validation.jsonl --preference_file data/reward/validation.jsonl \\
        --output_file outputs/eval.json

Models are given in the order of training.

- Perplexity (--text_file_dir): exp(total negative log-likelihood / total tokens), every document scored alone.
- Exact match (--chat_file): a greedy answer equal to the reference, apart from white space at both ends.
- Preference accuracy (--preference_file): the share of pairs in which the chosen answer has the higher log-probability
  per token. Summed over its tokens, an answer loses with each one that it has, so that the shorter answer of a pair
  would win, whatever it says.
- Good answers (--preference_file): greedy answers to those of its prompts whose rows have
  `"meta": {"required": [["cardiology"], ["ambulance", "emergency"]]}`: a good one holds at least one string of each
  group, in capitals or not.
- Reward accuracy (--reward_model): the share of the same pairs in which that model scores the chosen answer higher,
  and the mean difference of the two scores (margin).
- Score of own answers (--reward_model): the mean of that model's scores of each model's greedy answers to the same
  prompts. One that was stopped by --max_new_tokens is scored as if it ended there.
- Right answers and right format (--task_file): the shares of greedy replies to which the rewards `accuracy` and
  `format` of `grpo_training.py` give 1, asked for with its system prompt.

The counts, the answers to a few fixed questions and the files that were measured go into --output_file, which
`build_report.py` turns into a table and a page. Results of a model whose weights, data and settings have not changed
are reused. Models that were never taught to answer often do not stop by themselves, which makes them slow: those before
--first_chat_model answer fewer questions (--max_chat_samples_before), the same ones each.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medicalgpt.code_version import code_version
from medicalgpt.data import sources
from medicalgpt.errors import UserError, run_main
from medicalgpt.evaluation.held_out import (
    PROMPT_EXAMPLES,
    TASK_EXAMPLES,
    HeldOut,
    PreferencePair,
    Question,
    pick_examples,
    read_documents,
    read_preferences,
    read_questions,
    read_tasks,
    shuffled,
)
from medicalgpt.evaluation.measures import (
    Judge,
    count_answers,
    count_preferences,
    is_exact,
    is_good,
    perplexity,
    score_documents,
    score_pairs,
)

FORMAT = 3
# Name of the reward model's results among those of the models; no model can have it.
REWARD = "=reward"
CHECKPOINT_FILES = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
)


class Progress:
    """Prints a line at least every `every` seconds, also while a single step takes longer than that."""

    def __init__(self, label: str, total: int, every: float = 15.0):
        self.label, self.total, self.every = label, total, every
        self.done = 0
        self.started = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def add(self, count: int) -> None:
        self.done += count

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def _work(self) -> None:
        while not self._ended.wait(self.every):
            left = f", about {self.seconds / self.done * (self.total - self.done):.0f} s left" if self.done else ""
            print(f"  {self.label}: {self.done}/{self.total} after {self.seconds:.0f} s{left}", flush=True)

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def task_rewards() -> tuple[str, dict[str, Judge]]:
    """Return the system prompt with which GRPO asks for replies, and what judges them, by the name of what is counted.

    A reply is right if it gets the whole reward, 1; half of one does not count.
    """
    from medicalgpt.rewards.rewards import REWARDS, SYSTEM_PROMPT

    def judged_by(reward: Callable[..., list[float | None]]) -> Judge:
        def is_right(reply: str, task: Question) -> bool | None:
            columns = {name: [value] for name, value in task.columns.items()}
            (score,) = reward([[{"role": "assistant", "content": reply}]], prompts=[task.messages], **columns)
            return None if score is None else score >= 1

        return is_right

    rewards = REWARDS
    judges = {"right answers": judged_by(rewards["accuracy"]), "right format": judged_by(rewards["format"])}
    return SYSTEM_PROMPT, judges


def answer_questions(
    engine: Any,
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    progress: Progress | None = None,
) -> list[Any]:
    """Return the greedy answer to each question; None where the prompt leaves no room in the model's context.

    Rows with references of like length share a batch, because a batch takes as long as its longest answer.
    """
    from medicalgpt.serving.chat import PromptTooLongError
    from medicalgpt.serving.generation import Sampling

    fitting = []
    for index, question in enumerate(questions):
        try:
            engine.prompt_ids(question.messages, question.tools)
        except PromptTooLongError:
            if progress:
                progress.add(1)
            continue
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
        fitting.append(index)
    fitting.sort(key=lambda index: len(questions[index].reference))
    answers: list[Any] = [None] * len(questions)
    for start in range(0, len(fitting), batch_size):
        chosen = fitting[start : start + batch_size]
        replies = engine.batch(
            [questions[index].messages for index in chosen],
            sampling=Sampling(max_new_tokens=max_new_tokens),
            batch_size=batch_size,
            tools=[questions[index].tools for index in chosen],
        )
        for index, reply in zip(chosen, replies, strict=True):
            answers[index] = reply
        if progress:
            progress.add(len(chosen))
    return answers


def fingerprint_files(paths: Sequence[Path]) -> list[list]:
    """Return [path, bytes, modification time in ns] of each file: what changes when the file does."""
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(paths)]


def fingerprint_checkpoint(folder: str) -> list[list] | None:
    """Return the fingerprint of a local checkpoint and, for an adapter, of its base; None if one is not local."""
    from medicalgpt.models.hub import resolve_checkpoint

    base, adapter = resolve_checkpoint(folder)
    folders = [Path(place) for place in (base, adapter) if place]
    if not all(place.is_dir() for place in folders):
        return None
    return fingerprint_files([file for place in folders for kind in CHECKPOINT_FILES for file in place.glob(kind)])


def evaluate_model(
    name: str, path: str, held_out: HeldOut, limit: int | None, last_model: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one model; what is in the result, the parts below say.

    Args:
        limit: most questions of a kind that it is asked; None for all.
        last_model: lends its chat template and stop tokens to a model without a template.
    """
    from medicalgpt.serving.chat import ChatEngine

    started = time.monotonic()
    engine = ChatEngine.from_pretrained(path)
    result: dict[str, Any] = {
        "name": name,
        "path": path,
        "parameters": engine.model.num_parameters(),
        "text": None,
        "chat": None,
        "answers": None,
        "preference": None,
        "good": None,
        "good_answers": None,
        "prompt_answers": None,
        "task": None,
        "task_format": None,
        "task_answers": None,
        "notes": [],
    }
    if held_out.documents is not None:
        measure_text(result, engine, held_out, args)
    if (held_out.questions or held_out.pairs or held_out.tasks) and not engine.tokenizer.chat_template:
        engine = _lend_template(engine, last_model)
        result["notes"].append(f"it has no chat template; {last_model} lent its template and stop tokens")
    if held_out.questions is not None:
        questions, examples = held_out.questions, held_out.question_examples
        order, judges = held_out.question_order[:limit], {"exact match": is_exact}
        counts, answers = measure_answers(result, engine, questions, order, examples, judges, args)
        result["chat"] = counts["exact match"]
        result["answers"] = [_example_answer(answers[index], questions[index], is_exact) for index in examples]
    if held_out.pairs is not None:
        measure_preferences(result, engine, held_out.pairs, args)
    if held_out.prompts:
        measure_prompts(result, engine, held_out, limit, args)
    if held_out.tasks:
        measure_tasks(result, engine, held_out, limit, args)
    for note in result["notes"]:
        print(f"  {name}: {note}", flush=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def measure_text(result: dict[str, Any], engine: Any, held_out: HeldOut, args: argparse.Namespace) -> None:
    """Put perplexity, and what it is made of document by document, into `result["text"]`."""
    from medicalgpt.data.encoding import encode_document

    name, tokenizer = result["name"], engine.tokenizer
    end = tokenizer.get_vocab().get(held_out.end_of_document, tokenizer.eos_token_id)
    block_size = min(args.block_size, engine.context_length or args.block_size)
    encoded = [
        [
            token
            for piece in encode_document(tokenizer, {"text": text}, block_size=sys.maxsize, end=False)
            for token in piece.input_ids
        ]
        + [end]
        for text in held_out.documents
    ]
    pieces = sum(len(range(0, len(ids) - 1, block_size - 1)) for ids in encoded)
    with Progress(f"{name}: perplexity, pieces of text", pieces) as progress:
        scores = score_documents(engine.model, encoded, block_size, args.batch_size, progress.add)
    result["text"] = {
        "perplexity": perplexity(scores),
        "nll": sum(nll for nll, _ in scores),
        "tokens": sum(tokens for _, tokens in scores),
        "documents": len(scores),
        "document_nll": [round(nll, 4) for nll, _ in scores],
        "document_tokens": [tokens for _, tokens in scores],
    }
    if block_size < args.block_size:
        result["notes"].append(f"text was scored in blocks of {block_size} tokens, the model's context")
    print(
        f"  {name}: perplexity {result['text']['perplexity']:.4g} on {result['text']['tokens']:,} tokens of "
        f"{len(scores):,} documents ({progress.seconds:.1f} s)",
        flush=True,
    )


def measure_answers(
    result: dict[str, Any],
    engine: Any,
    questions: Sequence[Question],
    order: Sequence[int],
    examples: Sequence[int],
    judges: dict[str, Judge],
    args: argparse.Namespace,
    max_new_tokens: int | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[int, Any]]:
    """Ask questions, each once; notes go into `result["notes"]`.

    Args:
        order: indices of the questions that count.
        examples: indices of further questions whose answers are needed.
        judges: by the name of what is counted.
        max_new_tokens: unset: --max_new_tokens.

    Returns:
        The counts of each of `judges`; and the answers by the index of their question, None where it is too long.
    """
    name, sampled, what = result["name"], sorted(order), " and ".join(judges)
    asked = list(dict.fromkeys([*sampled, *examples]))
    with Progress(f"{name}: {what}, answers", len(asked)) as progress:
        replies = answer_questions(
            engine,
            [questions[index] for index in asked],
            max_new_tokens or args.max_new_tokens,
            args.batch_size,
            progress,
        )
    answers = dict(zip(asked, replies, strict=True))
    counted = [index for index in sampled if answers[index] is not None]
    too_long = len(sampled) - len(counted)
    if too_long:
        result["notes"].append(f"{what}: {too_long} questions are longer than its context and were not counted")
    if len(sampled) < len(questions):
        result["notes"].append(f"{what}: asked {len(sampled):,} of {len(questions):,} questions (seed {args.seed})")
    scores = {
        label: count_answers([questions[index] for index in counted], [answers[index] for index in counted], is_right)
        for label, is_right in judges.items()
    }
    shares = ", ".join(f"{label} {_share(vars(score))}" for label, score in scores.items())
    stopped = sum(answers[index].finish_reason == "stop" for index in counted)
    print(
        f"  {name}: {shares}, stopped by itself {stopped}/{len(counted)} ({progress.seconds:.1f} s)",
        flush=True,
    )
    counts = {
        label: {**vars(score), "asked": len(sampled), "prompt_too_long": too_long} for label, score in scores.items()
    }
    return counts, answers


def measure_prompts(
    result: dict[str, Any], engine: Any, held_out: HeldOut, limit: int | None, args: argparse.Namespace
) -> None:
    """Put the counts of good answers, those to the examples, and the text of all that count, into `result`."""
    prompts, order, examples = held_out.prompts, held_out.prompt_order[:limit], held_out.prompt_examples
    judges = {"good answers": is_good}
    counts, answers = measure_answers(result, engine, prompts, order, examples, judges, args)
    result["good"] = counts["good answers"] if any(prompt.required for prompt in prompts) else None
    result["good_answers"] = [_example_answer(answers[index], prompts[index], is_good) for index in examples]
    counted = {index: answers[index].text for index in order if answers[index] is not None}
    result["prompt_answers"] = [counted.get(index) for index in range(len(prompts))]


def measure_tasks(
    result: dict[str, Any], engine: Any, held_out: HeldOut, limit: int | None, args: argparse.Namespace
) -> None:
    """Put the counts of right answers and of right format, and the replies to the examples, into `result`."""
    system_prompt, judges = task_rewards()
    tasks = [_with_system_prompt(task, system_prompt) for task in held_out.tasks]
    order, examples = held_out.task_order[:limit], held_out.task_examples
    counts, answers = measure_answers(result, engine, tasks, order, examples, judges, args, args.task_max_new_tokens)
    result["task"], result["task_format"] = counts["right answers"], counts["right format"]
    is_right = judges["right answers"]
    result["task_answers"] = [_example_answer(answers[index], tasks[index], is_right) for index in examples]


def measure_preferences(
    result: dict[str, Any], engine: Any, pairs: Sequence[PreferencePair], args: argparse.Namespace
) -> None:
    """Put what `count_preferences` gives, and the number of pairs that are `too_long`, into `result["preference"]`."""
    from medicalgpt.models.templating import TemplateError

    name = result["name"]
    try:
        encoded = encode_pairs(engine.tokenizer, pairs, engine.context_length)
    except TemplateError as error:
        result["notes"].append(f"its pairs were not scored: {str(error).splitlines()[0]}")
        return
    with Progress(f"{name}: preferences, answers", 2 * len(encoded)) as progress:
        scores = score_pairs(engine.model, list(encoded.values()), args.batch_size, progress.add)
    counts = count_preferences([pairs[index] for index in encoded], scores)
    too_long = len(pairs) - len(encoded)
    result["preference"] = {**counts, "too_long": too_long}
    if too_long:
        result["notes"].append(f"{too_long} pairs are longer than its context and were not counted")
    print(f"  {name}: preference accuracy {_share(counts)} ({progress.seconds:.1f} s)", flush=True)


def encode_pairs(tokenizer: Any, pairs: Sequence[PreferencePair], max_length: int | None) -> dict[int, Any]:
    """Return index -> `encoding.Pair`, of the pairs that fit into `max_length` tokens, as a stage would train on them.

    Raises:
        UserError: a pair that no stage could train on.
        TemplateError: the tokenizer's template has no generation markers, and no shipped one writes the same.
    """
    from medicalgpt.data.encoding import EncodingError, encode_preference
    from template import apply_template

    # A template with markers writes the same text; answering goes on with the tokenizer as it was.
    tokenizer = copy.deepcopy(tokenizer)
    apply_template(tokenizer)
    encoded = {}
    for index, pair in enumerate(pairs):
        try:
            (encoded[index],) = encode_preference(tokenizer, pair.row, max_length=max_length)
        except EncodingError as error:
            if not error.too_long:
                raise UserError(f"{pair.place}: {error.reason}. {error.remedy}.") from error
    return encoded


def evaluate_reward_model(
    path: str,
    pairs: Sequence[PreferencePair],
    prompts: Sequence[Question],
    answers: dict[str, list[str | None]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Return what `count_preferences` gives for the scores of a reward model, its path, and what it thinks of answers.

    Args:
        answers: by the name of a model its answers to `prompts`; None where it was not asked.

    Returns:
        In `models`, by name: `scores`, one for each of `prompts` or None; `mean`, None without scores; `total` of
        them; and `not_scored`, answers that cannot be encoded, counted by reason.

    Raises:
        UserError: it is no reward model, no pair fits into its context, or a score is no number.
    """
    from medicalgpt.data.encoding import EncodingError
    from medicalgpt.rewards.scoring import RewardScorer

    started = time.monotonic()
    scorer = RewardScorer.from_pretrained(path)
    fitting, sequences = [], []
    for pair in pairs:
        try:
            messages, tools = pair.row["messages"], pair.row["tools"]
            both = [scorer.encode([*messages, pair.row[name]], tools) for name in ("chosen", "rejected")]
        except EncodingError as error:
            if not error.too_long:
                raise UserError(f"{pair.place}: {error.reason}. {error.remedy}.") from error
            continue
        fitting.append(pair)
        sequences += both
    if not fitting:
        raise UserError(f"--reward_model {path}: no pair fits into its context.")
    with Progress("reward model: answers of pairs", len(sequences)) as progress:
        scores = scorer.score_ids(sequences, args.batch_size, progress.add)
    counts = count_preferences(fitting, list(zip(scores[::2], scores[1::2], strict=True)))
    print(
        f"  reward model: accuracy {_share(counts)}, margin {counts['margin']:.3g} ({progress.seconds:.1f} s)",
        flush=True,
    )
    judged = {name: score_answers(scorer, name, prompts, texts, args) for name, texts in answers.items()}
    seconds = round(time.monotonic() - started, 1)
    too_long = len(pairs) - len(fitting)
    return {"path": path, **counts, "too_long": too_long, "models": judged, "seconds": seconds}


def score_answers(
    scorer: Any, name: str, prompts: Sequence[Question], texts: Sequence[str | None], args: argparse.Namespace
) -> dict[str, Any]:
    """Return what a `RewardScorer` thinks of a model's answers; see `evaluate_reward_model`."""
    from medicalgpt.data.encoding import EncodingError

    encoded, not_scored = {}, {}
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if text is None:
            continue
        try:
            encoded[index] = scorer.encode([*prompt.messages, {"role": "assistant", "content": text}], prompt.tools)
        except EncodingError as error:
            # What a model writes is no fault of the data.
            reason = "too long for the reward model" if error.too_long else error.reason
            not_scored[reason] = not_scored.get(reason, 0) + 1
    with Progress(f"reward model: answers of {name}", len(encoded)) as progress:
        numbers = scorer.score_ids(list(encoded.values()), args.batch_size, progress.add)
    scores = dict(zip(encoded, numbers, strict=True))
    mean = math.fsum(numbers) / len(numbers) if numbers else None
    left = "".join(f", {count} not scored: {reason}" for reason, count in not_scored.items())
    shown = f"mean score {mean:.3f} of {len(numbers)}" if numbers else "none of its"
    print(f"  reward model: {name}: {shown} own answers{left} ({progress.seconds:.1f} s)", flush=True)
    return {
        "mean": mean,
        "total": len(numbers),
        "not_scored": not_scored,
        "scores": [scores.get(index) for index in range(len(prompts))],
    }


def _share(counts: dict[str, Any]) -> str:
    share = f" ({counts['correct'] / counts['total']:.1%})" if counts["total"] else ""
    return f"{counts['correct']}/{counts['total']}{share}"


def _lend_template(engine: Any, lender: str) -> Any:
    """Return an engine with the chat template and the stop tokens of another checkpoint."""
    from medicalgpt.models.loading import load_tokenizer
    from medicalgpt.serving.chat import ChatEngine

    from transformers import GenerationConfig

    tokenizer = load_tokenizer(lender)
    stop_ids = {tokenizer.eos_token_id}
    if (Path(lender) / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(lender).eos_token_id
        stop_ids.update(ends if isinstance(ends, list) else [ends])
    vocabulary = engine.tokenizer.get_vocab()
    names = tokenizer.convert_ids_to_tokens([end for end in stop_ids if end is not None])
    own = engine.model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = {end for end in (*own, *(vocabulary.get(token) for token in names)) if end is not None}
    engine.model.generation_config.eos_token_id = sorted(ends) or None
    engine.tokenizer.chat_template = tokenizer.chat_template
    return ChatEngine(engine.model, engine.tokenizer)


def _with_system_prompt(task: Question, system_prompt: str) -> Question:
    if task.messages[0]["role"] == "system":
        return task
    return replace(task, messages=[{"role": "system", "content": system_prompt}, *task.messages])


def _example_answer(answer: Any, question: Question, is_right: Judge) -> dict[str, Any]:
    if answer is None:
        return {"text": None, "finish_reason": "prompt too long", "correct": False}
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "correct": bool(is_right(answer.text, question)),
    }


def _read_previous(file: Path) -> list[dict[str, Any]]:
    try:
        previous = json.loads(file.read_text(encoding="utf-8"))
        if previous["format"] != FORMAT:
            return []
        return [*previous["models"], *previous["earlier"], *filter(None, [previous["reward"]])]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        print(f"{file} is not readable as earlier results ({error!r}); everything is measured again.", flush=True)
        return []


def _write_json(file: Path, value: dict[str, Any]) -> None:
    # Renamed into place, so that a run that is stopped leaves the earlier results whole.
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(file)


def _code_hash(tasks: bool) -> str:
    """Hash of the code that decides what is measured: results of other code are not reused."""
    return code_version("eval_pipeline", *(["medicalgpt.rewards.math_worker"] if tasks else []))


def _parse_models(values: Sequence[str]) -> dict[str, str]:
    models: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise UserError(f"--models {value}: expected NAME=FOLDER, for example --models sft=outputs/sft-merged")
        if name in models:
            raise UserError(f"--models: the name {name!r} is given twice.")
        # A missing folder such as outputs/pt has the form of a hub name, and looking that up takes a minute offline.
        if not Path(path).is_dir() and Path(path).parent != Path() and Path(path).parent.is_dir():
            raise UserError(f"--models {value}: no folder {path} (looked in {Path.cwd()}). Has that stage been run?")
        models[name] = path
    return models


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _block_size(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError("a block needs at least 2 tokens: one is predicted from the other")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="In the order of training.")
    parser.add_argument("--text_file_dir", help="Held-out text: a file, or a folder with files named validation*.")
    parser.add_argument("--chat_file", help="Held-out conversations; the last answer of each is the reference.")
    parser.add_argument("--preference_file", help="Held-out pairs of a better and a worse answer.")
    parser.add_argument(
        "--reward_model",
        metavar="DIR",
        help="A reward model: measured on --preference_file too, and scores the answers of --models to its prompts.",
    )
    parser.add_argument("--task_file", help="Held-out tasks with right answers, as grpo_training.py takes them.")
    parser.add_argument("--output_file", required=True, type=Path, help="Where the results go, as JSON.")
    parser.add_argument(
        "--first_chat_model", metavar="NAME", help="The first of --models that was taught to answer; unset: the last."
    )
    parser.add_argument("--max_chat_samples", type=_positive, help="Ask each model at most N questions of a file.")
    parser.add_argument(
        "--max_chat_samples_before",
        type=_positive,
        default=200,
        help="Ask each model before --first_chat_model at most N questions of a file.",
    )
    parser.add_argument("--batch_size", type=_positive, default=64, help="It changes the speed, not the results.")
    parser.add_argument("--max_new_tokens", type=_positive, default=96, help="Most tokens of one answer.")
    parser.add_argument(
        "--task_max_new_tokens", type=_positive, help="Most tokens of one reply to --task_file; unset: 256."
    )
    parser.add_argument("--block_size", type=_block_size, default=512, help="Most tokens of text scored at once.")
    parser.add_argument(
        "--document_unit",
        choices=["auto", "line", "paragraph", "file"],
        default="auto",
        help="What one document is in .txt and .md files; auto: a line of .txt, a whole .md.",
    )
    parser.add_argument("--ignore_fields", default="", help="Fields of a row that are not used, with commas.")
    parser.add_argument("--examples", type=_positive, default=12, help="Questions whose answers are kept to be shown.")
    parser.add_argument("--seed", type=int, default=42, help="Chooses which questions are asked.")
    args = parser.parse_args()
    if not (args.text_file_dir or args.chat_file or args.preference_file or args.task_file):
        parser.error("nothing to measure: give --text_file_dir, --chat_file, --preference_file or --task_file")
    if args.reward_model and not args.preference_file:
        parser.error("--reward_model is measured on pairs: give --preference_file")
    if args.task_max_new_tokens and not args.task_file:
        parser.error("--task_max_new_tokens has no effect without --task_file")
    args.task_max_new_tokens = args.task_max_new_tokens or 256
    return args


def read_held_out(args: argparse.Namespace) -> tuple[HeldOut, dict[str, list[Path]], dict[str, int]]:
    """Return what the flags name, without `end_of_document`; the files of each kind; and questions left out by reason.

    Raises:
        UserError: something is missing, or rows cannot be measured.
    """
    files: dict[str, list[Path]] = {"text": [], "chat": [], "preference": [], "task": []}
    left_out: dict[str, int] = {}
    found: dict[str, Any] = {}
    if args.text_file_dir:
        found["documents"], files["text"] = read_documents(args.text_file_dir, args.document_unit)
        print(
            f"held-out text: {len(found['documents']):,} documents in {', '.join(map(str, files['text']))}", flush=True
        )
    if args.chat_file:
        questions, left_out = read_questions(args.chat_file, args.ignore_fields)
        files["chat"] = sources.find_files(args.chat_file)
        found |= {
            "questions": questions,
            "question_order": shuffled(len(questions), args.seed),
            "question_examples": pick_examples(questions, args.examples),
        }
        skipped = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        print(
            f"held-out questions: {len(questions):,} in {args.chat_file}"
            + (f", left out: {skipped}" if skipped else ""),
            flush=True,
        )
    if args.preference_file:
        pairs, prompts = read_preferences(args.preference_file, args.ignore_fields)
        telling = [prompt for prompt in prompts if prompt.required]
        if not args.reward_model:
            # Other answers could not be judged.
            prompts = telling
        files["preference"] = sources.find_files(args.preference_file)
        found |= {
            "pairs": pairs,
            "prompts": prompts,
            "prompt_order": shuffled(len(prompts), args.seed),
            "prompt_examples": pick_examples(prompts, PROMPT_EXAMPLES),
        }
        print(
            f"held-out preferences: {len(pairs):,} pairs in {args.preference_file}; {len(telling):,} prompts say "
            "what a good answer holds",
            flush=True,
        )
    if args.task_file:
        tasks = read_tasks(args.task_file, args.ignore_fields)
        files["task"] = sources.find_files(args.task_file)
        found |= {
            "tasks": tasks,
            "task_order": shuffled(len(tasks), args.seed),
            "task_examples": pick_examples(tasks, TASK_EXAMPLES),
        }
        print(f"held-out tasks: {len(tasks):,} in {args.task_file}", flush=True)
    return HeldOut(**found), files, left_out


def _shown_question(question: Question) -> dict[str, Any]:
    return {
        "place": question.place,
        "category": question.category,
        "messages": question.messages,
        "reference": question.reference,
        **({"required": question.required} if question.required else {}),
    }


def main() -> None:
    args = parse_arguments()
    models = _parse_models(args.models)
    names = list(models)
    if args.first_chat_model is not None and args.first_chat_model not in models:
        raise UserError(f"--first_chat_model {args.first_chat_model} is none of --models: {', '.join(names)}.")
    started = time.monotonic()
    held_out, files, left_out = read_held_out(args)
    questions, asks = held_out.questions, bool(held_out.questions or held_out.pairs or held_out.tasks)

    print("loading torch and transformers ...", flush=True)
    from medicalgpt.models.loading import load_tokenizer

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    last = names[-1]
    if asks and not tokenizers[last].chat_template:
        raise UserError(
            f"the last model, {models[last]}, has no chat template, so it cannot be asked questions. Give a model that "
            "supervised_finetuning.py trained as the last one, or measure nothing but --text_file_dir."
        )
    # A later stage may end its turns with another token; documents end with the one of pretraining for all models.
    held_out = replace(held_out, end_of_document=next(iter(tokenizers.values())).eos_token)

    previous = _read_previous(args.output_file)
    evaluation: dict[str, Any] = {
        "format": FORMAT,
        "command": ["python", *sys.argv],
        "text": {"files": list(map(str, files["text"])), "documents": len(held_out.documents)}
        if held_out.documents
        else None,
        "chat": {
            "file": args.chat_file,
            "rows": len(questions) + sum(left_out.values()),
            "used": len(questions),
            "left_out": left_out,
            "max_new_tokens": args.max_new_tokens,
        }
        if questions
        else None,
        "preference": {
            "file": args.preference_file,
            "pairs": len(held_out.pairs),
            "prompts": len(held_out.prompts),
            "max_new_tokens": args.max_new_tokens,
        }
        if held_out.pairs
        else None,
        "examples": [_shown_question(questions[index]) for index in held_out.question_examples],
        "prompt_examples": [_shown_question(held_out.prompts[index]) for index in held_out.prompt_examples],
        "task": {
            "file": args.task_file,
            "tasks": len(held_out.tasks),
            "max_new_tokens": args.task_max_new_tokens,
        }
        if held_out.tasks
        else None,
        "task_examples": [_shown_question(held_out.tasks[index]) for index in held_out.task_examples],
        "models": [],
        "reward": None,
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }

    def fingerprint(path: str, **settings: Any) -> dict[str, Any] | None:
        checkpoint = fingerprint_checkpoint(path)
        return checkpoint and {
            "code": _code_hash(bool(held_out.tasks)),
            "versions": evaluation["versions"],
            "checkpoint": checkpoint,
            "files": {kind: fingerprint_files(paths) for kind, paths in files.items()},
            "settings": {"ignore_fields": args.ignore_fields, **settings},
        }

    def reused(mark: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
        kept = next((result for result in previous if mark and result.get("fingerprint") == mark), None)
        if kept:
            print(
                f"  {name}: weights, data and settings are unchanged; results of {args.output_file} reused", flush=True
            )
        return kept

    def write() -> None:
        # Earlier results of models still to come are kept apart, so that an evaluation that is stopped loses none.
        waiting = names[len(evaluation["models"]) :] + ([] if evaluation["reward"] else [REWARD])
        earlier = [result for result in previous if result["name"] in waiting]
        _write_json(args.output_file, {**evaluation, "earlier": earlier})

    for name, path in models.items():
        answers_all = names.index(name) >= names.index(args.first_chat_model or last)
        limits = (args.max_chat_samples, None if answers_all else args.max_chat_samples_before)
        limit = min(filter(None, limits), default=None)
        mark = fingerprint(
            path,
            template_from=fingerprint_checkpoint(models[last]) if asks and not tokenizers[name].chat_template else None,
            block_size=args.block_size,
            document_unit=args.document_unit,
            end_of_document=held_out.end_of_document,
            max_new_tokens=args.max_new_tokens,
            seed=args.seed,
            limit=limit,
            examples=args.examples,
            prompts=len(held_out.prompts),
            task_max_new_tokens=args.task_max_new_tokens,
        )
        print(f"{name} ({path})", flush=True)
        result = reused(mark, name) or evaluate_model(name, path, held_out, limit, models[last], args)
        evaluation["models"].append({**result, "name": name, "fingerprint": mark})
        write()
    if args.reward_model:
        answers = {result["name"]: result["prompt_answers"] for result in evaluation["models"]}
        digest = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
        mark = fingerprint(args.reward_model, reward=True, answers=digest)
        print(f"reward model ({args.reward_model})", flush=True)
        result = reused(mark, "reward model") or evaluate_reward_model(
            args.reward_model, held_out.pairs, held_out.prompts, answers, args
        )
        evaluation["reward"] = {**result, "name": REWARD, "fingerprint": mark}
        write()
    print(f"results: {args.output_file} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    run_main(main)
