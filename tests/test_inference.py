"""inference.py as a program: one question, files, the terminal. Errors of the command line run in this process."""

import io
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import patch

import inference
from medicalgpt.errors import UserError
from tests import fork_server
from tests.helpers import run_here
from tests.tiny import make_tiny

import pytest
import torch

ROOT = Path(__file__).parent.parent
ANSWERS = {"你好": "你好！我是小医。", "头痛怎么办？": "多休息，多喝水。", "Who?": "小医 am I."}


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("taught"), answers=ANSWERS)


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("endless"), never_stops=True, max_position_embeddings=100_000)


def start(*arguments: object, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, ROOT / "inference.py", *arguments]
    return subprocess.Popen(list(map(str, command)), env=environment, **options)


def run(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
    environment = {**os.environ, **fork_server.FOR_ALL}
    done = fork_server.run([str(ROOT / "inference.py"), *map(str, arguments)], environment, 120, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments)])
    inference.main()


def write_rows(path: Path, rows: list) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- one question ----------------------------------------------------------------------------------------------------


def test_query_prints_the_answer_and_nothing_else(taught):
    code, out, err = run("--base_model", taught, "--query", "头痛怎么办？")
    assert (code, out) == (0, "多休息，多喝水。\n"), err


def test_cut_answer_says_so(taught, monkeypatch, capsys):
    main(monkeypatch, "--model_name_or_path", taught, "--query", "你好", "--max_new_tokens", 6)
    captured = capsys.readouterr()
    assert captured.out == "你好\n"
    assert "cut after 6 tokens" in captured.err


def test_stop_string_ends_the_answer(taught, monkeypatch, capsys):
    main(monkeypatch, "--model_name_or_path", taught, "--query", "头痛怎么办？", "--stop_str", "喝水")
    assert capsys.readouterr().out == "多休息，多\n"


def test_sampling_flags_arrive(endless, monkeypatch, capsys):
    def answer(*more: object) -> str:
        main(monkeypatch, "--model_name_or_path", endless, "--query", "hi", "--max_new_tokens", 40, *more)
        return capsys.readouterr().out

    sampled = answer("--temperature", 1, "--seed", 3)
    assert answer("--temperature", 1, "--seed", 3) == sampled
    greedy = answer()
    assert len({sampled, greedy, answer("--temperature", 1, "--seed", 4), answer("--repetition_penalty", 3)}) == 4
    assert answer("--temperature", 1, "--top_k", 1) == answer("--temperature", 5, "--top_p", 1e-6) == greedy


# --- files -----------------------------------------------------------------------------------------------------------

ROWS = [
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好。"}], "id": 7},
    {"messages": [{"role": "user", "content": "Who?"}]},
    {"instruction": "头痛怎么办？", "input": ""},
    {"prompt": "你好"},
    {"query": "Who?", "response": "Me."},
    {"question": "头痛怎么办？", "answer": "休息。"},
    {"messages": [{"role": "system", "content": "简短"}, {"role": "user", "content": "你好"}]},
]
ASKED = ["你好", "Who?", "头痛怎么办？", "你好", "Who?", "头痛怎么办？"]


def test_data_file_answers_every_row_in_order(taught, tmp_path):
    data, output = write_rows(tmp_path / "in.jsonl", ROWS), tmp_path / "new" / "out.jsonl"
    code, out, err = run(
        "--model_name_or_path", taught, "--data_file", data, "--output_file", output, "--eval_batch_size", 3
    )
    assert (code, out) == (0, ""), err
    assert "7 answers" in err and str(output) in err
    rows = read_rows(output)
    assert len(rows) == len(ROWS)
    assert [row["response"] for row in rows[:6]] == [ANSWERS[question] for question in ASKED]
    assert {row["finish_reason"] for row in rows[:6]} == {"stop"}
    assert [row.get("reference") for row in rows] == ["您好。", None, None, None, "Me.", "休息。", None]
    for row, original in zip(rows, ROWS, strict=True):
        kept = {name: row[name] for name in original if name != "response"}
        assert kept == {name: value for name, value in original.items() if name != "response"}
    assert list(tmp_path.glob("**/*.partial")) == []


