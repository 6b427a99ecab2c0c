"""Measure what each training stage changed, on held-out text, questions, preference pairs and tasks.

    python eval_pipeline.py --models base=outputs/tiny-base pt=outputs/pt sft=outputs/sft-merged \\
        dpo=outputs/dpo-merged --first_chat_model sft --text_file_dir data/pretrain \\
        --chat_file data/finetune/validation.jsonl --preference_file data/reward/validation.jsonl \\
        --output_file outputs/eval.json

List the models in the order of training.

- Perplexity (--text_file_dir): exp(total negative log-likelihood / total tokens); each document is scored alone.
- Exact match (--chat_file): a greedy answer equal to the reference, ignoring white space at both ends.
- Everyday questions (--everyday_file): the same in people's own words. Rows with `meta.required`, as below, are about
  what was not taught: a good answer declines. Another question that is declined is declined needlessly.
- Preference accuracy (--preference_file): the share of pairs whose chosen answer has the higher mean log-probability
  per token. With sums over the tokens the shorter answer of a pair would win, whatever it says.
- Good answers (--preference_file): greedy answers to the prompts whose rows have
  `"meta": {"required": [["cardiology"], ["ambulance", "emergency"]]}`: a good one contains at least one string of each
  group, ignoring case, and is fluent: it ends, and has no loops, broken characters or words of another language.
- Reward model accuracy (--reward_model): the share of the same pairs whose chosen answer the reward model scores
  higher, and the mean difference of the two scores (margin).
- Reward model score (--reward_model): the mean score of each model's greedy answers to the same prompts. An answer
  that was cut off by --max_new_tokens is scored as if it ended there.
- Correct answers and correct format (--task_file): the shares of greedy replies that get 1 from the rewards `accuracy`
  and `format` of `grpo_training.py`, with its system prompt.

The counts, the answers to a few fixed questions and the names of the files go into --output_file; `build_report.py`
turns it into a table and a page. Results of a model are reused as long as its weights, the data and the settings are
the same. Models that have not been taught to answer often do not stop by themselves, which makes them slow: those
before --first_chat_model are asked fewer questions (--max_chat_samples_before), all of them the same ones.
"""

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt import logs
from medicalgpt.args import DataArguments, same_field
from medicalgpt.code_version import code_version
from medicalgpt.errors import UserError, run_main
from medicalgpt.evaluation.held_out import (
    HeldOut,
    PreferencePair,
    Question,
    QuestionSet,
    Reading,
    read_held_out,
)
from medicalgpt.evaluation.measures import (
    GeneratedAnswer,
    Judge,
    count_answers,
    count_preferences,
    declines_like,
    example_answers,
    is_exact,
    is_good,
    perplexity,
    score_documents,
    score_pairs,
    share_of,
)
from medicalgpt.evaluation.results import REWARD, ResultsFile, fingerprint_checkpoint, fingerprint_files

if TYPE_CHECKING:
    from medicalgpt.data.encoding import Pair
    from medicalgpt.models.hub import Checkpoint
    from medicalgpt.rewards.scoring import RewardScorer
    from medicalgpt.serving.chat import ChatEngine
    from medicalgpt.serving.generation import Answer

    from transformers import PreTrainedTokenizerBase

# What is measured of each model; None if it was not.
RESULTS = (
    "text",
    "chat",
    "answers",
    "everyday",
    "declined",
    "needless",
    "everyday_answers",
    "preference",
    "good",
    "good_answers",
    "prompt_answers",
)
RESULTS += ("task", "task_format", "task_answers")

say = partial(print, flush=True)
progress = partial(logs.progress, seconds=15, write=lambda text: say(f"  {text}"))


@dataclass(frozen=True)
class MeasuredModel:
    """One of --models.

    Attributes:
        limit: maximum number of questions of a kind that it is asked; None for all.
        lender: lends its chat template and stop tokens; None for a model that has a template or needs none.
        end_of_document: the token that ends a document, the same text for all models.
    """

    name: str
    checkpoint: "Checkpoint"
    limit: int | None
    lender: "Checkpoint | None"
    end_of_document: str


