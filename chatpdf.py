"""Question answering over documents (PDF, DOCX, HTML, Markdown, plain text), with file and page as sources.

    python chatpdf.py --model_name_or_path outputs-sft --files report.pdf notes/ --query "When is the next check?"
    python chatpdf.py --model_name_or_path outputs-sft --files notes/ --interactive
    python chatpdf.py --model_name_or_path outputs-sft --page True
    python chatpdf.py --files notes/ --search "blood pressure in the morning"
    python chatpdf.py --evaluate

Files are split into passages along headings and sentences. The passages that share most with the question, weighed by
BM25, are put before the question, and the model is told to answer from them alone and to cite them. `--sim_model_name`
adds a model of sentence embeddings; both rankings are then fused. When the question's words, or words for the same
thing, and what it asks for are not in a passage together, the answer is that nothing was found, and the model is not
asked; with `--rerank_model_name` its scores decide.

What was read of a file is kept in the user's cache folder until the file changes or is gone; uploads are not kept.

--search shows passages, --evaluate measures how often the right one is found, --make_tasks writes rows that train
citing with GRPO; none of them needs a model. With one, --evaluate
also checks the citations. --page True serves a page on http://127.0.0.1:8081 to which a visitor can upload files.
"""

import asyncio
import dataclasses
import json
import os
import random
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.args import ChatArguments
from medicalgpt.errors import UserError, run_main
from medicalgpt.files import refuse_overwriting, write_atomically
from medicalgpt.formats.citations import Chooser, finished
from medicalgpt.formats.terms import language_of
from medicalgpt.logs import heartbeat, printable, setup_logging
from medicalgpt.parser import parse_args
from medicalgpt.rag import documents
from medicalgpt.rag.grounding import (
    UNKNOWN,
    GroundedPrompt,
    build_prompt,
    build_sources,
    find_unsupported,
    format_sources,
    is_relevant,
    search_query,
)
from medicalgpt.rag.retrieval import (
    Collection,
    DocumentStore,
    Embedder,
    Passage,
    Reranker,
    SearchResult,
    find_documents,
)
from medicalgpt.rag.tasks import Question, describe_citations, is_held_out, write_tasks
from medicalgpt.rag.visitors import take_uploads
from medicalgpt.readers.problems import Problem, format_problems
from medicalgpt.readers.sources import read_rows
from medicalgpt.rewards.citing import score_citations
from medicalgpt.serving.arguments import PageArguments
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling, sampling_from
from medicalgpt.serving.terminal import print_answer, print_note, read_lines
from template import check_template

import numpy as np
from loguru import logger

if TYPE_CHECKING:
    from medicalgpt.serving.batchers import Batcher
    from medicalgpt.serving.uploads import Uploads

    import gradio as gr


SAMPLES = Path(__file__).resolve().parent / "data" / "rag"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medicalgpt" / "chatpdf"
MODES = ("query", "interactive", "search", "evaluate", "make_tasks", "page")
ANSWERS_AT_A_TIME = 8
HELP = """/clear   forget the conversation
/help    this list
/exit    leave (or Ctrl-D)
Ctrl-C stops an answer."""