def test_text_file_and_many_small_writes(taught, tmp_path, monkeypatch):
    """More rows than are written at once, and one question to a line, blank lines aside."""
    monkeypatch.setattr(inference, "BATCHES_PER_SORT", 1)
    questions = list(ANSWERS) * 3
    data = write_rows(tmp_path / "in.txt", [*questions[:4], "", *questions[4:]])
    output = tmp_path / "out.jsonl"
    main(monkeypatch, "--model_name_or_path", taught, "--data_file", data, "--output_file", output, "--batch_size", 2)
    expected = [{"prompt": question, "response": ANSWERS[question], "finish_reason": "stop"} for question in questions]
    assert read_rows(output) == expected


def test_seeded_answers_do_not_depend_on_grouping(endless, tmp_path, monkeypatch):
    questions = ["one", "two three", "four", "five five five five", "six"]
    data = write_rows(tmp_path / "in.txt", questions)
    found = []
    for batch_size, batches_per_sort in ((1, 1), (2, 1), (5, 16)):
        monkeypatch.setattr(inference, "BATCHES_PER_SORT", batches_per_sort)
        output = tmp_path / f"{batch_size}.jsonl"
        main(
            monkeypatch,
            *("--model_name_or_path", endless, "--data_file", data, "--output_file", output),
            *("--batch_size", batch_size, "--temperature", 1, "--seed", 5, "--max_new_tokens", 20),
        )
        found.append(read_rows(output))
    assert found[0] == found[1] == found[2]
    engine = inference.ChatEngine.from_pretrained(endless)
    for number, question in enumerate(questions):
        sampling = inference.Sampling(max_new_tokens=20, temperature=1, seed=5 + number)
        answer = engine.chat([{"role": "user", "content": question}], sampling)
        assert found[0][number]["response"] == answer.text
    assert len({row["response"] for row in found[0]}) == 5


def test_interrupted_file_keeps_what_was_written(endless, tmp_path, monkeypatch):
    """Ctrl-C during the second write: the first rows are there, under a name that says that they are not all."""
    monkeypatch.setattr(inference, "BATCHES_PER_SORT", 1)
    load, steps = inference.ChatEngine.from_pretrained, iter(range(1000))

    def load_and_interrupt(*arguments, **options):
        engine = load(*arguments, **options)
        engine.model.register_forward_pre_hook(
            lambda *_: signal.raise_signal(signal.SIGINT) if next(steps) == 30 else None
        )
        return engine

    monkeypatch.setattr(inference.ChatEngine, "from_pretrained", load_and_interrupt)
    data, output = write_rows(tmp_path / "in.txt", ["one", "two", "three", "four"]), tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        main(
            monkeypatch,
            *("--model_name_or_path", endless, "--data_file", data, "--output_file", output),
            *("--batch_size", 2, "--max_new_tokens", 20),
        )
    assert not output.exists()
    assert [row["prompt"] for row in read_rows(tmp_path / "out.jsonl.partial")] == ["one", "two"]