def task_rewards() -> tuple[str, dict[str, Judge]]:
    """Return the system prompt with which GRPO asks for replies, and what judges them, by the name of what is counted.

    A reply is correct if it gets the full reward, 1; half of one does not count.
    """
    from medicalgpt.rewards.rewards import REWARDS, SYSTEM_PROMPT

    def judged_by(reward: Callable[..., list[float | None]]) -> Judge:
        def is_correct(reply: GeneratedAnswer, task: Question) -> bool | None:
            columns = {name: [value] for name, value in task.columns.items()}
            (score,) = reward([[{"role": "assistant", "content": reply.text}]], prompts=[task.messages], **columns)
            return None if score is None else score >= 1

        return is_correct

    judges = {"correct answers": judged_by(REWARDS["accuracy"]), "correct format": judged_by(REWARDS["format"])}
    return SYSTEM_PROMPT, judges


def answer_questions(
    engine: "ChatEngine",
    questions: Sequence[Question],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], Any] = lambda count: None,
) -> "list[Answer | None]":
    """Return the greedy answer to each question; None if the prompt leaves no room in the model's context.

    Rows with references of similar length share a batch, because a batch takes as long as its longest answer.

    Args:
        advance: called with the number of questions that are done.
    """
    from medicalgpt.serving.chat import PromptTooLongError
    from medicalgpt.serving.generation import Sampling

    prompts: dict[int, list[int]] = {}
    for index, question in enumerate(questions):
        try:
            prompts[index] = engine.prompt_ids(question.messages, question.tools)
        except PromptTooLongError:
            advance(1)
        except UserError as error:
            raise UserError(f"{question.place}: {error}") from error
    fitting = sorted(prompts, key=lambda index: len(questions[index].reference))
    answers: list[Answer | None] = [None] * len(questions)
    for start in range(0, len(fitting), batch_size):
        chosen = fitting[start : start + batch_size]
        replies = engine.batch(
            [prompts[index] for index in chosen],
            sampling=Sampling(max_new_tokens=max_new_tokens),
            batch_size=batch_size,
            tools=[questions[index].tools for index in chosen],
        )
        for index, reply in zip(chosen, replies, strict=True):
            answers[index] = reply
        advance(len(chosen))
    return answers


