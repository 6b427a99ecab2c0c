"""Question answering over documents (PDF, DOCX, HTML, Markdown, plain text), with file and page as sources.

    python chatpdf.py --model_name_or_path outputs-sft --files report.pdf notes/ --query "When is the next check?"
    python chatpdf.py --model_name_or_path outputs-sft --files notes/ --interactive
    python chatpdf.py --model_name_or_path outputs-sft --page True
    python chatpdf.py --files notes/ --search "blood pressure in the morning"
    python chatpdf.py --evaluate

Files are split into passages along headings and sentences. The passages that share most with the question, weighed by
BM25, are put before the question, and the model is told to answer from them alone and to cite them. `--sim_model_name`
adds a model of sentence embeddings; both rankings are then fused. When no passage has enough of the question's words,
the answer is that nothing was found, and the model is not asked.

What was read of a file is kept in the user's cache folder until the file changes or is gone; uploads are not kept.

--search shows passages, --evaluate measures how often the right one is found; both need no model. With one, --evaluate
also checks the citations. --page True serves a page on http://127.0.0.1:8081 to which a visitor can upload files.
"""

import asyncio
import dataclasses
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medicalgpt.args import ChatArguments, PageArguments
from medicalgpt.errors import UserError, run_main
from medicalgpt.evaluation.citations import check_answer, show_answer
from medicalgpt.files import refuse_overwriting, write_atomically
from medicalgpt.formats.terms import language_of
from medicalgpt.logs import heartbeat, setup_logging
from medicalgpt.parser import parse_args
from medicalgpt.rag import documents
from medicalgpt.rag.documents import read_document
from medicalgpt.rag.grounding import (
    UNKNOWN,
    GroundedPrompt,
    Thresholds,
    build_prompt,
    build_sources,
    format_passages,
    format_sources,
    indent,
    is_relevant,
    search_query,
)
from medicalgpt.rag.questions import Question, judge_answer, make_tasks, measures, read_questions
from medicalgpt.rag.retrieval import (
    Collection,
    DocumentStore,
    Embedder,
    Passage,
    Reranker,
    SearchResult,
    find_documents,
    split,
)
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.engines import engine_from
from medicalgpt.serving.generation import GenerationRequest, Sampling, sampling_from
from medicalgpt.serving.terminal import print_answer, print_note, read_lines
from template import check_template

import numpy as np
from loguru import logger

if TYPE_CHECKING:
    from medicalgpt.serving.batchers import Batcher

    import gradio as gr


SAMPLES = Path(__file__).resolve().parent / "data" / "rag"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medicalgpt" / "chatpdf"
MODES = ("query", "interactive", "search", "evaluate", "make_tasks", "page")
ANSWERS_AT_A_TIME = 8
FILES_OF_A_VISITOR = 20
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
    make_tasks: str | None = field(
        default=None,
        metadata={
            "help": "Write rows for GRPO with the reward `citation` to this new .jsonl file: the questions of "
            "--evaluate, with the passages found for them."
        },
    )
    page: bool = field(default=False, metadata={"help": "Serve a web page with uploads.", "aliases": ["--webui"]})
    questions: str | None = field(
        default=None,
        metadata={"help": "Questions for --evaluate and --make_tasks, a .jsonl file like data/rag/questions.jsonl."},
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
    min_terms: float = field(
        # This and --min_coverage were chosen on data/rag/questions.jsonl, to refuse at most 5% of the questions that
        # have an answer.
        default=1.25,
        metadata={
            "help": "Say that nothing was found if the best passage has less than this weight of the question's words, "
            "where a rare word counts 1, and less than --min_coverage of them. 0: always ask the model."
        },
    )
    min_coverage: float = field(
        default=0.6,
        metadata={
            "help": "Share of the question's words, weighted by rarity, with which the best passage is enough whatever "
            "--min_terms says. 0: always ask the model."
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
        metadata={"help": "Cross-encoder for sentence-transformers; it sorts the best passages again."},
    )
    min_rerank_score: float | None = field(
        default=None,
        metadata={
            "help": "With --rerank_model_name: say that nothing was found if its best score is below this, whatever "
            "words the passages have. --evaluate prints the value for your questions. The scale differs between "
            "models, so there is no default."
        },
    )
    index_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which passages and embeddings of --files are cached, readable only by their owner. "
            "Default: medicalgpt/chatpdf in the user's cache folder (~/.cache)."
        },
    )
    port: int = field(
        default=8081, metadata={"help": "Port to listen on; 0 takes a free one.", "aliases": ["--server_port"]}
    )


