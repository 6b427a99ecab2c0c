"""What the pages say is true: links lead somewhere, commands parse, flags exist, shown output is what comes out."""

import argparse
import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from docs import build_training_params
from medicalgpt.errors import UserError
from medicalgpt.refusals import ACCEPTED, CPU_ONLY, IMPLIES, QUOTIENTS, REFUSED, RENAMED, RENAMED_VALUES, SUMS
from tests.docs import Parsed, code_blocks, start
from tests.helpers import run_program

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("data/*.md")])
TWINS = sorted(page for page in PAGES if page.stem.endswith("_zh"))
GUIDES = [page for page in PAGES if page.parent.name != "data"]
PROGRAMS = sorted(ROOT.glob("*.py"))
# Flags of programs that are not ours.
# Of torchrun, accelerate and ruff, docker, and vLLM.
FOREIGN_FLAGS = {"--nproc_per_node", "--fix", "--config_file", "--num_processes", "--build-arg"}
FOREIGN_FLAGS |= {"--chat-template", "--enable-auto-tool-choice", "--tool-call-parser"}
# Of libraries, and of the tests that a script starts.
LIBRARY_VARIABLES = {"HF_ENDPOINT", "CUDA_VISIBLE_DEVICES", "VLLM_VENV", "PIP_INDEX_URL", "PYTORCH_ENABLE_MPS_FALLBACK"}
# Pages whose commands follow each other, and the folders that `bash scripts/run_pipeline.sh` leaves.
FROM_THE_PIPELINE = ("learning_path.md", "learning_path_zh.md", "quickstart.md", "quickstart_zh.md")
PIPELINE_FOLDERS = {f"outputs/{name}" for name in ("tiny-base", "pt", "sft", "sft-merged", "dpo", "dpo-merged")}
OUTPUT_FLAGS = {"--output_dir", "--output_file"}
# Translated idioms, and second words for a thing that has one. The word list of CONTRIBUTING.md says what to write.
FORBIDDEN_CHINESE = (
    "另一条路",
    "小的也听得见",
    "攒住",
    "几率比",
    "胜算比",
    "令牌",
    "词元",
    "GPU 内存",
    "图形内存",
    "比率对数",
    "检查站",
)
FORBIDDEN_ENGLISH = (
    r"\banew\b",
    r"\bis no (adapter|model|flag)\b",
    r"\bby heart\b",
    r"\bin so many words\b",
    r"\bsigns? of life\b",
    r"\bturned away\b",
)
BROKEN_ROWS = """\
{"conversations": [{"from": "human", "value": "感冒了怎么办？"}, {"from": "gpt", "value": "多休息，多喝水。"}]}
{"conversations": [{"from": "human", "value": "发烧要去医院吗？"}, {"from": "gpt", "value": ""}]}
{"conversations": [{"from": "gpt", "value": "你好！"}, {"from": "human", "value": "你好"}]}
{"instruction": "高血压怎么办？", "outptu": "低盐饮食。"}
{"prompt": "头痛怎么办？", "response": "先休息。"
"""


@cache
def flags_of(program: Path) -> frozenset[str]:
    """All flags of a program, today's and older spellings."""
    found = []
    try:
        start(program, [], lambda parser, args: found.extend(parser._option_string_actions))
    except Parsed:
        pass
    older = {*RENAMED, *RENAMED_VALUES} if "--config" in found else set()
    return frozenset(found) | {f"--{name}" for name in older}


