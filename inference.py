"""Ask a trained model: one question, a conversation in the terminal, or a file of questions.

    python inference.py --model_name_or_path outputs-sft --query 感冒了怎么办？
    python inference.py --model_name_or_path outputs-vl --query 图中是什么？ --images xray/1.png
    python inference.py --model_name_or_path outputs-sft --interactive
    python inference.py --model_name_or_path outputs-sft --data_file questions.jsonl --output_file answers.jsonl
    torchrun --nproc_per_node 2 inference.py --model_name_or_path outputs-sft --data_file questions.jsonl

The model may be a hub name, a folder with all weights, or the folder of an adapter (its base is found automatically);
--lora_model adds an adapter, or several: with --lora_weights they are combined, otherwise /adapter NAME in the
conversation chooses among them. The chat template and the stop tokens come with the checkpoint.

A row of --data_file has `conversations`, `messages`, `instruction` (with `input`), `prompt`, `query` or `question`; a
.txt file has a question on each line. Rows may have `images` as in training, for a model of a family that is trained on
images (docs/models.md). If a row ends with an answer, that is not shown to the model and is written as
`reference`:

    {"question": "怎么办？", "answer": "休息。"}
 -> {"question": "怎么办？", "answer": "休息。", "reference": "休息。", "response": "…", "finish_reason": "stop"}

Until all rows are answered, the first ones are in OUTPUT_FILE.partial; the same command continues after them, and the
result is the same as without an interruption. Under torchrun each process has the model on its
own GPU and takes the next batch when it is ready; the file is the same with any number of processes.
"""

import hashlib
import json
import os
import signal
import sys
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from medicalgpt.args import ChatArguments, DataArguments, same_field
from medicalgpt.data.images import ImageError, Picture, check_images, pictures_of, question_with_images
from medicalgpt.errors import UserError, run_main
from medicalgpt.files import hash_file, refuse_overwriting, write_atomically
from medicalgpt.formats.conversion import Converter, converter, to_prompt_with_images
from medicalgpt.logs import (
    heartbeat,
    is_main_process,
    local_rank,
    local_world_size,
    setup_logging,
    world_size,
)
from medicalgpt.parser import parse_args
from medicalgpt.readers.folders import format_of
from medicalgpt.readers.problems import NEVER_SKIPPED, Problem, RowError, SourceRow, format_problems
from medicalgpt.readers.sources import ignored_fields, read_rows
from medicalgpt.serving.chat import ChatEngine, ChatTemplateError, PromptTooLongError, SpecialTokenError
from medicalgpt.serving.engines import adapted, engine_from
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling, sampling_from
from medicalgpt.serving.terminal import print_answer, print_note, read_lines, system_message
from template import check_template

import torch
from loguru import logger
from torch.distributed import HashStore, Store
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

# Rows are sorted by length within this many batches: enough to pad little, yet since rows are written in order, few
# answered ones have to wait for one that is not.
BATCHES_PER_SORT = 16
# How often the first process looks for the answers of the others.
SECONDS_BETWEEN_LOOKS = 0.05

HELP = """/clear        forget the conversation
/system TEXT  set the system prompt (without TEXT: show it)
/adapter NAME switch to another adapter of --lora_model (without NAME: list them)
/help         this list
/exit         exit (or Ctrl-D)
Ctrl-C stops an answer; what was printed of it stays in the conversation."""