def evaluate_model(model: MeasuredModel, held_out: HeldOut, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one model. The functions below describe the entries of the result."""
    from medicalgpt.serving.chat import ChatEngine

    started = time.monotonic()
    engine = ChatEngine.from_checkpoint(model.checkpoint)
    result: dict[str, Any] = {
        "name": model.name,
        "path": model.checkpoint.name,
        "parameters": engine.model.num_parameters(),
        **dict.fromkeys(RESULTS),
        "notes": [],
    }
    if held_out.documents is not None:
        measure_text(result, engine, held_out.documents, model.end_of_document, args)
    if model.lender:
        engine = engine.with_template_of(model.lender)
        result["notes"].append(
            f"it has no chat template; the template and the stop tokens of {model.lender.name} were used"
        )
    if held_out.chat is not None:
        counts, answers = measure_answers(result, engine, held_out.chat, {"exact match": is_exact}, model.limit, args)
        result["chat"] = counts["exact match"]
        result["answers"] = example_answers(held_out.chat, answers, is_exact)
    if held_out.everyday or held_out.untaught:
        measure_everyday(result, engine, held_out, model.limit, args)
    if held_out.pairs is not None:
        measure_preferences(result, engine, held_out.pairs, args)
    if held_out.prompts is not None:
        measure_prompts(result, engine, held_out.prompts, model.limit, args)
    if held_out.tasks is not None:
        measure_tasks(result, engine, held_out.tasks, model.limit, args)
    for note in result["notes"]:
        say(f"  {model.name}: {note}")
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def measure_text(
    result: dict[str, Any],
    engine: "ChatEngine",
    documents: Sequence[str],
    end_of_document: str,
    args: argparse.Namespace,
) -> None:
    """Put perplexity, and its parts for each document, into `result["text"]`."""
    from medicalgpt.data.encoding import encode_document

    name, tokenizer = result["name"], engine.tokenizer
    end = tokenizer.get_vocab().get(end_of_document, tokenizer.eos_token_id)
    block_size = min(args.block_size, engine.context_length or args.block_size)
    encoded = [
        [
            token
            for piece in encode_document(tokenizer, {"text": text}, block_size=sys.maxsize, end=False)
            for token in piece.input_ids
        ]
        + [end]
        for text in documents
    ]
    pieces = sum(len(range(0, len(ids) - 1, block_size - 1)) for ids in encoded)
    with progress(f"{name}: perplexity, pieces of text", pieces) as step:
        scores = score_documents(engine.model, encoded, block_size, args.batch_size, step.add)
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
    say(
        f"  {name}: perplexity {result['text']['perplexity']:.4g} on {result['text']['tokens']:,} tokens of "
        f"{len(scores):,} documents ({step.seconds:.1f} s)"
    )


def measure_answers(
    result: dict[str, Any],
    engine: "ChatEngine",
    asked: QuestionSet,
    judges: dict[str, Judge],
    limit: int | None,
    args: argparse.Namespace,
    max_new_tokens: int | None = None,
) -> "tuple[dict[str, dict[str, Any]], dict[int, Answer | None]]":
    """Ask questions, each once; notes go into `result["notes"]`.

    Args:
        judges: by the name of what is counted.
        limit: maximum number of questions that count. The examples are asked in any case.
        max_new_tokens: by default --max_new_tokens.

    Returns:
        The counts of each of `judges`; and the answers by the index of their question, None where it is too long.
    """
    name, questions, sampled, what = result["name"], asked.questions, sorted(asked.order[:limit]), " and ".join(judges)
    indices = list(dict.fromkeys([*sampled, *asked.examples]))
    with progress(f"{name}: {what}, answers", len(indices)) as step:
        replies = answer_questions(
            engine,
            [questions[index] for index in indices],
            max_new_tokens or args.max_new_tokens,
            args.batch_size,
            step.add,
        )
    answers = dict(zip(indices, replies, strict=True))
    counted = {index: answer for index in sampled if (answer := answers[index]) is not None}
    too_long = len(sampled) - len(counted)
    if too_long:
        result["notes"].append(f"{what}: {too_long} questions are longer than its context and were not counted")
    if len(sampled) < len(questions):
        result["notes"].append(f"{what}: asked {len(sampled):,} of {len(questions):,} questions (seed {args.seed})")
    scores = {
        label: vars(count_answers([questions[index] for index in counted], list(counted.values()), judge))
        for label, judge in judges.items()
    }
    shares = ", ".join(f"{label} {share_of(score)}" for label, score in scores.items())
    stopped = sum(answer.finish_reason == "stop" for answer in counted.values())
    say(f"  {name}: {shares}, stopped by itself {stopped}/{len(counted)} ({step.seconds:.1f} s)")
    counts = {label: {**score, "asked": len(sampled), "prompt_too_long": too_long} for label, score in scores.items()}
    return counts, answers


def measure_everyday(
    result: dict[str, Any], engine: "ChatEngine", held_out: HeldOut, limit: int | None, args: argparse.Namespace
) -> None:
    """Put the counts of right, declined and needlessly declined answers, and the examples, into `result`."""
    taught, untaught = held_out.everyday, held_out.untaught
    shown = []
    if taught:
        judges: dict[str, Judge] = {"everyday questions": is_exact}
        if untaught:
            judges["needless declines"] = declines_like(untaught.questions)
        counts, answers = measure_answers(result, engine, taught, judges, limit, args)
        result["everyday"], result["needless"] = counts["everyday questions"], counts.get("needless declines")
        shown += example_answers(taught, answers, is_exact)
    if untaught:
        counts, answers = measure_answers(result, engine, untaught, {"declined": is_good}, limit, args)
        result["declined"] = counts["declined"]
        shown += example_answers(untaught, answers, is_good)
    result["everyday_answers"] = shown


def measure_prompts(
    result: dict[str, Any], engine: "ChatEngine", prompts: QuestionSet, limit: int | None, args: argparse.Namespace
) -> None:
    """Put the counts of good answers, those to the examples, and the text of all that count, into `result`."""
    counts, answers = measure_answers(result, engine, prompts, {"good answers": is_good}, limit, args)
    result["good"] = counts["good answers"] if any(prompt.required for prompt in prompts.questions) else None
    result["good_answers"] = example_answers(prompts, answers, is_good)
    texts: list[str | None] = [None] * len(prompts.questions)
    for index in prompts.order[:limit]:
        answer = answers[index]
        texts[index] = None if answer is None else answer.text
    result["prompt_answers"] = texts


def measure_tasks(
    result: dict[str, Any], engine: "ChatEngine", tasks: QuestionSet, limit: int | None, args: argparse.Namespace
) -> None:
    """Put the counts of correct answers and of correct format, and the replies to the examples, into `result`."""
    system_prompt, judges = task_rewards()
    tasks = replace(tasks, questions=[_with_system_prompt(task, system_prompt) for task in tasks.questions])
    counts, answers = measure_answers(result, engine, tasks, judges, limit, args, args.task_max_new_tokens)
    result["task"], result["task_format"] = counts["correct answers"], counts["correct format"]
    result["task_answers"] = example_answers(tasks, answers, judges["correct answers"])


def measure_preferences(
    result: dict[str, Any], engine: "ChatEngine", pairs: Sequence[PreferencePair], args: argparse.Namespace
) -> None:
    """Put the counts of `count_preferences`, and the number of pairs that are `too_long`, into the result."""
    from medicalgpt.models.templating import TemplateError

    name = result["name"]
    try:
        encoded = encode_pairs(engine.tokenizer, pairs, engine.context_length)
    except TemplateError as error:
        result["notes"].append(f"its pairs were not scored: {str(error).splitlines()[0]}")
        return
    with progress(f"{name}: preferences, answers", 2 * len(encoded)) as step:
        scores = score_pairs(engine.model, list(encoded.values()), args.batch_size, step.add)
    counts = count_preferences([pairs[index] for index in encoded], scores)
    too_long = len(pairs) - len(encoded)
    result["preference"] = {**counts, "too_long": too_long}
    if too_long:
        result["notes"].append(f"{too_long} pairs are longer than its context and were not counted")
    say(f"  {name}: preference accuracy {share_of(counts)} ({step.seconds:.1f} s)")


def encode_pairs(
    tokenizer: "PreTrainedTokenizerBase", pairs: Sequence[PreferencePair], max_length: int | None
) -> "dict[int, Pair]":
    """Return the pairs that fit into `max_length` tokens by their index, encoded as for training.

    Raises:
        UserError: a pair that no stage could train on.
        TemplateError: the tokenizer's template has no generation markers, and no shipped one writes the same.
    """
    from medicalgpt.data.encoding import EncodingError, encode_preference
    from template import apply_template

    # A template with markers writes the same text; the engine keeps the tokenizer as it was.
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
    checkpoint: "Checkpoint", held_out: HeldOut, answers: dict[str, list[str | None]], args: argparse.Namespace
) -> dict[str, Any]:
    """Return what `count_preferences` returns for the scores of a reward model, its path, and its scores of answers.

    Args:
        answers: by the name of a model its answers to the prompts; None where it was not asked.

    Returns:
        In `models`, by name: `scores`, one for each of the prompts or None; `mean`, None without scores; `total` of
        them; and `not_scored`, answers that cannot be encoded, counted by reason.

    Raises:
        UserError: it is not a reward model, no pair fits into its context, or a score is not a number.
    """
    from medicalgpt.data.encoding import EncodingError
    from medicalgpt.rewards.scoring import RewardScorer

    started, path, pairs = time.monotonic(), checkpoint.name, held_out.pairs
    scorer = RewardScorer.from_checkpoint(checkpoint)
    fitting, sequences = [], []
    for pair in pairs:
        try:
            messages, tools = pair.row["messages"], pair.row["tools"]
            both = [scorer.encode([*messages, pair.row[side]], tools) for side in ("chosen", "rejected")]
        except EncodingError as error:
            if not error.too_long:
                raise UserError(f"{pair.place}: {error.reason}. {error.remedy}.") from error
            continue
        fitting.append(pair)
        sequences += both
    if not fitting:
        raise UserError(f"--reward_model {path}: no pair fits into its context.")
    with progress("reward model: answers of pairs", len(sequences)) as step:
        scores = scorer.score_ids(sequences, args.batch_size, step.add)
    counts = count_preferences(fitting, list(zip(scores[::2], scores[1::2], strict=True)))
    say(f"  reward model: accuracy {share_of(counts)}, margin {counts['margin']:.3g} ({step.seconds:.1f} s)")
    prompts = held_out.prompts.questions
    judged = {name: score_answers(scorer, name, prompts, texts, args.batch_size) for name, texts in answers.items()}
    seconds = round(time.monotonic() - started, 1)
    too_long = len(pairs) - len(fitting)
    return {"path": path, **counts, "too_long": too_long, "models": judged, "seconds": seconds}


def score_answers(
    scorer: "RewardScorer", name: str, prompts: Sequence[Question], texts: Sequence[str | None], batch_size: int
) -> dict[str, Any]:
    """Return a reward model's scores of one model's answers; see `evaluate_reward_model`."""
    from medicalgpt.data.encoding import EncodingError

    encoded, not_scored = {}, {}
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if text is None:
            continue
        try:
            encoded[index] = scorer.encode([*prompt.messages, {"role": "assistant", "content": text}], prompt.tools)
        except EncodingError as error:
            # A model may write anything: that is not an error in the data.
            reason = "too long for the reward model" if error.too_long else error.reason
            not_scored[reason] = not_scored.get(reason, 0) + 1
    with progress(f"reward model: answers of {name}", len(encoded)) as step:
        numbers = scorer.score_ids(list(encoded.values()), batch_size, step.add)
    scores = dict(zip(encoded, numbers, strict=True))
    mean = math.fsum(numbers) / len(numbers) if numbers else None
    others = "".join(f", {count} not scored: {reason}" for reason, count in not_scored.items())
    shown = f"mean score {mean:.3f} of {len(numbers)} answers" if numbers else "no answers scored"
    say(f"  reward model: {name}: {shown}{others} ({step.seconds:.1f} s)")
    return {
        "mean": mean,
        "total": len(numbers),
        "not_scored": not_scored,
        "scores": [scores.get(index) for index in range(len(prompts))],
    }


def _with_system_prompt(task: Question, system_prompt: str) -> Question:
    if task.messages[0]["role"] == "system":
        return task
    return replace(task, messages=[{"role": "system", "content": system_prompt}, *task.messages])


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
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=DIR", help="In the order of training.")
    parser.add_argument(
        "--text_file_dir", help="Held-out text: a file, or a folder in which files or folders are named validation*."
    )
    parser.add_argument("--chat_file", help="Held-out conversations; the last answer of each is the reference.")
    parser.add_argument(
        "--everyday_file", help="Held-out questions in everyday words; those with `meta.required` are to be declined."
    )
    parser.add_argument("--preference_file", help="Held-out preference pairs.")
    parser.add_argument(
        "--reward_model",
        metavar="DIR",
        help="A reward model: it is measured on --preference_file, and scores the answers of --models to its prompts.",
    )
    parser.add_argument("--task_file", help="Held-out tasks with correct answers, in the format of grpo_training.py.")
    parser.add_argument("--output_file", required=True, type=Path, help="Where to write the results, as JSON.")
    parser.add_argument(
        "--first_chat_model", metavar="NAME", help="The first of --models that was taught to answer; unset: the last."
    )
    parser.add_argument(
        "--max_chat_samples", type=_positive, help="Maximum number of questions of a file that each model is asked."
    )
    parser.add_argument(
        "--max_chat_samples_before",
        type=_positive,
        default=200,
        help="The same for each model before --first_chat_model.",
    )
    parser.add_argument("--batch_size", type=_positive, default=64, help="It changes the speed, not the results.")
    parser.add_argument("--max_new_tokens", type=_positive, default=96, help="Maximum number of tokens of an answer.")
    parser.add_argument(
        "--task_max_new_tokens",
        type=_positive,
        help="Maximum number of tokens of a reply to --task_file; unset: 256.",
    )
    parser.add_argument(
        "--block_size", type=_positive, default=512, help="Maximum number of tokens of text scored at once."
    )
    parser.add_argument(
        "--document_unit",
        choices=["auto", "line", "paragraph", "file"],
        default="auto",
        help="What one document is in .txt and .md files; auto: a line of .txt, an entire .md.",
    )
    for name in ("columns", "preset"):
        parser.add_argument(f"--{name}", help=f"{same_field(DataArguments, name).metadata['help']} For all files here.")
    parser.add_argument("--encoding", help="Encoding of files that are not UTF-8; unset: recognised.")
    parser.add_argument("--ignore_fields", default="", help="Fields of a row that are not used, separated by commas.")
    parser.add_argument("--examples", type=_positive, default=12, help="Number of questions shown with their answers.")
    parser.add_argument("--seed", type=int, default=42, help="Chooses which questions are asked.")
    args = parser.parse_args()
    if not any((args.text_file_dir, args.chat_file, args.everyday_file, args.preference_file, args.task_file)):
        kinds = "--text_file_dir, --chat_file, --everyday_file, --preference_file or --task_file"
        parser.error(f"nothing to measure: give {kinds}")
    if args.block_size < 2:
        parser.error("argument --block_size: a block needs at least 2 tokens: one is predicted from the other")
    if args.reward_model and not args.preference_file:
        parser.error("--reward_model is measured on pairs: give --preference_file")
    if args.task_max_new_tokens and not args.task_file:
        parser.error("--task_max_new_tokens has no effect without --task_file")
    args.task_max_new_tokens = args.task_max_new_tokens or 256
    return args


def resolve_models(paths: dict[str, str], held_out: HeldOut, args: argparse.Namespace) -> list[MeasuredModel]:
    """Find the checkpoints, load their tokenizers, and decide what each model is asked.

    Raises:
        UserError: a model is missing, or the last one has no chat template and something is to be asked.
    """
    from medicalgpt.models.hub import Checkpoint
    from medicalgpt.models.loading import checkpoint_tokenizer

    checkpoints = {name: Checkpoint.resolve(path) for name, path in paths.items()}
    tokenizers = {name: checkpoint_tokenizer(checkpoint) for name, checkpoint in checkpoints.items()}
    names = list(paths)
    last = names[-1]
    if held_out.needs_template and not tokenizers[last].chat_template:
        raise UserError(
            f"the last model, {paths[last]}, has no chat template, so it cannot be asked questions. Give a model that "
            "supervised_finetuning.py trained as the last one, or measure only --text_file_dir."
        )
    models = []
    for number, name in enumerate(names):
        taught = number >= names.index(args.first_chat_model or last)
        limits = (args.max_chat_samples, None if taught else args.max_chat_samples_before)
        borrows = held_out.needs_template and not tokenizers[name].chat_template
        models.append(
            MeasuredModel(
                name,
                checkpoints[name],
                limit=min(filter(None, limits), default=None),
                lender=checkpoints[last] if borrows else None,
                # A later stage may end its turns with another token; documents end with the one of pretraining.
                end_of_document=tokenizers[names[0]].eos_token,
            )
        )
    return models


def settings_of(model: MeasuredModel, held_out: HeldOut, args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings on which the results of a model depend, for its fingerprint."""
    return {
        "ignore_fields": args.ignore_fields,
        "columns": args.columns,
        "preset": args.preset,
        "encoding": args.encoding,
        "template_from": fingerprint_checkpoint(model.lender) if model.lender else None,
        "block_size": args.block_size,
        "document_unit": args.document_unit,
        "end_of_document": model.end_of_document,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "limit": model.limit,
        "examples": args.examples,
        "prompts": len(held_out.prompts.questions) if held_out.prompts else 0,
        "task_max_new_tokens": args.task_max_new_tokens,
    }


def main() -> None:
    args = parse_arguments()
    paths = _parse_models(args.models)
    if args.first_chat_model is not None and args.first_chat_model not in paths:
        raise UserError(f"--first_chat_model {args.first_chat_model} is not one of --models: {', '.join(paths)}.")
    started = time.monotonic()
    held_out = read_held_out(
        text_file_dir=args.text_file_dir,
        chat_file=args.chat_file,
        everyday_file=args.everyday_file,
        preference_file=args.preference_file,
        task_file=args.task_file,
        document_unit=args.document_unit,
        reading=Reading(args.ignore_fields, args.columns, args.preset, args.encoding),
        # Without a reward model only the answers to prompts with requirements can be judged.
        all_prompts=args.reward_model is not None,
        examples=args.examples,
        seed=args.seed,
    )
    for line in held_out.summary():
        say(line)

    say("loading torch and transformers ...")
    from medicalgpt.models.hub import Checkpoint

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    models = resolve_models(paths, held_out, args)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    description = {
        "command": ["python", *sys.argv],
        **held_out.describe(args.max_new_tokens, args.task_max_new_tokens),
        "versions": versions,
    }
    inputs = {
        # Results of other code are not reused.
        "code": code_version("eval_pipeline"),
        "versions": versions,
        "files": {kind: fingerprint_files(files) for kind, files in held_out.files.items()},
    }
    results = ResultsFile(args.output_file, list(paths), inputs)

    def reused(fingerprint: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
        kept = results.find(fingerprint)
        if kept:
            say(f"  {name}: weights, data and settings are unchanged; results of {args.output_file} reused")
        return kept

    for model in models:
        fingerprint = results.fingerprint(model.checkpoint, settings_of(model, held_out, args))
        say(f"{model.name} ({model.checkpoint.name})")
        result = reused(fingerprint, model.name) or evaluate_model(model, held_out, args)
        results.models.append({**result, "name": model.name, "fingerprint": fingerprint})
        results.write(description)
    if args.reward_model:
        checkpoint = Checkpoint.resolve(args.reward_model)
        answers = {result["name"]: result["prompt_answers"] for result in results.models}
        digest = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
        reading = {name: getattr(args, name) for name in ("ignore_fields", "columns", "preset", "encoding")}
        settings = {**reading, "reward": True, "answers": digest}
        fingerprint = results.fingerprint(checkpoint, settings)
        say(f"reward model ({args.reward_model})")
        result = reused(fingerprint, "reward model") or evaluate_reward_model(checkpoint, held_out, answers, args)
        results.reward = {**result, "name": REWARD, "fingerprint": fingerprint}
        results.write(description)
    say(f"results: {args.output_file} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    run_main(main)