def commands(page: Path) -> list[list[str]]:
    """The commands in the bash blocks of a page, and those in its text that are one of our programs, as words."""
    lines = [line for language, text in code_blocks(page) if language == "bash" for line in _joined(text)]
    spans = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|bash|torchrun) [^`]+)`", _without_code(page))
    return [words for line in [*lines, *spans] if (words := shlex.split(line, comments=True))]


def _without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def all_commands(suffix: str) -> list:
    """Each command that runs one of our files with this suffix (.py or .sh), once."""
    found = {
        tuple(words): pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
        for page in PAGES
        for words in commands(page)
        if any(word.endswith((".py", ".sh")) for word in words) and words[program_at(words)].endswith(suffix)
    }
    return list(found.values())


def program_at(words: list[str]) -> int:
    """Where in a command the file stands that it runs."""
    return next(index for index, word in enumerate(words) if word.endswith((".py", ".sh")))


@pytest.mark.parametrize("words", all_commands(".py"))
def test_commands_parse(words, capsys):
    """The program is there and takes every flag and value; what needs files that only a user has is not run."""
    at = program_at(words)
    program = ROOT / words[at]
    assert program.is_file(), f"there is no {words[at]}"
    original = argparse.ArgumentParser.parse_args
    try:
        start(program, words[at + 1 :], original)
    except Parsed:
        return
    except SystemExit as end:
        assert end.code == 0, capsys.readouterr().err
    else:
        pytest.fail(f"{words[at]} never read its command line")


@pytest.mark.parametrize("words", all_commands(".sh"))
def test_scripts_exist_and_know_what_they_are_given(words):
    at = program_at(words)
    script = ROOT / words[at]
    assert script.is_file(), f"there is no {words[at]}"
    text = script.read_text(encoding="utf-8")
    programs = [program for program in PROGRAMS if program.name in text]
    passed_on = {flag for program in programs for flag in flags_of(program)}
    unknown = [word for word in words[at + 1 :] if word.startswith("--") and word not in text and word not in passed_on]
    assert not unknown, f"{words[at]} does not know {unknown}"
    variables = {word.partition("=")[0] for word in words[:at] if "=" in word} - LIBRARY_VARIABLES
    code = "".join(program.read_text(encoding="utf-8") for program in programs)
    unread = [name for name in variables if f"${{{name}" not in text and f'("{name}"' not in code]
    assert not unread, f"{words[at]} does not read {unread}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_bash_blocks_are_valid_shell(page):
    blocks = "\n".join(text for language, text in code_blocks(page) if language == "bash")
    done = subprocess.run(["bash", "-n"], input=blocks, text=True, capture_output=True, check=False)
    assert not done.stderr, done.stderr


def missing_files(page: Path, made: set[str]) -> list[str]:
    """Paths below outputs/ that no command made before they are read, and paths in the tree that are not there."""
    made, missing = set(made), []
    for words in commands(page):
        for flag, word in zip(["", *words], words, strict=False):
            is_output = flag in OUTPUT_FLAGS or word.startswith("OUT=")
            for path in re.split(r"[,=:]", word.removeprefix("./")):
                if is_output and path != "OUT":
                    made.add(path)
                elif path.startswith("outputs/"):
                    if not any(path == known or path.startswith(f"{known}/") for known in made):
                        missing.append(path)
                elif re.match(r"(data|recipes|scripts|benchmarks|deploy|docs)/\S+$", path):
                    if not (ROOT / path).exists() and not any(path.startswith(known) for known in made):
                        missing.append(path)
    return missing


@pytest.mark.parametrize("page", [ROOT / "docs" / name for name in FROM_THE_PIPELINE], ids=lambda page: page.name)
def test_files_of_commands_exist_or_were_made_before(page):
    """In pages that are followed from top to bottom, after the pipeline."""
    assert not missing_files(page, PIPELINE_FOLDERS)


def test_a_file_that_nothing_makes_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    lines = ("python a.py --output_dir outputs/a --train_file_dir data/none", "python a.py --base outputs/a,outputs/b")
    page.write_text("\n".join(["```bash", *lines, "```", ""]), encoding="utf-8")
    assert missing_files(page, set()) == ["data/none", "outputs/b"]


def test_the_client_that_the_readme_shows_runs_with_what_it_says_to_install():
    """The snippet of the README, against a server of this machine's own that answers as OpenAI's API does."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = [code for language, code in code_blocks(ROOT / "README.md") if language == "python"]
    assert "pip install openai" in text.split(snippet)[0].rpartition("\n\n")[0]
    answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
    answer["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "多休息。"}}]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # noqa: N802 - the name that http.server calls
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    asked = []
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        code = snippet.replace(":8000", f":{server.server_port}")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "多休息。\n", done.stderr
    assert asked[0]["messages"][0]["content"] == "感冒了怎么办？"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_phrase_that_the_word_list_forbids(page):
    if page.name == "CONTRIBUTING.md":
        return
    text = page.read_text(encoding="utf-8")
    forbidden = FORBIDDEN_CHINESE if page.stem.endswith("_zh") else FORBIDDEN_ENGLISH
    found = [phrase for phrase in forbidden if re.search(phrase, text)]
    assert not found, f"{page.name}: see the word list in CONTRIBUTING.md: {found}"


def test_forbidden_phrases_are_in_the_word_list():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert not [phrase for phrase in FORBIDDEN_CHINESE if phrase not in text]


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_flags_that_are_named_exist(page):
    known = {flag for program in PROGRAMS for flag in flags_of(program)} | FOREIGN_FLAGS | {"--debug"}
    older = (
        ACCEPTED,
        CPU_ONLY,
        IMPLIES,
        QUOTIENTS,
        REFUSED,
        RENAMED,
        RENAMED_VALUES,
        *(parts for by in SUMS.values() for parts in by.values()),
    )
    known |= {f"--{name}" for names in older for name in names}
    for script in ROOT.glob("scripts/*.sh"):
        known |= set(re.findall(r"--\w+", script.read_text(encoding="utf-8")))
    for benchmark in ROOT.glob("benchmarks/*.py"):
        known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', benchmark.read_text(encoding="utf-8")))
    spans = "\n".join(re.findall(r"`([^`\n]+)`", _without_code(page)))
    assert not set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", spans)) - known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {link}; headings: {slugs}"


def compared_blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page, of pictures and trees only the lines' shape: their words are translated."""
    return [
        (language, re.sub(r"[\[{|][^\]}|]*[\]}|]", "", text) if language == "mermaid" else text)
        if language != "tree"
        else (language, str(text.count("\n")))
        for language, text in code_blocks(page)
    ]


@pytest.mark.parametrize("chinese", [page for page in TWINS if page in GUIDES], ids=lambda page: page.name)
def test_twins_are_parallel(chinese):
    english = chinese.with_name(chinese.name.replace("_zh", ""))
    assert compared_blocks(english) == compared_blocks(chinese)
    levels = [
        [len(marks) for marks in re.findall(r"^(#+) ", _without_code(page), flags=re.MULTILINE)]
        for page in (english, chinese)
    ]
    assert levels[0] == levels[1]
    tables = [len(re.findall(r"^\|", _without_code(page), flags=re.MULTILINE)) for page in (english, chinese)]
    assert tables[0] == tables[1]


def test_the_error_that_the_readme_shows_is_the_one_that_comes(tmp_path):
    (tmp_path / "my_data").mkdir()
    (tmp_path / "my_data" / "train.jsonl").write_text(BROKEN_ROWS, encoding="utf-8")
    done = run_program("validate_jsonl.py", "--file_path", "my_data/train.jsonl", folder=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stdout + done.stderr in [text for _, text in code_blocks(ROOT / "README.md")]


def test_the_measures_that_the_guide_shows_are_those_that_come(tmp_path):
    done = run_program("chatpdf.py", "--evaluate", "--index_dir", tmp_path)
    assert done.stdout in [text for _, text in code_blocks(ROOT / "docs" / "chatpdf.md")]


def test_each_test_of_a_silent_failure_is_on_its_page():
    page = (ROOT / "docs" / "silent-failures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d\d) \| .+ \| (.+) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    named = {(number, name) for number, tests in rows for name in re.findall(r"`(test_\w+\.py)`", tests)}
    files = {(path.name.split("_")[2], path.name) for path in (ROOT / "tests" / "silent").glob("test_sf_*.py")}
    assert named == files
    for path in re.findall(r"`(tests/test_\w+\.py)`", page):
        assert (ROOT / path).is_file(), path


def test_the_page_of_flags_is_current():
    page = build_training_params.PAGE.read_text(encoding="utf-8")
    assert page == build_training_params.render(), "run: python -m docs.build_training_params"


def test_a_stale_page_of_flags_is_noticed(tmp_path, monkeypatch):
    stale = tmp_path / "training_params.md"
    stale.write_text(build_training_params.render().replace("`--lora_rank`", "`--lora_r`"), encoding="utf-8")
    monkeypatch.setattr(build_training_params, "PAGE", stale)
    monkeypatch.setattr(sys, "argv", ["docs/build_training_params.py", "--check"])
    with pytest.raises(UserError, match="Run: python -m docs.build_training_params"):
        build_training_params.main()
    monkeypatch.setattr(sys, "argv", ["docs/build_training_params.py"])
    build_training_params.main()
    assert "`--lora_rank`" in stale.read_text(encoding="utf-8")