@dataclass
class FileArguments(PageArguments):
    """Which files, which questions, and how passages are retrieved."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, local folder, or the folder of an adapter. Not needed for --search and --evaluate.",
            "aliases": ["--base_model"],
        },
    )
    files: list[str] | None = field(
        default=None,
        metadata={"help": "Files and folders; folders are searched recursively.", "aliases": ["--corpus_files"]},
    )
    encoding: str | None = field(
        default=None, metadata={"help": "Encoding of text files that are not UTF-8. Default: recognised."}
    )
    query: str | None = field(default=None, metadata={"help": "Answer this one question."})
    interactive: bool = field(
        default=False, metadata={"help": "Chat in the terminal. The default if no other mode is given."}
    )
    search: str | None = field(default=None, metadata={"help": "Show the passages for this question, without a model."})
    evaluate: bool = field(default=False, metadata={"help": "Measure on data/rag, or on --files and --questions."})
    page: bool = field(default=False, metadata={"help": "Serve a web page with uploads.", "aliases": ["--webui"]})
    questions: str | None = field(
        default=None, metadata={"help": "Questions for --evaluate, a .jsonl file like data/rag/questions.jsonl."}
    )
    output_file: str | None = field(default=None, metadata={"help": "JSON file for the results of --evaluate."})
    overwrite_output_file: bool = field(default=False, metadata={"help": "Replace --output_file if it exists."})
    num_passages: int = field(default=5, metadata={"help": "Number of passages put before the question."})
    chunk_size: int = field(
        default=220, metadata={"help": "Size of a passage; a Chinese character or a word of another script is one."}
    )
    chunk_overlap: int = field(
        default=40, metadata={"help": "Complete sentences up to this size are repeated in the next passage."}
    )
    num_expand_context_chunk: int = field(
        default=0, metadata={"help": "Add this many neighboring passages on each side of a passage."}
    )
    min_confidence: float = field(
        default=0.5,
        metadata={
            "help": "Say that nothing was found if the estimate that the files answer the question is lower, from 0 to "
            "1; it is made by words alone. 0: always ask the model."
        },
    )
    sim_model_name: str | None = field(
        default=None,
        metadata={"help": "Embedding model for sentence-transformers; its ranking is fused with BM25's."},
    )
    min_similarity: float | None = field(
        default=None,
        metadata={
            "help": "With --sim_model_name: also ask the model if a passage has at least this cosine similarity. The "
            "scale differs between embedding models, so there is no default."
        },
    )
    rerank_model_name: str | None = field(
        default=None,
        metadata={"help": "Cross-encoder for sentence-transformers; it ranks the best passages again."},
    )
    min_relevance: float = field(
        default=0.5,
        metadata={
            "help": "With --rerank_model_name: ask the model only if the best passage has at least this score, from 0 "
            "to 1, instead of --min_confidence. Rerankers differ, so choose it with --evaluate on your own questions."
        },
    )
    make_tasks: str | None = field(
        default=None, metadata={"help": "Write rows for GRPO's reward `citations` to this .jsonl file."}
    )
    with_replies: bool = field(
        default=False,
        metadata={
            "help": "With --make_tasks: a cited reply, or the refusal, in each row, so that SFT can use them too."
        },
    )
    index_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which passages and embeddings of --files are cached, readable only by their owner. "
            "Default: medicalgpt/chatpdf in the user's cache folder (~/.cache)."
        },
    )
    max_upload_bytes: int = field(
        default=500_000_000,
        metadata={"help": "Maximum bytes of all uploads that are not read yet; a visitor may have a quarter of them."},
    )
    port: int = field(
        default=8081, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )


def main() -> None:
    (arguments,) = parse_args(FileArguments, description=__doc__, program="chatpdf.py")
    setup_logging()
    mode = choose_mode(arguments)
    sampling = sampling_from(arguments)
    questions = read_questions(arguments) if mode in ("evaluate", "make_tasks") else []
    collection = read_collection(arguments)
    if mode == "page":
        return serve_page(collection, arguments)
    if mode in ("evaluate", "make_tasks"):
        # A model is measured with the prompts that it was trained with, wherever the files are.
        collection = collection.with_short_names()
    if mode == "make_tasks":
        return write_tasks(arguments.make_tasks, questions, collection, arguments.num_passages, arguments.with_replies)
    engine = None
    if arguments.model_name_or_path:
        engine = engine_from(arguments)
        check_template(engine.tokenizer, arguments.template_name)
    if mode == "search":
        show_passages(collection, arguments)
    elif mode == "evaluate":
        evaluate(engine, sampling, collection, questions, arguments)
    elif mode == "query":
        reply(engine, sampling, collection, arguments, [], arguments.query)
    else:
        talk(engine, sampling, collection, arguments)


def choose_mode(arguments: FileArguments) -> str:
    """Return one of MODES.

    Raises:
        UserError: not exactly one of them is asked for, something is missing, or a flag has no effect.
    """
    given = arguments.given
    modes = [name for name in MODES if name in given and getattr(arguments, name)]
    if not modes and sys.stdin.isatty():
        modes = ["interactive"]
    if len(modes) != 1:
        found = " and ".join(f"--{name}" for name in modes) or "none, and the input is not a terminal"
        raise UserError(
            "choose exactly one of --query TEXT, --interactive, --search TEXT, --evaluate, --make_tasks FILE and "
            f"--page True (found: {found})."
        )
    (mode,) = modes
    only = {
        "evaluate": {"output_file", "overwrite_output_file"},
        "make_tasks": {"with_replies"},
        "page": names_of(PageArguments) - names_of(ChatArguments),
    }
    problems = [
        f"--{name} has no effect without --{owner}; omit it."
        for owner, names in only.items()
        for name in sorted(names & given)
        if owner != mode
    ]
    if "questions" in given and mode not in ("evaluate", "make_tasks"):
        problems.append("--questions has no effect without --evaluate or --make_tasks; omit it.")
    if mode in ("evaluate", "search") and not arguments.model_name_or_path:
        of_answers = names_of(ChatArguments) - {"cache_dir"} | ({"num_passages"} if mode == "evaluate" else set())
        problems += [f"--{name} has no effect without a model; omit it." for name in sorted(of_answers & given)]
    elif mode not in ("search", "make_tasks") and not arguments.model_name_or_path:
        problems.append(f"--{mode} needs a model: for example --model_name_or_path outputs-sft.")
    if mode == "search" and arguments.model_name_or_path:
        problems.append("--model_name_or_path has no effect with --search; omit it, or use --query.")
    if not arguments.files and mode not in ("evaluate", "make_tasks", "page"):
        problems.append("--files is missing: pass files or folders.")
    if bool(arguments.files) != bool(arguments.questions) and mode in ("evaluate", "make_tasks"):
        problems.append(f"--{mode} takes both --files and --questions, or neither for data/rag.")
    for name in ("query", "search"):
        if getattr(arguments, name) is not None and not getattr(arguments, name).strip():
            problems.append(f"--{name} is empty; pass a question.")
    for name, least in (("num_passages", 1), ("chunk_size", 20), ("chunk_overlap", 0), ("num_expand_context_chunk", 0)):
        if getattr(arguments, name) < least:
            problems.append(f"--{name} is {getattr(arguments, name)}, it must be at least {least}.")
    if arguments.chunk_overlap > arguments.chunk_size // 2:
        problems.append("--chunk_overlap must be at most half of --chunk_size.")
    for name in ("min_confidence", "min_relevance"):
        if not 0 <= getattr(arguments, name) <= 1:
            problems.append(f"--{name} is {getattr(arguments, name)}, it must be from 0 to 1.")
    if arguments.min_similarity is not None and not arguments.sim_model_name:
        problems.append("--min_similarity has no effect without --sim_model_name; omit it.")
    if "min_relevance" in given and not arguments.rerank_model_name:
        problems.append("--min_relevance has no effect without --rerank_model_name; omit it.")
    if arguments.rerank_model_name:
        problems += [
            f"--{name} has no effect with --rerank_model_name, whose scores decide; omit it, or set --min_relevance."
            for name in ("min_confidence", "min_similarity")
            if name in given
        ]
    if arguments.temperature == 0:
        problems += [
            f"--{name} has no effect at --temperature 0." for name in ("top_p", "top_k", "seed") if name in given
        ]
    if problems:
        raise UserError("\n  ".join(problems))
    return mode


def names_of(cls: type) -> set[str]:
    return {each.name for each in dataclasses.fields(cls)}


def read_collection(arguments: FileArguments) -> "Collection":
    """Read all files, from the index if they are unchanged.

    Raises:
        UserError: files cannot be read; all of them are named. Or --output_file is one of them.
    """
    embedder = Embedder(arguments.sim_model_name, arguments.cache_dir) if arguments.sim_model_name else None
    reranker = Reranker(arguments.rerank_model_name, arguments.cache_dir) if arguments.rerank_model_name else None
    if arguments.page and not arguments.files:
        return Collection([], embedder, reranker=reranker)
    files = find_documents(arguments.files or [str(SAMPLES / "documents")])
    for path in files:
        refuse_overwriting("--output_file", arguments.output_file, {"--files": path})
    store = DocumentStore(
        arguments.index_dir or CACHE, arguments.chunk_size, arguments.chunk_overlap, arguments.encoding
    )
    store.remove_missing()

    def read(path: Path) -> tuple[list[Passage], Sequence[str], bool] | UserError:
        try:
            return store.read(path)
        except UserError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool, heartbeat(lambda: f"reading {len(files)} file(s)"):
        results = list(pool.map(read, files))
    errors = [result for result in results if isinstance(result, UserError)]
    if errors:
        raise UserError(f"{len(errors)} of {len(files)} file(s) cannot be read:\n  " + "\n  ".join(map(str, errors)))
    for path, (_, notices, _) in zip(files, results, strict=True):
        for notice in notices:
            logger.warning(f"{path}: {notice}")
    passages = [passage for found, _, _ in results for passage in found]
    known = sum(kept for _, _, kept in results)
    logger.info(f"{len(files)} file(s) ({known} from the index at {store.folder}), {len(passages)} passages")
    vectors = None
    if embedder:
        with heartbeat(lambda: f"embedding the passages of {len(files)} file(s)"):
            rows = [store.vectors(path, found, embedder) for path, (found, _, _) in zip(files, results, strict=True)]
        vectors = np.concatenate(rows)
    return Collection(passages, embedder, vectors, reranker)


def ground(
    engine: ChatEngine,
    sampling: Sampling,
    collection: Collection,
    arguments: FileArguments,
    found: SearchResult,
    history: Sequence[dict[str, str]],
    question: str,
    chooser: Chooser | None = None,
) -> GroundedPrompt | None:
    """The prompt for a question with the passages found; None if these are not relevant enough to ask the model."""
    if not is_relevant(found, arguments.min_similarity, arguments.min_confidence, arguments.min_relevance):
        return None
    sources = build_sources(collection, found, arguments.num_passages, arguments.num_expand_context_chunk)
    return build_prompt(engine, sampling, arguments.system_prompt, history, question, sources, chooser)


def reply(
    engine: ChatEngine,
    sampling: Sampling,
    collection: Collection,
    arguments: FileArguments,
    history: Sequence[dict[str, str]],
    question: str,
) -> str:
    """Print the answer to a question and its sources. Returns the answer; empty if the model was not asked."""
    found = collection.search(search_query(question, history))
    prompt = ground(engine, sampling, collection, arguments, found, history, question)
    if prompt is None:
        print(UNKNOWN[language_of(question)], flush=True)
        return ""
    answer = prompt.read(
        print_answer(
            engine,
            GenerationRequest(prompt.prompt_ids, sampling),
            lambda text, ended: prompt.read(text if ended else finished(text)).text,
        )
    )
    print("", *map(printable, format_sources(answer, prompt.sources)), sep="\n", flush=True)
    return answer.text


def talk(engine: ChatEngine, sampling: Sampling, collection: Collection, arguments: FileArguments) -> None:
    """A conversation about the files, until /exit, Ctrl-D, or the end of the input."""
    history: list[dict[str, str]] = []
    for line in read_lines():
        if line == "/exit":
            return
        elif line == "/clear":
            history.clear()
            print_note("The conversation is forgotten.")
        elif line == "/help":
            print_note(HELP)
        elif re.fullmatch("/[a-z]+", line):
            print_note(f"There is no command {line}; /help lists them.")
        elif line:
            try:
                answer = reply(engine, sampling, collection, arguments, history, line)
            except UserError as error:
                print_note(f"error: {error}\nThis turn was not added to the conversation.")
                continue
            # Without the passages, which would fill the context; the model would imitate an empty answer.
            if answer:
                history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


def show_passages(collection: Collection, arguments: FileArguments) -> None:
    """Print the passages that a model would be given, in full."""
    found = collection.search(arguments.search)
    relevance = "" if found.relevance is None else f", relevance {found.relevance:.3f}"
    similarity = "" if found.similarity is None else f", largest similarity {found.similarity:.2f}"
    is_enough = is_relevant(found, arguments.min_similarity, arguments.min_confidence, arguments.min_relevance)
    verdict = "a model would be asked" if is_enough else "the answer would be that nothing was found"
    print_note(f"confidence {found.confidence:.2f} that the files answer it{similarity}{relevance}: {verdict}")
    sources = build_sources(collection, found, arguments.num_passages, arguments.num_expand_context_chunk)
    for number, source in enumerate(sources, start=1):
        print(printable(f"[{number}] {source.place}\n{source.text}\n"))


def read_questions(arguments: FileArguments) -> list[Question]:
    """Raise UserError if rows are broken, naming all of them, or if --output_file would overwrite something."""
    if arguments.output_file and Path(arguments.output_file).exists() and not arguments.overwrite_output_file:
        raise UserError(f"{arguments.output_file} exists. Choose another file, or add --overwrite_output_file.")
    path = Path(arguments.questions or SAMPLES / "questions.jsonl")
    refuse_overwriting("--output_file", arguments.output_file, {"--questions": path})
    if not path.is_file() or path.suffix != ".jsonl":
        raise UserError(f"--questions {path} must be an existing .jsonl file (looked in {Path.cwd()}).")
    questions, problems = [], []
    for row in read_rows(path, encoding=arguments.encoding):
        if isinstance(row, Problem):
            problems.append(row)
            continue
        value = row.value if isinstance(row.value, dict) else {}
        kept = {field.name: value[field.name] for field in dataclasses.fields(Question) if field.name in value}
        if not all(isinstance(kept.get(name), str) for name in ("question", "language")) or "file" not in kept:
            problems.append(Problem(row.place, "no question, language and file", "See data/rag/questions.jsonl."))
        elif kept["file"] and not kept.get("evidence"):
            problems.append(Problem(row.place, "no evidence", "Quote the passage of the file that has the answer."))
        else:
            questions.append(Question(**kept))
    if problems or not questions:
        raise UserError(f"--questions {path} cannot be used:\n{format_problems(problems) or '  it has no rows'}")
    return questions


def evaluate(
    engine: ChatEngine | None,
    sampling: Sampling,
    collection: Collection,
    questions: list[Question],
    arguments: FileArguments,
) -> None:
    """Print, for each language, how often the correct passage is found and, with a model, correctly cited."""
    rows: list[dict[str, Any]] = []
    prompts: list[tuple[dict[str, Any], GroundedPrompt, set[int]]] = []
    lost = []
    for question in questions:
        found = collection.search(question.question)
        right = {i for i, passage in enumerate(collection.passages) if question.file and question.answered_by(passage)}
        if question.file and not right:
            lost.append(question.question)
        rank = next((n for n, index in enumerate(found.order, start=1) if index in right), None)
        asked = is_relevant(found, arguments.min_similarity, arguments.min_confidence, arguments.min_relevance)
        of_question = {"rank": rank, "confidence": found.confidence, "relevance": found.relevance, "asked": asked}
        rows.append(dataclasses.asdict(question) | of_question)
        if engine and asked:
            # Repeatable, as nobody is there to be deceived.
            chooser = random.Random(len(rows))
            prompt = ground(engine, sampling, collection, arguments, found, [], question.question, chooser)
            prompts.append((rows[-1], prompt, right))
    if lost:
        logger.warning(
            f"no passage contains the evidence of {len(lost)} questions, which count as not found: {lost[0]} …"
        )
    if prompts:
        with heartbeat(lambda: f"answering {len(prompts)} questions"):
            answers = engine.batch([prompt.prompt_ids for _, prompt, _ in prompts], sampling, ANSWERS_AT_A_TIME)
        for (row, prompt, right), answer in zip(prompts, answers, strict=True):
            task = describe_citations(prompt.sources, right, prompt.tag)
            reward = score_citations(answer.text, task)
            answer = prompt.read(answer.text)
            row |= {
                "reward": reward,
                "answer_given": answer.text,
                "cited": answer.cited,
                "invented": answer.invented,
                "unsupported": [
                    {"text": claim.text, "cited": claim.cited, "missing": missing}
                    for claim, missing in find_unsupported(answer, prompt.sources)
                ],
                "cited_right": any(right.intersection(prompt.sources[n - 1].passages) for n in answer.cited),
            }
    table = {language: measures(rows, language) for language in sorted({row["language"] for row in rows})}
    for name in dict.fromkeys(chain.from_iterable(table.values())):
        found = [(language, numbers[name]) for language, numbers in table.items() if name in numbers]
        cells = (
            f"{language} {value}" if isinstance(value, int) else f"{language} {value:.3f}" for language, value in found
        )
        print(f"{name:<44}" + "   ".join(cells))
    if arguments.output_file:
        settings = {name: getattr(arguments, name) for name in ("chunk_size", "chunk_overlap", "num_passages")}
        settings |= {
            name: getattr(arguments, name)
            for name in ("min_confidence", "sim_model_name", "min_similarity", "rerank_model_name", "min_relevance")
        }
        result = {"settings": settings, "measures": table, "questions": rows}
        Path(arguments.output_file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output_file, json.dumps(result, ensure_ascii=False, indent=1))


def measures(rows: list[dict[str, Any]], language: str) -> dict[str, float]:
    """Measures for the questions in one language; shares are from 0 to 1.

    A hit is a passage of the correct file and page that contains the evidence. MRR is the mean of 1 / its rank, or 0
    if it is not found at all.
    """
    rows = [row for row in rows if row["language"] == language]
    groups = {
        "answerable": [row for row in rows if row["file"]],
        "unanswerable": [row for row in rows if not row["file"]],
        "answers": [row for row in rows if "answer_given" in row],
    }
    for name in ("answerable", "unanswerable"):
        groups[f"{name}, held out"] = [row for row in groups[name] if is_held_out(row["question"])]
    unknown = UNKNOWN[language]
    groups["citing"] = [row for row in groups["answers"] if row["cited"] or row["invented"]]

    def share(group: str, is_so: Callable[[dict[str, Any]], float]) -> float:
        return sum(map(is_so, groups[group])) / len(groups[group])

    numbers: dict[str, float] = {f"questions, {group}": len(groups[group]) for group in ("answerable", "unanswerable")}
    if groups["answerable"]:
        numbers["hit@1"] = share("answerable", lambda row: row["rank"] == 1)
        numbers["hit@5"] = share("answerable", lambda row: (row["rank"] or 6) <= 5)
        numbers["MRR"] = share("answerable", lambda row: 1 / row["rank"] if row["rank"] else 0)
        numbers["answerable, wrongly refused"] = share("answerable", lambda row: not row["asked"])
        if groups["answerable, held out"]:
            numbers["answerable, wrongly refused, held out"] = share(
                "answerable, held out", lambda row: not row["asked"]
            )
    if groups["unanswerable"]:
        numbers["unanswerable, refused"] = share("unanswerable", lambda row: not row["asked"])
        if groups["unanswerable, held out"]:
            numbers["unanswerable, refused, held out"] = share("unanswerable, held out", lambda row: not row["asked"])
    if groups["answers"]:
        for name, verdict in (("answerable", "wrongly refused"), ("unanswerable", "refused")):
            if groups[name]:
                refused = share(name, lambda row: not row["asked"] or unknown in row["answer_given"])
                numbers[f"{name}, {verdict}, model included"] = refused
        numbers["answers that cite"] = share("answers", lambda row: bool(row["cited"] or row["invented"]))
        numbers["answers that cite a correct passage"] = share("answers", lambda row: row["cited_right"])
        numbers["reward `citations` of the answers"] = share("answers", lambda row: row["reward"])
    if groups["citing"]:
        numbers["of those that cite: all citations exist"] = share("citing", lambda row: not row["invented"])
    groups["checked"] = [row for row in groups["citing"] if row["cited"]]
    if groups["checked"]:
        numbers["of those that cite a source: found there"] = share("checked", lambda row: not row["unsupported"])
    return numbers


def serve_page(collection: Collection, arguments: FileArguments) -> None:
    """Serve the page until the process is stopped.

    Raises:
        UserError: the address cannot be listened on, or other people would have access without a password.
    """
    # Gradio takes seconds to import.
    from medicalgpt.serving.batchers import batcher_from
    from medicalgpt.serving.page import launch, serve
    from medicalgpt.serving.uploads import Uploads
    from medicalgpt.serving.web import auth_from

    auth = auth_from(arguments)
    engine = engine_from(arguments)
    check_template(engine.tokenizer, arguments.template_name)
    batcher = batcher_from(engine, arguments)
    uploads = Uploads(arguments.max_upload_bytes)
    try:
        page = build_page(batcher, collection, uploads, arguments)
        url = launch(page, arguments, auth, uploads, documents.Limits().input_bytes, panel="files")
        logger.info(f"Open {url} in a browser. Ctrl-C ends the program.")
        serve(batcher)
    finally:
        batcher.close(finish=False)
        uploads.close()


def build_page(batcher: "Batcher", collection: Collection, uploads: "Uploads", arguments: FileArguments) -> "gr.Blocks":
    """Upload, ask, read the answer and its sources. A visitor's files and turns are only in the visitor's session."""
    from medicalgpt.rag.file_page import cited_turn, lay_out_files, list_files, show_passages
    from medicalgpt.serving.chat_panel import ChatPanel, Progress, lay_out_header
    from medicalgpt.serving.page import MAX_EVENTS, note_on, visitor_of
    from medicalgpt.serving.prompts import PromptReader

    import gradio as gr

    # By their names: where they are on this machine is nobody's business.
    collection = collection.with_short_names()
    shared = list(dict.fromkeys(passage.file for passage in collection.passages))
    prompts, sampling = PromptReader(arguments.max_prompt_chars), sampling_from(arguments)
    title = "MedicalGPT: your files"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        # The uploads of a session, and the collection of these and --files.
        uploaded, mine = gr.State([]), gr.State(None)
        with gr.Column(elem_id="main"):
            lay_out_header(arguments.model_name_or_path, "files")
            panel = ChatPanel(arguments.lang, about="about_files", empty="empty_files")
        files = lay_out_files(documents.SUFFIXES, shared)

        def take(paths: list[str] | None, had: list[Passage]) -> tuple[None, list[Passage], Collection, str]:
            size = {"size": arguments.chunk_size, "overlap": arguments.chunk_overlap}
            passages, lines = take_uploads(paths or [], had, uploads.release, encoding=arguments.encoding, **size)
            own = list(dict.fromkeys(passage.file for passage in passages))
            return None, passages, collection.with_more(passages), list_files([*shared, *own], lines[len(own) :])

        async def answer(
            visitor: gr.Request, language: str, said: list[dict[str, Any]], searched: Collection | None
        ) -> AsyncIterator[Progress]:
            prompts.check(said)
            history, question = history_of(said[:-1]), said[-1]["content"]
            client = visitor_of(visitor)
            growing = answer_visitor(batcher, sampling, searched or collection, arguments, history, question, client)
            async with aclosing(growing):
                async for text, prompt, done in growing:
                    turn = {"role": "assistant", "content": text, "below": ""}
                    updates = {}
                    if prompt is None:
                        turn["unasked"] = True
                    elif done is not None:
                        turn = cited_turn(prompt.read(done.text), prompt.sources, len(said), language)
                        updates = {files.passages: show_passages([*said, turn])}
                    yield Progress(turn, note_on(done, language), updates)

        panel.connect(page, answer, [mine], [files.passages])
        private = {"api_visibility": "private"}
        outputs = [files.upload, uploaded, mine, files.listing]
        # Each upload starts a child process for each file.
        files.upload.upload(take, [files.upload, uploaded], outputs, concurrency_limit=2, **private)
        files.remove.click(lambda: (None, [], None, list_files(shared, [])), None, outputs, **private)
    return page.queue(max_size=MAX_EVENTS, api_open=False)


def history_of(said: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The turns as messages, without those for which the model was not asked: it would imitate such answers."""
    return [
        {"role": turn["role"], "content": turn["content"]}
        for asked, given in zip(said[::2], said[1::2], strict=False)
        if not given.get("unasked")
        for turn in (asked, given)
    ]


async def answer_visitor(
    batcher: "Batcher",
    sampling: Sampling,
    collection: Collection,
    arguments: FileArguments,
    history: Sequence[dict[str, str]],
    question: str,
    client: str,
) -> AsyncIterator[tuple[str, GroundedPrompt | None, Answer | None]]:
    """Yield the text so far, its prompt, and the answer at the end. Both are None if the model is not asked."""
    from medicalgpt.serving.page import stream

    found = await asyncio.to_thread(collection.search, search_query(question, history))
    prompt = await asyncio.to_thread(ground, batcher.engine, sampling, collection, arguments, found, history, question)
    if prompt is None:
        yield UNKNOWN[language_of(question)], None, None
        return
    request = GenerationRequest(prompt.prompt_ids, sampling, client=client)
    async with aclosing(stream(batcher, request, arguments.request_timeout)) as growing:
        async for text, done in growing:
            yield prompt.read(text if done else finished(text)).text, prompt, done


if __name__ == "__main__":
    run_main(main)