def test_model_without_template_is_told_once(tmp_path, monkeypatch):
    model = make_tiny(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    data = write_rows(tmp_path / "in.txt", ["one", "two"])
    with pytest.raises(UserError, match="supervised_finetuning.py") as error:
        main(monkeypatch, "--model_name_or_path", model, "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    assert str(error.value).count("no chat template") == 1


def test_system_prompt_goes_where_there_is_none(tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", [ROWS[0], ROWS[6]])
    arguments = inference.InferenceArguments(model_name_or_path="m", data_file=str(rows), system_prompt="你是小医")
    first, second = inference.read_questions(arguments)
    assert [message["content"] for message in first.messages] == ["你是小医", "你好"]
    assert [message["content"] for message in second.messages] == ["简短", "你好"]


def test_existing_answers_are_not_replaced(taught, tmp_path, monkeypatch):
    data, output = write_rows(tmp_path / "in.txt", ["你好"]), tmp_path / "out.jsonl"
    command = ("--model_name_or_path", taught, "--data_file", data, "--output_file", output)
    for present in (output, tmp_path / "out.jsonl.partial"):
        present.write_text("mine", encoding="utf-8")
        with pytest.raises(UserError, match=f"(?s){present}.*--overwrite_output_file"):
            main(monkeypatch, *command)
        assert present.read_text(encoding="utf-8") == "mine"
        main(monkeypatch, *command, "--overwrite_output_file")
        assert read_rows(output)[0]["response"] == ANSWERS["你好"]
        output.unlink()
    with pytest.raises(UserError, match="would overwrite --data_file"):
        main(monkeypatch, *command[:-1], data, "--overwrite_output_file")
    unfinished = write_rows(tmp_path / "answers.txt.partial", ["你好"])
    with pytest.raises(UserError, match="partial would overwrite --data_file"):
        more = ("--data_file", unfinished, "--output_file", tmp_path / "answers.txt", "--overwrite_output_file")
        main(monkeypatch, "--model_name_or_path", taught, *more)
    assert unfinished.read_text(encoding="utf-8") == data.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is a folder"):
        main(monkeypatch, *command[:-1], tmp_path, "--overwrite_output_file")


def test_broken_rows_are_all_reported_before_the_model_is_loaded(tmp_path, monkeypatch):
    data = write_rows(
        tmp_path / "in.jsonl",
        [
            ROWS[0],
            '{"prompt": "你好"',
            {"text": "a document"},
            {"conversations": [{"from": "wizard", "value": "x"}]},
            {"prompt": ""},
            {"prompt": "x", "finish_reason": "stop"},
            ROWS[1],
        ],
    )
    command = ("--model_name_or_path", "no/such-model", "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    with pytest.raises(UserError) as error:
        main(monkeypatch, *command)
    assert re.findall(r"in\.jsonl:(\d+): ", str(error.value)) == ["2", "3", "4", "5", "6"]
    assert "5 row(s)" in str(error.value)
    write_rows(data, [{"prompt": "x", "finish_reason": "stop"}])
    with pytest.raises(UserError, match="in.jsonl:1: .*would replace.*finish_reason"):
        main(monkeypatch, *command, "--ignore_fields", "finish_reason")
    assert list(tmp_path.iterdir()) == [data]


def test_rows_too_long_for_the_model_are_all_reported(taught, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "in.txt", ["你好", "x" * 600, "Who?", "y" * 700])
    with pytest.raises(UserError) as error:
        main(monkeypatch, "--model_name_or_path", taught, "--data_file", data, "--output_file", tmp_path / "out.jsonl")
    assert re.findall(r"in\.txt:(\d+): .*? (\d+) tokens.*?512", str(error.value)) == [("2", "619"), ("4", "719")]
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("name, content", [("in.jsonl", ""), ("in.csv", "a,b"), ("missing.jsonl", None)])
def test_data_file_that_cannot_be_used(name, content, tmp_path, monkeypatch):
    data = tmp_path / name
    if content is not None:
        data.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(str(data))):
        main(monkeypatch, "--model_name_or_path", "no/such-model", "--data_file", data)


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr("medicalgpt.logs.HEARTBEAT_SECONDS", 0.05)
    sink = inference.logger.add(lambda message: lines.append(message.record["message"]))
    try:
        with inference.progress(10) as advance:
            time.sleep(0.12)
            advance(4)
            time.sleep(0.12)
        ended = len(lines)
        time.sleep(0.12)
    finally:
        inference.logger.remove(sink)
    assert len(lines) == ended
    assert lines[0].startswith("0/10 rows") and lines[-1].startswith("4/10 rows") and "s left" in lines[-1]


# --- several processes -----------------------------------------------------------------------------------------------

QUESTIONS = [f"question {number} {'x' * (number * 7 % 40)}" for number in range(11)]
SAMPLED = ("--temperature", 1, "--seed", 5, "--repetition_penalty", 1.1)
# What two processes are asked: questions and further flags.
SHARED = {"greedy": (QUESTIONS, ()), "sampled": (QUESTIONS, SAMPLED), "one-row": (QUESTIONS[:1], SAMPLED)}
# Longest batches come first, so that the first rows have their answers when the run is interrupted.
CONTINUED = {"continued": (sorted(QUESTIONS, key=len, reverse=True), SAMPLED)}

# Runs inference.main several times in each process, each time with a store of its own, since torchrun's start takes
# longer than all of them. A process holds its first batch until the other one has a batch too. At last the second
# process meets an error, which it reports, and after this one it is killed as soon as there are answers in the file.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import inference
from medicalgpt import errors

rank, generate = os.environ["RANK"], inference.ChatEngine.generate
os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
errors.SECONDS_TO_SPEAK = 0.2

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

def together(engine, requests):
    output = sys.argv[-1]
    with open(f"{output}.took{rank}", "a") as file:
        file.write("a batch")
    if "one-row" not in output:
        wait_for(Path(f"{output}.took{1 - int(rank)}").exists)
    if "killed" in output and rank == "1":
        try:
            errors.fail("the scores of this process are not numbers")
        except SystemExit:
            wait_for(lambda: Path(f"{output}.partial").stat().st_size)
            os.kill(os.getpid(), signal.SIGKILL)
    return generate(engine, requests)

inference.ChatEngine.generate = together
for os.environ["MASTER_PORT"], *argv in json.loads(Path(sys.argv[1]).read_text()):
    sys.argv = ["inference.py", *argv]
    inference.main()
"""


def shared_command(model: str, folder: Path, name: str, output: Path) -> list[object]:
    questions, more = (SHARED | CONTINUED)[name]
    data = write_rows(folder / f"{name}.txt", questions)
    flags = ("--batch_size", 2, "--max_new_tokens", 12, *more)
    return ["--model_name_or_path", model, "--data_file", data, *flags, "--output_file", output]


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def launch(*command: object) -> subprocess.Popen:
    """Under torchrun, in two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(list(map(str, launcher)), env=environment, stderr=subprocess.PIPE, text=True)


def interrupted(command: list[object]) -> list[object]:
    """The command, which one process has begun: it ended in its last batch but one."""
    generate, batches = inference.ChatEngine.generate, iter(range(100))

    def stopping(engine, requests):
        if next(batches) == 4:
            raise KeyboardInterrupt
        return generate(engine, requests)

    with patch.object(inference.ChatEngine, "generate", stopping), pytest.raises(KeyboardInterrupt):
        run_here("inference.py", *command)
    return command


@pytest.fixture(scope="module")
def shared(endless, tmp_path_factory) -> tuple[Path, str]:
    """Where two processes have written their answers, and what they printed.

    One of their runs continues one that was interrupted; in the last one, a process was killed.
    """
    folder = tmp_path_factory.mktemp("shared")
    runs = [shared_command(endless, folder, name, folder / f"{name}.jsonl") for name in SHARED]
    runs.append(interrupted(shared_command(endless, folder, "continued", folder / "continued.jsonl")))
    runs.append(shared_command(endless, folder, "greedy", folder / "killed.jsonl"))
    runs = [[str(free_port()), *map(str, run)] for run in runs]
    (folder / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    (folder / "driver.py").write_text(DRIVER, encoding="utf-8")
    process = launch(folder / "driver.py", folder / "runs.json", ROOT)
    try:
        printed = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 1, printed
    return folder, printed


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_write_the_file_of_one(name, shared, endless, tmp_path, monkeypatch):
    folder, printed = shared
    alone = tmp_path / "alone.jsonl"
    main(monkeypatch, *shared_command(endless, tmp_path, name, alone))
    assert (folder / f"{name}.jsonl").read_bytes() == alone.read_bytes(), printed
    # Both have had a part in it, where there is enough for both, and none has done what the other did.
    taken = [path.read_text().count("a batch") for path in folder.glob(f"{name}.jsonl.took*")]
    assert (len(taken), sum(taken)) == ((1, 1) if name == "one-row" else (2, 6))
    assert len({row["response"] for row in read_rows(alone)}) == len(SHARED[name][0])


def test_two_processes_continue_what_one_has_begun(shared, endless, tmp_path, monkeypatch):
    folder, printed = shared
    (begun,) = re.findall(r"continuing after the first (\d+) of 11 answers", printed)
    assert 0 < int(begun) < 11
    main(monkeypatch, *shared_command(endless, tmp_path, "continued", tmp_path / "alone.jsonl"))
    assert (folder / "continued.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes(), printed
    taken = [path.read_text().count("a batch") for path in folder.glob("continued.jsonl.took*")]
    assert len(taken) == 2 and sum(taken) < 6
    assert not list(folder.glob("continued.jsonl.partial*"))


@pytest.mark.slow
def test_a_run_of_which_a_process_was_killed_continues(shared, endless, tmp_path, monkeypatch):
    """As a user starts it again; and other settings are refused, by one message and without waiting."""
    for path in shared[0].glob("killed.jsonl.partial*"):
        shutil.copy(path, tmp_path)
    command = shared_command(endless, tmp_path, "greedy", tmp_path / "killed.jsonl")
    refused = launch(ROOT / "inference.py", *command, "--max_new_tokens", 9)
    printed = refused.communicate(timeout=120)[1]
    assert refused.returncode == 1 and printed.count("differs in max_new_tokens (12)") == 1, printed
    again = launch(ROOT / "inference.py", *command)
    printed = again.communicate(timeout=120)[1]
    assert again.returncode == 0, printed
    main(monkeypatch, *shared_command(endless, tmp_path, "greedy", tmp_path / "alone.jsonl"))
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes(), printed


def test_processes_without_work_are_told(shared):
    assert "1 rows are 1 batch(es) of --batch_size 2, so that 1 of 2 processes have nothing to do" in shared[1]


def test_killed_process_ends_all_and_leaves_no_whole_file(shared):
    folder, printed = shared
    assert "error in process 1: the scores of this process are not numbers" in printed
    assert printed.count("this run was ended (SIGTERM)") == 1 and "SIGKILL" in printed
    partial = folder / "killed.jsonl.partial"
    written = [row["prompt"] for row in read_rows(partial)]
    assert f"the first {len(written)} of {len(QUESTIONS)} answers are in {partial}" in printed
    assert written == QUESTIONS[: len(written)] and len(written) < len(QUESTIONS)
    assert not (folder / "killed.jsonl").exists()


@pytest.mark.parametrize("flags, mode", [(("--query", "x"), "query"), (("--interactive",), "interactive")])
def test_one_question_is_for_one_process(flags, mode, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(UserError, match=f"--{mode} is for one process: start it with python"):
        main(monkeypatch, "--model_name_or_path", "./no/such/model", *flags)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    taken: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    inference.choose_gpu()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes .* 2 GPU.*--nproc_per_node 2"):
        inference.choose_gpu()


# --- choosing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "exactly one of"),
        (("--query", "x", "--interactive"), "--query and --interactive"),
        (("--query", "x", "--data_file", "in.jsonl"), "--query and --data_file"),
        (("--query", "  "), "--query is empty"),
        (("--query", "x", "--output_file", "o", "--batch_size", "2"), "--output_file has no effect.*\n.*--batch_size"),
        (("--query", "x", "--top_p", "0.9", "--seed", "1"), "--top_p has no effect at --temperature 0.*\n.*--seed"),
        (("--query", "x", "--temperature", "-1"), "--temperature is -1.0"),
        (("--data_file", "in.jsonl", "--batch_size", "0"), "--batch_size is 0"),
        (("--query", "x"), "no/such/model"),
    ],
)
def test_wrong_choices(flags, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    with pytest.raises(UserError, match=message):
        main(monkeypatch, "--model_name_or_path", "./no/such/model", *flags)


@pytest.mark.parametrize("flags, message", [(("--qurey", "x"), "--query"), (("--qlora",), "--load_in_4bit")])
def test_unknown_flags(flags, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        main(monkeypatch, "--model_name_or_path", "m", *flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# --- in the terminal -------------------------------------------------------------------------------------------------


def test_conversation_from_a_pipe(taught):
    """Commands work, an error in one turn does not end the program, and /exit leaves what follows unread."""
    lines = ["/help", "你好", "/clear", "Who?", "/clear", "/system 你是小医", "/system", "/nonsense", ""]
    lines += ["x" * 600, "/clear", "/system   ", "/exit", "头痛怎么办？"]
    code, out, err = run(
        "--model_name_or_path", taught, "--interactive", "--max_new_tokens", 60, stdin="\n".join(lines)
    )
    assert code == 0, err
    assert out.splitlines() == [ANSWERS["你好"], ANSWERS["Who?"]]
    assert "/system TEXT" in err and "There is no command /nonsense" in err
    assert err.count("System prompt: 你是小医") == 3
    assert err.count("error: The prompt has") == 1 and "/clear starts again" in err
    assert err.index("/nonsense") < err.index("error: The prompt has")


class Recorder:
    """A ChatEngine that notes what it is asked; the answers are the real engine's."""

    def __init__(self, engine: inference.ChatEngine):
        self.engine = engine
        self.asked: list[list[tuple[str, str]]] = []

    def request(self, messages, sampling):
        self.asked.append([(message["role"], message["content"]) for message in messages])
        return self.engine.request(messages, sampling)

    def stream(self, request):
        return self.engine.stream(request)


def test_history_and_system_prompt_reach_the_model(taught, monkeypatch, capsys):
    engine = Recorder(inference.ChatEngine.from_pretrained(taught))
    turns = ["你好", "x" * 600, "Who?", "/system 短", "头痛怎么办？", "/clear", "你好"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(turns)))
    inference.talk(engine, inference.Sampling(max_new_tokens=20), "长")
    said = capsys.readouterr().out.splitlines()
    # The long turn failed, so it is not part of the conversation.
    first = [("user", "你好"), ("assistant", said[0])]
    second = [("user", "Who?"), ("assistant", said[1])]
    assert [asked for asked in engine.asked if len(asked[-1][1]) < 600] == [
        [("system", "长"), first[0]],
        [("system", "长"), *first, second[0]],
        [("system", "短"), *first, *second, ("user", "头痛怎么办？")],
        [("system", "短"), ("user", "你好")],
    ]


def test_what_was_said_until_ctrl_c_stays_in_the_conversation(endless, monkeypatch, capsys):
    engine = Recorder(inference.ChatEngine.from_pretrained(endless))
    steps = iter(range(1000))
    engine.engine.model.register_forward_pre_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGINT) if next(steps) == 30 else None
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    inference.talk(engine, inference.Sampling(max_new_tokens=200), None)
    captured = capsys.readouterr()
    assert captured.err.count("(stopped)") == 1
    user, (role, said), again = engine.asked[1]
    assert (user, role, again) == (("user", "hello"), "assistant", ("user", "and then?"))
    whole = engine.engine.chat([{"role": "user", "content": "hello"}], inference.Sampling(max_new_tokens=200)).text
    assert 0 < len(said) < len(whole) and whole.startswith(said) and captured.out.startswith(said + "\n")


def test_an_error_in_a_turn_is_told_and_the_turn_left_out(endless, monkeypatch, capsys):
    engine = Recorder(inference.ChatEngine.from_pretrained(endless))
    steps = iter(range(1000))

    def fail_once(*_):
        if next(steps) == 30:
            raise RuntimeError("out of memory")

    engine.engine.model.register_forward_pre_hook(fail_once)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    inference.talk(engine, inference.Sampling(max_new_tokens=50), None)
    assert "error: out of memory" in capsys.readouterr().err
    assert engine.asked[1] == [("user", "and then?")]


class Terminal:
    """A program on a pseudo-terminal: what it shows is collected while it runs."""

    def __init__(self, *arguments: object):
        self.master, slave = pty.openpty()
        self.process = start(*arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.shown = b""
        self.reader = threading.Thread(target=self._collect, daemon=True)
        self.reader.start()

    def _collect(self) -> None:
        try:
            while piece := os.read(self.master, 65536):
                self.shown += piece
        except OSError:
            pass  # Linux reports the other end's closing as an error.

    def wait_for(self, condition, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.process.poll() is None, f"{what}: {self.shown[-2000:]!r}"
            time.sleep(0.02)

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_ctrl_c_stops_an_answer_and_then_leaves_at_the_prompt(endless):
    """On a terminal, without any mode: the conversation starts by itself."""
    with Terminal("--model_name_or_path", endless, "--max_new_tokens", 90_000) as terminal:
        terminal.wait_for(lambda: terminal.shown.endswith(b"> "), "prompt")
        for turn in (1, 2):
            before = len(terminal.shown)
            terminal.type("hello")
            terminal.wait_for(lambda at=before: len(terminal.shown) > at + 100, "answer under way")
            terminal.process.send_signal(signal.SIGINT)
            terminal.wait_for(lambda n=turn: terminal.shown.count(b"(stopped)") == n, "stopped", 10)
            terminal.wait_for(lambda: terminal.shown.endswith(b"> "), "next prompt", 10)
        shown = len(terminal.shown)
        time.sleep(0.2)
        assert len(terminal.shown) == shown
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(timeout=20) == 0
        assert b"Traceback" not in terminal.shown
