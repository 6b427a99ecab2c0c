"""Measure what each stage changed: perplexity on held-out text, and exact answers to held-out questions.

    python eval_pipeline.py --models base=outputs/base pt=outputs/pt-merged sft=outputs/sft-merged \\
        --text_file_dir data/pretrain --chat_file data/finetune/validation.jsonl --output_file outputs/eval.json

Models are given in the order of training. Perplexity is exp(total negative log-likelihood / total tokens) with every
document scored alone. An exact match is a greedy answer equal to the reference, apart from white space at both ends.
The counts, the answers to a few fixed questions and the files that were measured go into --output_file, which
`build_report.py` turns into a table and a page. Results of a model whose weights, data and settings have not changed
are reused. Models before the last often never stop by themselves, which makes them slow: they answer fewer questions
(--max_chat_samples_before), the same ones each.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medicalgpt import data as data_files
from medicalgpt.errors import UserError, run_main

FORMAT = 1
# Logits of one forward pass, rows x tokens x vocabulary, in numbers: about 256 MB in float32.
MAX_LOGITS = 2**26
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


@dataclass(frozen=True)
class Question:
    """One chat row: the turns up to the last answer, and that answer."""

    place: str
    category: str
    messages: list[dict[str, Any]]
    tools: list | None
    reference: str


@dataclass
class ChatScore:
    """Counts over answers; `by_category` holds the same counts for each category."""

    correct: int = 0
    stopped: int = 0
    total: int = 0
    by_category: dict[str, dict[str, int]] = field(default_factory=dict)


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


def read_documents(place: str, document_unit: str) -> tuple[list[str], list[Path]]:
    """Return the held-out documents at `place` and their files.

    In a folder, held-out files are those whose name begins with validation, valid, val, dev, eval or test.

    Raises:
        UserError: no such file, no held-out file, or rows that are no documents (all of them, by file:line).
    """
    files = data_files.find_files(place)
    if not Path(place).is_file():
        files = [file for file in files if data_files.HELD_OUT_NAME.match(file.name)]
        if not files:
            raise UserError(
                f"--text_file_dir {place} holds no held-out file. Name one validation.jsonl or validation.txt, or give "
                "a file instead of the folder."
            )
    documents, problems = [], []
    for file in files:
        for row in data_files.read_rows(file, document_unit):
            if isinstance(row, data_files.Problem):
                problems.append(row)
                continue
            try:
                documents.append(data_files.to_text(row.value)["text"])
            except data_files.RowError as error:
                problems.append(data_files.Problem(row.place, error.reason, error.remedy, error.value))
    _refuse(problems)
    if not documents:
        raise UserError(f"--text_file_dir {place}: the held-out files are empty ({', '.join(map(str, files))}).")
    return documents, files


def read_questions(file: str, ignore_fields: str = "") -> tuple[list[Question], dict[str, int]]:
    """Return the questions of a chat file, and the rows that cannot be scored, counted by reason.

    Raises:
        UserError: rows that are no conversations with a final answer (all of them, by file:line).
    """
    ignore = frozenset(filter(None, ignore_fields.replace(" ", "").split(",")))
    questions, problems, left_out = [], [], {}
    for path in data_files.find_files(file):
        for row in data_files.read_rows(path):
            if isinstance(row, data_files.Problem):
                problems.append(row)
                continue
            try:
                prompt = data_files.to_prompt(row.value, ignore)
                if prompt["reference"] is None:
                    raise data_files.RowError("no answer to compare with", "End the row with the assistant's turn.")
            except data_files.RowError as error:
                problems.append(data_files.Problem(row.place, error.reason, error.remedy, error.value))
                continue
            if not prompt["reference"].strip():
                left_out["the answer is a tool call"] = left_out.get("the answer is a tool call", 0) + 1
                continue
            category = row.value.get("category")
            questions.append(
                Question(
                    row.place,
                    "no category" if category is None else str(category),
                    prompt["messages"],
                    prompt["tools"],
                    prompt["reference"],
                )
            )
    _refuse(problems)
    if not questions:
        raise UserError(f"--chat_file {file} holds no question that can be scored.")
    return questions, left_out


def pick_examples(questions: Sequence[Question], count: int) -> list[int]:
    """Choose rows to show, spread evenly over and inside the categories; identity rows are among them."""
    by_category: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        by_category.setdefault(question.category, []).append(index)
    names = sorted(by_category, key=lambda name: "identity" not in name.lower())
    quota = dict.fromkeys(names, 0)
    turns = [name for name in names if "identity" in name.lower()] + names * count
    for name in turns:
        if sum(quota.values()) < count and quota[name] < len(by_category[name]):
            quota[name] += 1
    chosen = []
    for name, number in quota.items():
        rows = by_category[name]
        chosen += [rows[(2 * place + 1) * len(rows) // (2 * number)] for place in range(number)]
    return chosen


def score_documents(
    model: Any,
    documents: Sequence[Sequence[int]],
    block_size: int,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[tuple[float, int]]:
    """Score each document alone.

    A document longer than `block_size` is split into pieces that overlap by one token, which is only context, so that
    every token but a document's first is scored exactly once.

    Args:
        model: a causal language model in evaluation mode.
        documents: token ids of each document, its end token included.
        block_size: most tokens of one piece, at least 2.
        batch_size: most pieces of one forward pass. It does not change the result.

    Returns:
        (negative log-likelihood in nats, tokens scored) of each document.

    Raises:
        UserError: the model's scores are not finite.
    """
    import torch

    pieces = [
        (number, ids[start : start + block_size])
        for number, ids in enumerate(documents)
        for start in range(0, len(ids) - 1, block_size - 1)
    ]
    pieces.sort(key=lambda piece: len(piece[1]), reverse=True)
    nll = [0.0] * len(documents)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    start = 0
    while start < len(pieces):
        width = len(pieces[start][1])
        rows = max(1, min(batch_size, MAX_LOGITS // (width * vocabulary)))
        batch = pieces[start : start + rows]
        start += rows
        input_ids = torch.zeros((len(batch), width), dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for row, (_, ids) in enumerate(batch):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        input_ids, attention_mask = input_ids.to(model.device), attention_mask.to(model.device)
        with torch.inference_mode():
            logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none"
            ).view(len(batch), -1)
            losses = losses.masked_fill(attention_mask[:, 1:] == 0, 0.0).double().sum(1).tolist()
        for (number, _), loss in zip(batch, losses, strict=True):
            nll[number] += loss
        if progress:
            progress.add(len(batch))
    if not all(map(math.isfinite, nll)):
        raise UserError("the model's scores are not finite (NaN or infinite): its weights are broken. Train it again.")
    return [(loss, len(ids) - 1) for loss, ids in zip(nll, documents, strict=True)]


def perplexity(scores: Sequence[tuple[float, int]]) -> float:
    """Return exp(total nll / total tokens) of (nll, tokens) pairs: a token counts the same in every document."""
    return math.exp(sum(nll for nll, _ in scores) / sum(tokens for _, tokens in scores))


def is_match(answer: str, reference: str) -> bool:
    """Whether the two are the same string, white space at both ends apart."""
    return answer.strip() == reference.strip()


def count_answers(questions: Sequence[Question], answers: Sequence[Any]) -> ChatScore:
    """Count exact matches and answers that the model ended itself.

    Args:
        answers: one for each question, each with `text` and `finish_reason`.
    """
    score = ChatScore()
    for question, answer in zip(questions, answers, strict=True):
        category = score.by_category.setdefault(question.category, {"correct": 0, "stopped": 0, "total": 0})
        correct, stopped = is_match(answer.text, question.reference), answer.finish_reason == "stop"
        category["correct"] += correct
        category["stopped"] += stopped
        category["total"] += 1
        score.correct += correct
        score.stopped += stopped
        score.total += 1
    return score


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
    from medicalgpt.chat import PromptTooLongError, Sampling

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
    from medicalgpt.models import resolve_checkpoint

    base, adapter = resolve_checkpoint(folder)
    folders = [Path(place) for place in (base, adapter) if place]
    if not all(place.is_dir() for place in folders):
        return None
    return fingerprint_files([file for place in folders for kind in CHECKPOINT_FILES for file in place.glob(kind)])


def evaluate_model(
    name: str,
    path: str,
    documents: Sequence[str] | None,
    questions: Sequence[Question] | None,
    sampled: Sequence[int],
    examples: Sequence[int],
    end_of_document: str,
    last_model: str,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Measure one model; see `main` for the format of the result.

    Args:
        sampled: indices of the questions that count.
        examples: indices of the questions whose answers are kept.
        end_of_document: token that ends a document, as in pretraining.
        last_model: lends its chat template and stop tokens to a model without a template.
    """
    from medicalgpt.chat import ChatEngine
    from medicalgpt.encoding import encode_document

    started = time.monotonic()
    engine = ChatEngine.from_pretrained(path)
    result: dict[str, Any] = {
        "name": name,
        "path": path,
        "parameters": engine.model.num_parameters(),
        "text": None,
        "chat": None,
        "answers": None,
        "notes": [],
    }
    if documents is not None:
        tokenizer = engine.tokenizer
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
        with Progress(f"{name}: perplexity, pieces of text", pieces) as progress:
            scores = score_documents(engine.model, encoded, block_size, args.batch_size, progress)
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
    if questions is not None:
        if not engine.tokenizer.chat_template:
            engine = _lend_template(engine, last_model)
            result["notes"].append(f"it has no chat template; {last_model} lent its template and stop tokens")
        asked = list(dict.fromkeys([*sampled, *examples]))
        with Progress(f"{name}: answers", len(asked)) as progress:
            replies = answer_questions(
                engine, [questions[index] for index in asked], args.max_new_tokens, args.batch_size, progress
            )
        by_index = dict(zip(asked, replies, strict=True))
        counted = [index for index in sampled if by_index[index] is not None]
        score = count_answers([questions[index] for index in counted], [by_index[index] for index in counted])
        too_long = len(sampled) - len(counted)
        result["chat"] = {**vars(score), "asked": len(sampled), "prompt_too_long": too_long}
        result["answers"] = [_example_answer(by_index[index], questions[index].reference) for index in examples]
        if too_long:
            result["notes"].append(f"{too_long} questions are longer than its context and were not counted")
        if len(sampled) < len(questions):
            result["notes"].append(f"asked {len(sampled):,} of {len(questions):,} questions (seed {args.seed})")
        share = f" ({score.correct / score.total:.1%})" if score.total else ""
        print(
            f"  {name}: exact match {score.correct}/{score.total}{share}, stopped by itself "
            f"{score.stopped}/{score.total} ({progress.seconds:.1f} s)",
            flush=True,
        )
    for note in result["notes"]:
        print(f"  {name}: {note}", flush=True)
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def _lend_template(engine: Any, lender: str) -> Any:
    """Return an engine with the chat template and the stop tokens of another checkpoint."""
    from medicalgpt.chat import ChatEngine
    from medicalgpt.models import load_tokenizer

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