def main() -> None:
    (arguments,) = parse_args(FileArguments, description=__doc__, program="chatpdf.py")
    setup_logging()
    mode = choose_mode(arguments)
    sampling = sampling_from(arguments)
    questions = questions_for(arguments) if mode in ("evaluate", "make_tasks") else []
    collection = read_collection(arguments)
    if mode == "page":
        return serve_page(collection, arguments)
    if mode == "make_tasks":
        return write_tasks(collection, questions, arguments)
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
            "choose exactly one of --query TEXT, --interactive, --search TEXT, --evaluate and --page True "
            f"(found: {found})."
        )
    (mode,) = modes
    only = {
        ("evaluate", "make_tasks"): {"questions"},
        ("evaluate",): {"output_file", "overwrite_output_file"},
        ("page",): names_of(PageArguments) - names_of(ChatArguments),
    }
    problems = [
        f"--{name} has no effect without --{' or --'.join(owners)}; omit it."
        for owners, names in only.items()
        for name in sorted(names & given)
        if mode not in owners
    ]
    if mode == "make_tasks" and arguments.model_name_or_path:
        problems.append("--model_name_or_path has no effect with --make_tasks; omit it.")
    if mode in ("evaluate", "search", "make_tasks") and not arguments.model_name_or_path:
        problems += [f"--{name} has no effect without a model; omit it." for name in sorted(unused_flags(mode) & given)]
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
    if not 0 <= arguments.min_coverage <= 1:
        problems.append(f"--min_coverage is {arguments.min_coverage}, it must be from 0 to 1.")
    if arguments.min_terms < 0:
        problems.append(f"--min_terms is {arguments.min_terms}, it must be at least 0.")
    if arguments.min_rerank_score is not None and not arguments.rerank_model_name:
        problems.append("--min_rerank_score has no effect without --rerank_model_name; omit it.")
    if arguments.min_rerank_score is not None:
        lexical = ("min_terms", "min_coverage", "min_similarity")
        problems += [f"--{name} has no effect with --min_rerank_score; omit it." for name in lexical if name in given]
    if arguments.min_similarity is not None and not arguments.sim_model_name:
        problems.append("--min_similarity has no effect without --sim_model_name; omit it.")
    if arguments.temperature == 0 and mode != "make_tasks":
        problems += [
            f"--{name} has no effect at --temperature 0." for name in ("top_p", "top_k", "seed") if name in given
        ]
    if problems:
        raise UserError("\n  ".join(problems))
    return mode


def unused_flags(mode: str) -> set[str]:
    """Flags that have no effect in a mode without a model."""
    unused = names_of(ChatArguments) - {"cache_dir"}
    if mode == "make_tasks":
        least = {"min_terms", "min_coverage", "min_similarity", "min_rerank_score"}
        return (unused | least) - {"seed"}
    return unused | ({"num_passages"} if mode == "evaluate" else set())


def thresholds(arguments: FileArguments) -> Thresholds:
    return Thresholds(arguments.min_terms, arguments.min_coverage, arguments.min_similarity, arguments.min_rerank_score)


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
) -> GroundedPrompt | None:
    """The prompt for a question with the passages found; None if these are not relevant enough to ask the model."""
    if not is_relevant(found, thresholds(arguments)):
        return None
    sources = build_sources(collection, found, arguments.num_passages, arguments.num_expand_context_chunk)
    return build_prompt(engine, sampling, arguments.system_prompt, history, question, sources)


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
    language = language_of(question)

    def show(answer: str, is_complete: bool) -> str:
        return show_answer(check_answer(answer, prompt.sources), language, only_whole=not is_complete)

    answer = print_answer(engine, GenerationRequest(prompt.prompt_ids, sampling), show)
    print("", *format_sources(check_answer(answer, prompt.sources), prompt.sources, language), sep="\n", flush=True)
    return show(answer, True)


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
    more = "" if found.similarity is None else f", largest similarity {found.similarity:.2f}"
    more += "" if found.rerank_score is None else f", rerank score {found.rerank_score:.3f}"
    is_enough = is_relevant(found, thresholds(arguments))
    verdict = "a model would be asked" if is_enough else "the answer would be that nothing was found"
    print_note(
        f"the best passage has {found.coverage:.0%} of the question's words, as much as {found.terms:.1f} rare ones"
        f"{more}: {verdict}"
    )
    sources = build_sources(collection, found, arguments.num_passages, arguments.num_expand_context_chunk)
    for number, source in enumerate(sources, start=1):
        print(f"[{number}] {source.place}\n{indent(source.text)}\n")