@dataclass
class InferenceArguments(ChatArguments):
    """What is asked, and where the answers go."""

    query: str | None = field(default=None, metadata={"help": "Answer this one question."})
    images: str | None = field(
        default=None, metadata={"help": "Images that --query is about: files, separated by commas."}
    )
    interactive: bool = field(
        default=False, metadata={"help": "Talk in the terminal. The default if nothing else is requested."}
    )
    data_file: str | None = field(
        default=None, metadata={"help": "Answer every row of this .jsonl, .json or .txt file."}
    )
    output_file: str = field(
        default="predictions_result.jsonl", metadata={"help": "Where --data_file's answers are written."}
    )
    overwrite_output_file: bool = field(default=False, metadata={"help": "Replace --output_file if it exists."})
    ignore_fields: str | None = field(
        default=None, metadata={"help": "Fields of --data_file's rows that are not part of the question, with commas."}
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of --data_file, if it is not UTF-8. Default: recognised."}
    )
    columns: str | None = same_field(DataArguments, "columns")
    preset: str | None = same_field(DataArguments, "preset")
    skip_bad_rows: bool = field(
        default=False, metadata={"help": "Skip and count rows that cannot be answered, instead of stopping."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows answered at a time.", "aliases": ["--eval_batch_size"]})


def main() -> None:
    (arguments,) = parse_args(InferenceArguments, description=__doc__, program="inference.py")
    setup_logging()
    with one_of_several() if world_size() > 1 else nullcontext():
        mode = choose_mode(arguments)
        sampling = sampling_from(arguments)

        # Errors in the files show before minutes are spent on loading a model.
        questions, pictures = [], read_images(arguments)
        if mode == "data_file":
            check_output_file(arguments)
            questions = read_questions(arguments)

        with_images = bool(pictures) or any(question.pictures for question in questions)
        engine = engine_from(arguments, by_name=mode == "interactive", with_images=with_images)
        for each in adapted(engine):
            check_template(each.tokenizer, arguments.template_name)
        if mode == "query":
            messages = [*system_message(arguments.system_prompt), question_with_images(arguments.query, len(pictures))]
            print_answer(engine, engine.request(messages, sampling, pictures=pictures))
        elif mode == "interactive":
            talk(engine, sampling, arguments.system_prompt)
        else:
            answer_file(engine, sampling, questions, arguments)


def choose_mode(arguments: InferenceArguments) -> str:
    """Return "query", "interactive" or "data_file".

    Raises:
        UserError: not exactly one of them is requested, or a flag has no effect.
    """
    modes = [
        name for name in ("query", "interactive", "data_file") if name in arguments.given and getattr(arguments, name)
    ]
    if not modes and sys.stdin.isatty():
        modes = ["interactive"]
    if len(modes) != 1:
        found = " and ".join(f"--{name}" for name in modes) or "none, and the input is not a terminal"
        raise UserError(f"choose exactly one of --query TEXT, --interactive and --data_file FILE (found: {found}).")
    problems = []
    if world_size() > 1 and modes != ["data_file"]:
        problems.append(f"--{modes[0]} is for one process: start it with python, not torchrun.")
    if arguments.images is not None and modes != ["query"]:
        problems.append("--images belongs to --query; rows of --data_file have `images` of their own.")
    if modes != ["data_file"]:
        for name in (
            "output_file",
            "overwrite_output_file",
            "ignore_fields",
            "encoding",
            "skip_bad_rows",
            "batch_size",
        ):
            if name in arguments.given:
                problems.append(f"--{name} has no effect without --data_file; omit it.")
    if arguments.temperature == 0:
        for name in ("top_p", "top_k", "seed"):
            if name in arguments.given:
                problems.append(f"--{name} has no effect at --temperature 0; add --temperature 0.7, for example.")
    if arguments.query is not None and not arguments.query.strip():
        problems.append("--query is empty; pass a question.")
    if arguments.batch_size < 1:
        problems.append(f"--batch_size is {arguments.batch_size}, it must be at least 1.")
    if problems:
        raise UserError("\n  ".join(problems))
    return modes[0]


def read_images(arguments: InferenceArguments) -> list[Picture]:
    """The images of --images, checked.

    Raises:
        UserError: images that cannot be used, all of them.
    """
    pictures, problems = [], []
    for path in [part.strip() for part in (arguments.images or "").split(",") if part.strip()]:
        try:
            pictures.append(Picture.read(path))
        except ImageError as error:
            problems.append(f"{error}" if path in error.reason else f"{path}: {error}")
    if arguments.images is not None and not pictures and not problems:
        problems.append("it names no file.")
    if problems:
        raise UserError("--images: " + "\n  ".join(problems))
    return pictures


def talk(engine: ChatEngine, sampling: Sampling, system_prompt: str | None) -> None:
    """A conversation of many turns, until /exit, Ctrl-D, the end of the input, or Ctrl-C at the prompt."""
    history: list[dict[str, str]] = []
    for line in read_lines():
        command, _, rest = line.partition(" ")
        if not line:
            continue
        elif command == "/exit":
            return
        elif command == "/clear":
            history.clear()
            print_note("The conversation is cleared.")
        elif command == "/system":
            system_prompt = rest.strip() or system_prompt
            print_note(f"System prompt: {system_prompt or 'none'}")
        elif command == "/adapter":
            engine = switch_adapter(engine, rest.strip())
        elif command == "/help":
            print_note(HELP)
        elif command.startswith("/") and command[1:].isalpha() and not rest:
            print_note(f"There is no command {command}; /help lists them.")
        else:
            messages = [*system_message(system_prompt), *history, {"role": "user", "content": line}]
            try:
                answer = print_answer(engine, engine.request(messages, sampling))
            except PromptTooLongError as error:
                print_note(f"error: {error} /clear starts again.")
            except Exception as error:
                print_note(f"error: {error or type(error).__name__}\nThis turn is not part of the conversation.")
            else:
                # After an empty turn, the model would give empty answers from here on.
                if answer:
                    history += [messages[-1], {"role": "assistant", "content": answer}]


def switch_adapter(engine: ChatEngine, name: str) -> ChatEngine:
    """The engine of the adapter with this name; the same engine, and a note, if there is none."""
    if not engine.siblings:
        print_note("There is one model here. Start with several adapters: --lora_model PATH,PATH")
    elif name in engine.siblings:
        engine = engine.siblings[name]
        print_note(f"From here on {name} answers.")
    else:
        missing = f"There is no adapter {name}. " if name else ""
        listed = ", ".join(f"{each} (active)" if each == engine.name else each for each in engine.siblings)
        print_note(f"{missing}/adapter NAME chooses among: {listed}")
    return engine


@dataclass(frozen=True)
class Question:
    """One row of the data file and its prompt."""

    row: SourceRow
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    reference: str | None
    pictures: tuple[Picture, ...] = ()


def unfinished(output_file: str) -> Path:
    return Path(f"{output_file}.partial")


def check_output_file(arguments: InferenceArguments) -> None:
    """Raises UserError if the answers would overwrite a file without permission."""
    if not is_main_process():
        return  # By now the first process may have begun to write.
    target, partial = Path(arguments.output_file), unfinished(arguments.output_file)
    for path in (target, partial):
        refuse_overwriting("--output_file", path, {"--data_file": arguments.data_file})
    if target.is_dir():
        raise UserError(f"--output_file {target} is a folder; give the name of a file in it.")
    if target.exists() and not arguments.overwrite_output_file:
        raise UserError(f"{target} exists already. Give another --output_file, or add --overwrite_output_file.")
    if partial.exists():
        check_record(arguments)


# What does not change the answers, or is compared by what it leads to: weights and prompts.
FREE_SETTINGS = frozenset(
    ("output_file", "overwrite_output_file", "data_file", "model_name_or_path", "lora_model", "tokenizer_name_or_path")
    + ("template_name", "model_revision", "cache_dir", "hub", "device_map", "query", "interactive")
)


def record_of(arguments: InferenceArguments) -> Path:
    """What the answers in the unfinished file were made with: a file next to it."""
    return Path(f"{unfinished(arguments.output_file)}.json")


def settings_of(arguments: InferenceArguments) -> dict[str, Any]:
    settings = {name: value for name, value in vars(arguments).items() if name not in FREE_SETTINGS | {"given"}}
    return settings | {"data_sha256": hash_file(arguments.data_file)}


def check_record(arguments: InferenceArguments, **loaded: str) -> None:
    """Compare a run with the one that left an unfinished file, as far as it is known.

    Args:
        loaded: what is known after loading only, such as a hash of the weights.

    Raises:
        UserError: something differs, so that old and new answers would not belong together.
    """
    partial = unfinished(arguments.output_file)
    try:
        recorded = json.loads(record_of(arguments).read_text(encoding="utf-8"))
        wanted = loaded or settings_of(arguments)
        changed = [f"{name} ({recorded.get(name)!r:.60})" for name in wanted if recorded.get(name) != wanted[name]]
    except (OSError, ValueError, AttributeError):
        changed = ["what they were made with: it is not recorded"]
    if not changed:
        return
    if arguments.overwrite_output_file:
        partial.unlink(missing_ok=True)
        return
    raise UserError(
        f"{partial} has the answers of an interrupted run that differs in {', '.join(changed)}.\n"
        "Run it again as it was to continue, give another --output_file, or add --overwrite_output_file to start again."
    )


def weights_hash(model: torch.nn.Module) -> str:
    """A hash that distinguishes models: the name, type and shape of each tensor and its first values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.flatten()[:64].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def prompts_hash(prompts: Sequence[array], questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for prompt, question in zip(prompts, questions, strict=True):
        digest.update(len(prompt).to_bytes(8, "little") + prompt.tobytes())
        for picture in question.pictures:
            digest.update(picture.sha256.encode())
    return digest.hexdigest()


def continue_partial(
    engine: ChatEngine, questions: list[Question], prompts: Sequence[array], arguments: InferenceArguments
) -> int:
    """Make the unfinished file ready to be continued, or begin one, and return the number of answers in it.

    Raises:
        UserError: it was written with other weights or prompts, or other rows.
    """
    partial = unfinished(arguments.output_file)
    partial.parent.mkdir(parents=True, exist_ok=True)
    loaded = {"weights": weights_hash(engine.model), "prompts": prompts_hash(prompts, questions)}
    if partial.exists():
        check_record(arguments, **loaded)
    if not partial.exists():
        record = json.dumps(settings_of(arguments) | loaded, ensure_ascii=False, indent=1)
        write_atomically(record_of(arguments), record)
        partial.touch()
        return 0
    lines = partial.read_bytes().split(b"\n")
    # Without its end, a line was being written when the run ended.
    written = len(lines) - 1
    size = sum(len(line) + 1 for line in lines[:written])
    for question, line in zip(questions, lines[:written], strict=False):
        try:
            same = json.loads(line).items() >= json.loads(output_line(question, {})).items()
        except (ValueError, AttributeError):
            same = False
        if not same:
            raise UserError(
                f"{partial} was changed: it does not answer {question.row.place}. Remove it to start again."
            )
    os.truncate(partial, size)
    logger.info(f"continuing after the first {written} of {len(questions)} answers, which are in {partial}")
    return written


def read_questions(arguments: InferenceArguments) -> list[Question]:
    """Read and convert every row of the data file.

    Raises:
        UserError: any row is broken; all of them are named.
    """
    path = Path(arguments.data_file)
    if not path.is_file() or format_of(path) is None:
        raise UserError(
            f"--data_file {path} must be an existing .jsonl, .json, .txt or .csv file (looked in "
            f"{Path.cwd()}; data/README.md lists further formats)."
        )
    try:
        convert = converter(
            to_prompt_with_images,
            ignored_fields(arguments.ignore_fields),
            columns=arguments.columns,
            preset=arguments.preset,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    questions: list[Question] = []
    problems: list[Problem] = []
    for row in read_rows(path, encoding=arguments.encoding):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        try:
            questions.append(to_question(row, convert, arguments.system_prompt))
        except RowError as error:
            problems.append(error.at(row.place))
    refuse(problems, arguments.skip_bad_rows)
    if not questions:
        raise UserError(f"{path} has no rows that can be answered. Fill it, or give another --data_file.")
    return questions


def to_question(row: SourceRow, convert: Converter, system_prompt: str | None) -> Question:
    """Raises RowError if the row has no prompt, or its answer would overwrite one of its own fields."""
    prompt = convert(row.value)
    messages, reference = prompt["messages"], prompt["reference"]
    if isinstance(row.value, dict):
        taken = {"reference", "response", "tool_calls", "finish_reason"}.intersection(row.value)
        # An answer in `response` is the reference, and stays in the output under that name.
        if reference is not None and row.value.get("response") == reference:
            taken.discard("response")
        if taken:
            raise RowError(
                f"the output would replace the row's own {', '.join(sorted(taken))}",
                "Rename the field.",
                {name: row.value[name] for name in taken},
            )
    if messages[0]["role"] != "system":
        messages = [*system_message(system_prompt), *messages]
    pictures = pictures_of({"images": check_images(prompt.get("images", ()), row.place)})
    return Question(row, messages, prompt["tools"], reference, tuple(pictures))


def refuse(problems: list[Problem], skip: bool) -> None:
    """Raises UserError if there are problems; with `skip`, the log has them instead."""
    if not problems:
        return
    shown = f"{len(problems)} row(s) cannot be answered"
    if not skip or any(problem.kind in NEVER_SKIPPED for problem in problems):
        raise UserError(f"{shown}; nothing was generated:\n{format_problems(problems)}")
    logger.warning(f"{shown} and are skipped (--skip_bad_rows True):\n{format_problems(problems)}")


def render_prompts(engine: ChatEngine, questions: list[Question], skip: bool) -> tuple[list[Question], list[array]]:
    """The questions that can be asked, and token ids of each prompt, four bytes per token, so that long files fit.

    Raises:
        UserError: prompts cannot be rendered or are too long; all of them are named. With `skip` only if all are.
    """
    usable: list[Question] = []
    prompts: list[array] = []
    problems: list[Problem] = []
    for question in questions:
        try:
            prompts.append(array("i", engine.prompt_ids(question.messages, question.tools, question.pictures)))
            usable.append(question)
        except PromptTooLongError as error:
            problems.append(
                Problem(
                    question.row.place,
                    f"the prompt has {error.prompt_tokens} tokens, the model's context {error.context_length}",
                    "Shorten the row.",
                )
            )
        except (ChatTemplateError, SpecialTokenError) as error:
            problems.append(Problem(question.row.place, str(error).rstrip("."), "Change the row."))
    refuse(problems, skip and bool(usable))
    return usable, prompts


def in_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches of row numbers: neighbouring rows of similar length, the longest first."""
    width = batch_size * BATCHES_PER_SORT
    batches = []
    for first in range(0, len(lengths), width):
        rows = sorted(range(first, min(first + width, len(lengths))), key=lambda row: lengths[row], reverse=True)
        batches += [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return batches


def answer_file(
    engine: ChatEngine, sampling: Sampling, questions: list[Question], arguments: InferenceArguments
) -> None:
    """Answer all questions, together with the other processes; the first one writes them in the data file's order."""
    questions, prompts = render_prompts(engine, questions, arguments.skip_bad_rows)
    requests = [
        GenerationRequest(prompt_ids, sampling.with_seed_offset(row), question.tools, pictures=question.pictures)
        for row, (prompt_ids, question) in enumerate(zip(prompts, questions, strict=True))
    ]
    batches = in_batches(list(map(len, prompts)), arguments.batch_size)
    store: Store = next(rendezvous("env://"))[0] if world_size() > 1 else HashStore()
    # The first process decides for all where to begin. Batches stay as they are: what shares one decides on rounding.
    if is_main_process():
        store.set("written", str(continue_partial(engine, questions, prompts, arguments)))
    begin = int(store.get("written"))
    batches = [batch for batch in batches if max(batch) >= begin]
    own_work = answer_batches(engine, requests, batches, store)
    if not is_main_process():
        for _ in own_work:
            pass
        store.add("finished", 1)
        return

    if len(batches) < world_size():
        logger.warning(
            f"{len(questions) - begin} rows are {len(batches)} batch(es) of --batch_size {arguments.batch_size}, so "
            f"that {world_size() - len(batches)} of {world_size()} processes have nothing to do"
        )
    target, partial = Path(arguments.output_file), unfinished(arguments.output_file)
    started, tokens, written, shown = time.monotonic(), 0, begin, 0
    try:
        with open(partial, "a", encoding="utf-8") as file, progress(sum(map(len, batches))) as advance:
            while written < len(questions):
                if not next(own_work, False):
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                while store.check([f"row {written}"]):
                    answer = json.loads(store.get(f"row {written}"))
                    store.delete_key(f"row {written}")
                    file.write(output_line(questions[written], answer["reply"]))
                    tokens += answer["tokens"]
                    written += 1
                file.flush()
                answered = store.add("answered", 0)
                advance(answered - shown)
                shown = answered
        # The store may be this process's own, and the others must not find it gone.
        while store.add("finished", 0) < world_size() - 1:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        if written < len(questions):
            logger.warning(f"unfinished: the first {written} of {len(questions)} answers are in {partial}")
    partial.replace(target)
    record_of(arguments).unlink()
    seconds = time.monotonic() - started
    logger.info(f"{len(questions)} answers, {tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f}/s): {target}")


def answer_batches(
    engine: ChatEngine, requests: Sequence[GenerationRequest], batches: list[list[int]], store: Store
) -> Iterator[bool]:
    """Take batches that no process has taken yet, until none is left; yields True after each.

    Which rows share a batch, and with which seed a row is sampled, does not depend on the process. So answers are the
    same with any number of processes, also in 16 bits, where sums round by the shape of a batch.
    """
    while (number := store.add("taken", 1) - 1) < len(batches):
        answers = engine.generate([requests[row] for row in batches[number]])
        for row, answer in zip(batches[number], answers, strict=True):
            store.set(f"row {row}", json.dumps({"reply": reply_of(answer), "tokens": answer.completion_tokens}))
        store.add("answered", len(batches[number]))
        yield True


def reply_of(answer: Answer) -> dict[str, Any]:
    """The fields that an answer adds to its row."""
    calls = {"tool_calls": answer.tool_calls} if answer.tool_calls else {}
    return {"response": answer.text, **calls, "finish_reason": answer.finish_reason}


def output_line(question: Question, reply: dict[str, Any]) -> str:
    row = question.row.value if isinstance(question.row.value, dict) else {"prompt": question.row.value}
    reference = {} if question.reference is None else {"reference": question.reference}
    return json.dumps({**row, **reference, **reply}, ensure_ascii=False) + "\n"


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], Any]]:
    """Show progress: a bar on a terminal, a line every 30 s otherwise. Yields `advance(number_of_new_rows)`."""
    if sys.stderr.isatty():
        with tqdm(total=total, unit="row") as bar:
            yield bar.update
        return
    done, started = [], time.monotonic()

    def state() -> str:
        rows, seconds = sum(done), time.monotonic() - started
        left = f", about {seconds / rows * (total - rows):.0f} s left" if rows else ""
        return f"{rows}/{total} rows after {seconds:.0f} s{left}"

    with heartbeat(state):
        yield done.append


@contextmanager
def one_of_several() -> Iterator[None]:
    """Give this process its own GPU, and make sure that no failed run ends silently.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    signal.signal(signal.SIGTERM, stop_with_the_others)
    try:
        choose_gpu()
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def choose_gpu() -> None:
    if not torch.accelerator.is_available():
        return
    devices, here = torch.accelerator.device_count(), local_world_size(local_rank() + 1)
    if here > devices:
        raise UserError(
            f"{here} processes were started on this machine, which has {devices} GPU(s), and each process needs one of "
            f"its own. Start it with --nproc_per_node {devices}."
        )
    torch.accelerator.set_device_index(local_rank())


def stop_with_the_others(*_: object) -> NoReturn:
    if is_main_process():
        print(
            "\nerror: this run was ended (SIGTERM). torchrun does so when another process has failed or was killed; "
            "its own message is next to this one.",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(1)


if __name__ == "__main__":
    run_main(main)