def _example_answer(answer: Any, reference: str) -> dict[str, Any]:
    if answer is None:
        return {"text": None, "finish_reason": "prompt too long", "correct": False}
    return {
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "correct": is_match(answer.text, reference),
    }


def _refuse(problems: Sequence[data_files.Problem]) -> None:
    if problems:
        shown = "\n  ".join(map(str, problems[: data_files.SHOWN_PROBLEMS]))
        more = len(problems) - data_files.SHOWN_PROBLEMS
        raise UserError(
            f"{len(problems)} row(s) cannot be measured:\n  {shown}" + (f"\n  … and {more} more" if more > 0 else "")
        )


def _read_previous(file: Path) -> list[dict[str, Any]]:
    try:
        previous = json.loads(file.read_text(encoding="utf-8"))
        return [model for model in (*previous["models"], *previous["earlier"]) if previous["format"] == FORMAT]
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


def _code_hash() -> str:
    """Hash of the code that decides what is measured: results of other code are not reused."""
    from medicalgpt import chat, encoding

    files = [Path(__file__), *(Path(module.__file__) for module in (chat, data_files, encoding))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


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
    parser.add_argument("--output_file", required=True, type=Path, help="Where the results go, as JSON.")
    parser.add_argument("--max_chat_samples", type=_positive, help="Ask the last model at most N questions.")
    parser.add_argument(
        "--max_chat_samples_before", type=_positive, default=200, help="Ask each earlier model at most N questions."
    )
    parser.add_argument("--batch_size", type=_positive, default=64, help="It changes the speed, not the results.")
    parser.add_argument("--max_new_tokens", type=_positive, default=96, help="Most tokens of one answer.")
    parser.add_argument("--block_size", type=_block_size, default=512, help="Most tokens of text scored at once.")
    parser.add_argument(
        "--document_unit",
        choices=["auto", "line", "paragraph", "file"],
        default="auto",
        help="What one document is in .txt and .md files; auto: a line of .txt, a whole .md.",
    )
    parser.add_argument("--ignore_fields", default="", help="Fields of a chat row that are not used, with commas.")
    parser.add_argument("--examples", type=_positive, default=12, help="Questions whose answers are kept to be shown.")
    parser.add_argument("--seed", type=int, default=42, help="Chooses which questions are asked.")
    args = parser.parse_args()
    if not (args.text_file_dir or args.chat_file):
        parser.error("nothing to measure: give --text_file_dir, --chat_file or both")
    return args


def main() -> None:
    args = parse_arguments()
    models = _parse_models(args.models)
    started = time.monotonic()

    documents = questions = None
    text_files: list[Path] = []
    chat_files: list[Path] = []
    left_out: dict[str, int] = {}
    examples: list[int] = []
    order: list[int] = []
    if args.text_file_dir:
        documents, text_files = read_documents(args.text_file_dir, args.document_unit)
        print(f"held-out text: {len(documents):,} documents in {', '.join(map(str, text_files))}", flush=True)
    if args.chat_file:
        questions, left_out = read_questions(args.chat_file, args.ignore_fields)
        chat_files = data_files.find_files(args.chat_file)
        examples = pick_examples(questions, args.examples)
        # One order for all models: who is asked fewer questions is asked the first of them.
        order = list(range(len(questions)))
        random.Random(args.seed).shuffle(order)
        skipped = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        print(
            f"held-out questions: {len(questions):,} in {args.chat_file}"
            + (f", left out: {skipped}" if skipped else ""),
            flush=True,
        )

    print("loading torch and transformers ...", flush=True)
    from medicalgpt.models import load_tokenizer

    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizers = {name: load_tokenizer(path) for name, path in models.items()}
    last = list(models)[-1]
    if questions and not tokenizers[last].chat_template:
        raise UserError(
            f"the last model, {models[last]}, has no chat template, so it cannot be asked questions. Give a model that "
            "supervised_finetuning.py trained as the last one, or leave out --chat_file."
        )
    # A later stage may end its turns with another token; documents end with the one of pretraining for all models.
    end_of_document = next(iter(tokenizers.values())).eos_token

    previous = _read_previous(args.output_file)
    evaluation: dict[str, Any] = {
        "format": FORMAT,
        "command": ["python", *sys.argv],
        "text": {"files": list(map(str, text_files)), "documents": len(documents)} if documents else None,
        "chat": {
            "file": args.chat_file,
            "rows": len(questions) + sum(left_out.values()),
            "used": len(questions),
            "left_out": left_out,
            "max_new_tokens": args.max_new_tokens,
        }
        if questions
        else None,
        "examples": [
            {
                "place": questions[index].place,
                "category": questions[index].category,
                "messages": questions[index].messages,
                "reference": questions[index].reference,
            }
            for index in examples
        ],
        "models": [],
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    for name, path in models.items():
        limit = (
            args.max_chat_samples if name == last else min(args.max_chat_samples_before, args.max_chat_samples or 2**62)
        )
        sampled = sorted(order[:limit])
        checkpoint = fingerprint_checkpoint(path)
        lent = questions is not None and not tokenizers[name].chat_template
        fingerprint = None
        if checkpoint is not None:
            fingerprint = {
                "code": _code_hash(),
                "versions": evaluation["versions"],
                "checkpoint": checkpoint,
                "template_from": fingerprint_checkpoint(models[last]) if lent else None,
                "text": fingerprint_files(text_files),
                "chat": fingerprint_files(chat_files),
                "settings": {
                    "block_size": args.block_size,
                    "document_unit": args.document_unit,
                    "end_of_document": end_of_document,
                    "max_new_tokens": args.max_new_tokens,
                    "ignore_fields": args.ignore_fields,
                    "seed": args.seed,
                    "asked": len(sampled),
                    "examples": args.examples,
                },
            }
        print(f"{name} ({path})", flush=True)
        kept = next((model for model in previous if fingerprint and model.get("fingerprint") == fingerprint), None)
        if kept:
            print(
                f"  {name}: weights, data and settings are unchanged; results of {args.output_file} reused", flush=True
            )
            result = {**kept, "name": name}
        else:
            result = evaluate_model(
                name, path, documents, questions, sampled, examples, end_of_document, models[last], args
            )
            result["fingerprint"] = fingerprint
        evaluation["models"].append(result)
        # Earlier results of models still to come are kept apart, so that an evaluation that is stopped loses none.
        waiting = [model for model in previous if model["name"] in list(models)[len(evaluation["models"]) :]]
        _write_json(args.output_file, {**evaluation, "earlier": waiting})
    print(f"results: {args.output_file} ({time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    run_main(main)