def questions_for(arguments: FileArguments) -> list[Question]:
    """Raise UserError if rows are broken, naming all of them, or if --output_file would overwrite something."""
    if arguments.output_file and Path(arguments.output_file).exists() and not arguments.overwrite_output_file:
        raise UserError(f"{arguments.output_file} exists. Choose another file, or add --overwrite_output_file.")
    if arguments.make_tasks and (Path(arguments.make_tasks).exists() or not arguments.make_tasks.endswith(".jsonl")):
        raise UserError(
            f"--make_tasks {arguments.make_tasks} must be the name of a .jsonl file that does not exist yet."
        )
    path = Path(arguments.questions or SAMPLES / "questions.jsonl")
    refuse_overwriting("--output_file", arguments.output_file, {"--questions": path})
    return read_questions(path, arguments.encoding)


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
        asked = is_relevant(found, thresholds(arguments))
        scores = {name: getattr(found, name) for name in ("terms", "coverage", "similarity", "rerank_score")}
        rows.append({**dataclasses.asdict(question), "rank": rank, "asked": asked, **scores})
        if engine and asked:
            prompt = ground(engine, sampling, collection, arguments, found, [], question.question)
            prompts.append((rows[-1], prompt, right))
    if lost:
        logger.warning(
            f"no passage contains the evidence of {len(lost)} questions, which count as not found: {lost[0]} …"
        )
    if prompts:
        with heartbeat(lambda: f"answering {len(prompts)} questions"):
            answers = engine.batch([prompt.prompt_ids for _, prompt, _ in prompts], sampling, ANSWERS_AT_A_TIME)
        for (row, prompt, right), answer in zip(prompts, answers, strict=True):
            row |= judge_answer(answer.text, prompt.sources, right, language_of(row["question"]))
    table = {language: measures(rows, language) for language in sorted({row["language"] for row in rows})}
    for name in dict.fromkeys(chain.from_iterable(table.values())):
        found = [(language, numbers[name]) for language, numbers in table.items() if name in numbers]
        cells = (
            f"{language} {value}" if isinstance(value, int) else f"{language} {value:.3f}" for language, value in found
        )
        print(f"{name:<44}" + "   ".join(cells))
    if arguments.output_file:
        settings = {name: getattr(arguments, name) for name in ("chunk_size", "chunk_overlap", "num_passages")}
        names = (
            "min_terms",
            "min_coverage",
            "sim_model_name",
            "min_similarity",
            "rerank_model_name",
            "min_rerank_score",
        )
        settings |= {name: getattr(arguments, name) for name in names}
        result = {"settings": settings, "measures": table, "questions": rows}
        Path(arguments.output_file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output_file, json.dumps(result, ensure_ascii=False, indent=1))


def write_tasks(collection: Collection, questions: list[Question], arguments: FileArguments) -> None:
    """Write `make_tasks` to the file of --make_tasks, and say how many rows of which kind it has."""
    rows = make_tasks(
        collection, questions, arguments.num_passages, arguments.num_expand_context_chunk, arguments.seed or 0
    )
    path = Path(arguments.make_tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    answerable = sum(bool(row["supporting"]) for row in rows)
    logger.info(f"{path}: {len(rows)} rows, {answerable} with a passage that has the answer; train on them with:")
    print(
        f"python grpo_training.py --model_name_or_path MODEL --train_file_dir {path} --reward_funcs citation "
        "--system_prompt none --output_dir outputs/grpo-citation"
    )


def serve_page(collection: Collection, arguments: FileArguments) -> None:
    """Serve the page until the process is stopped.

    Raises:
        UserError: the address cannot be listened on, or other people would have access without a password.
    """
    # Gradio takes seconds to import.
    from medicalgpt.serving.batchers import batcher_from
    from medicalgpt.serving.page import launch
    from medicalgpt.serving.web import auth_from

    auth = auth_from(arguments)
    engine = engine_from(arguments)
    check_template(engine.tokenizer, arguments.template_name)
    batcher = batcher_from(engine, arguments)
    try:
        page = build_page(batcher, collection, arguments)
        url = launch(page, arguments, auth, max_file_size=documents.Limits().input_bytes)
        logger.info(f"Open {url} in a browser. Ctrl-C ends the program.")
        page.block_thread()
    finally:
        batcher.close(finish=False)


def build_page(batcher: "Batcher", collection: Collection, arguments: FileArguments) -> "gr.Blocks":
    """Upload, ask, read the answer and its sources. A visitor's files and turns are only in the visitor's session."""
    from medicalgpt.serving.page import describe, escape_turns

    import gradio as gr

    sampling = sampling_from(arguments)
    with gr.Blocks(title="MedicalGPT: your files", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        # The uploads of a session, and the collection of these and --files.
        uploaded, mine, turns = gr.State([]), gr.State(None), gr.State([])
        gr.Markdown("## Questions about your files · 文件问答")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=260):
                upload = gr.File(
                    label="Add files · 添加文件",
                    file_count="multiple",
                    file_types=list(documents.SUFFIXES),
                    elem_id="upload",
                )
                listing = gr.Textbox(label="Files · 已读取", interactive=False, lines=4, elem_id="files")
            with gr.Column(scale=3):
                chatbot = gr.Chatbot(label="Conversation · 对话", height="50vh", allow_tags=False, buttons=["copy"])
                question = gr.Textbox(label="Question · 问题", elem_id="question")
                with gr.Row():
                    send = gr.Button("Send · 发送", variant="primary", elem_id="send")
                    clear = gr.Button("Clear · 清空", elem_id="clear")
                sources_shown = gr.Textbox(label="Sources · 出处", interactive=False, lines=8, elem_id="sources")

        def take(paths: list[str] | None, had: list[Passage]) -> tuple[None, list[Passage], Collection, str]:
            passages, lines = take_uploads(paths or [], had, arguments)
            return None, passages, collection.with_more(passages), "\n".join(lines)

        async def ask(
            asked: str, said: list[dict[str, str]], files: Collection | None
        ) -> AsyncIterator[dict[gr.Component, Any]]:
            if not asked.strip():
                yield {question: ""}
                return
            now = [*said, {"role": "user", "content": asked}]
            yield {chatbot: escape_turns(now), question: "", sources_shown: ""}
            text, below = "", ""

            def with_answer(text: str) -> list[dict[str, str]]:
                return [*now, {"role": "assistant", "content": text}]

            try:
                answering = answer_visitor(batcher, sampling, files or collection, arguments, said, asked)
                async with aclosing(answering):
                    async for text, below in answering:
                        yield {chatbot: escape_turns(with_answer(text)), sources_shown: below}
                # An answer for which the model was not asked is not part of the conversation.
                said = with_answer(text) if text and below else said
            except Exception as error:
                text, below = text or "…", describe(error)
            yield {turns: said, chatbot: escape_turns(with_answer(text)), sources_shown: below}

        # Each upload starts a child process for each file.
        upload.upload(
            take,
            [upload, uploaded],
            [upload, uploaded, mine, listing],
            concurrency_limit=2,
            api_visibility="private",
        )
        gr.on(
            [send.click, question.submit],
            ask,
            [question, turns, mine],
            [turns, chatbot, question, sources_shown],
            trigger_mode="once",
            concurrency_limit=None,
            api_visibility="private",
        )
        clear.click(
            lambda: ([], [], [], None, "", ""),
            None,
            [turns, chatbot, uploaded, mine, listing, sources_shown],
            api_visibility="private",
        )
    return page.queue(api_open=False)


async def answer_visitor(
    batcher: "Batcher",
    sampling: Sampling,
    collection: Collection,
    arguments: FileArguments,
    history: Sequence[dict[str, str]],
    question: str,
) -> AsyncIterator[tuple[str, str]]:
    """Yield the answer so far, and what is shown below it: its sources at the end, nothing if no model was asked."""
    from medicalgpt.serving.page import stream

    found = await asyncio.to_thread(collection.search, search_query(question, history))
    prompt = ground(batcher.engine, sampling, collection, arguments, found, history, question)
    if prompt is None:
        yield UNKNOWN[language_of(question)], ""
        return
    request, text, language = GenerationRequest(prompt.prompt_ids, sampling), "", language_of(question)
    async with aclosing(stream(batcher, request, arguments.request_timeout)) as growing:
        async for text, _ in growing:
            yield show_answer(check_answer(text, prompt.sources), language, only_whole=True), ""
    checked = check_answer(text, prompt.sources)
    yield show_answer(checked, language), format_passages(checked, prompt.sources, language)


def take_uploads(
    paths: Sequence[str], had: Sequence[Passage], arguments: FileArguments
) -> tuple[list[Passage], list[str]]:
    """Read a visitor's files and delete them. Returns all of the visitor's passages, and messages about them."""
    passages, messages = list(had), []
    for path in map(Path, paths):
        name = safe_name(path.name)
        # A file of the same name replaces the earlier one.
        others = [passage for passage in passages if passage.file != name]
        try:
            if len({passage.file for passage in others}) >= FILES_OF_A_VISITOR:
                raise UserError(f"{name}: at most {FILES_OF_A_VISITOR} files are accepted.")
            document = read_document(path, encoding=arguments.encoding)
            passages = others + split(name, document.units, arguments.chunk_size, arguments.chunk_overlap)
            messages += [f"{name}: {notice}" for notice in document.notices]
        except UserError as error:
            messages.append(str(error).replace(str(path), name))
        finally:
            path.unlink(missing_ok=True)
    return passages, [*dict.fromkeys(passage.file for passage in passages), *messages]


def safe_name(name: str) -> str:
    """A visitor's file name for display: no path, one line, not long. It is never used to open a file."""
    name = re.sub(r"[^\w.() -]", "_", re.split(r"[/\\]", name)[-1])
    return name[-80:].lstrip(". ") or "file"


if __name__ == "__main__":
    run_main(main)
