"""benchmarks/serve.py: every way in which a server can fail its clients is distinguished and counted."""

import argparse
import asyncio
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from benchmarks import serve
from tests.helpers import read_json, write_jsonl
from tests.tiny import make_tiny

import pytest

ANSWERS = {f"question {number}": f"answer {number}" for number in range(8)}


class Misbehaving(BaseHTTPRequestHandler):
    """Answers correctly, except for the questions in `faults`."""

    protocol_version = "HTTP/1.1"
    faults: dict[str, str] = {}

    def do_GET(self):
        self.reply(200, {"data": [{"id": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][-1]["content"]
        fault = self.faults.get(question)
        text, finish_reason = ANSWERS[question], "stop"
        if fault == "slow":
            time.sleep(1)
        elif fault == "status":
            return self.reply(500, {"error": {"message": "out of memory"}})
        elif fault == "full":
            return self.reply(429, {"error": {"message": "full"}}, {"Retry-After": "0.2"})
        elif fault == "full forever":
            return self.reply(429, {"error": {"message": "full"}})
        elif fault == "other answer":
            text = "answer 7"
        elif fault == "garbled":
            text += "!"
        elif fault == "unfinished":
            finish_reason = "length"
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        if body["stream"]:
            return self.stream(text, finish_reason, usage, fault)
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices":')
            return self.hang_up()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
        self.reply(200, {"choices": [choice], "usage": usage})

    def stream(self, text, finish_reason, usage, fault):
        def event(delta, reason=None):
            return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}

        events = [event({"role": "assistant"}), event({"content": text[:3]}), event({"content": text[3:]})]
        events += [event({}, finish_reason), {"choices": [], "usage": usage}]
        if fault == "dropped":
            events[2:] = [{"error": {"message": "full", "code": "queue_full"}}]
        elif fault == "error":
            events[2:] = [{"error": {"message": "the graphics card caught fire"}}]
        lines = [f"data: {json.dumps(each)}\n\n".encode() for each in events]
        lines += [] if fault in ("no end", "cut") else [b"data: [DONE]\n\n"]
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines[: 2 if fault == "cut" else None]:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
            time.sleep(0.01)
        if fault == "cut":
            return self.hang_up()
        self.wfile.write(b"0\r\n\r\n")

    def reply(self, status, body, headers=None):
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(content)

    def hang_up(self):
        self.wfile.flush()
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(serve, "SETTLING", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def case(question):
    return serve.Case([{"role": "user", "content": question}], ANSWERS[question], "stop")


def measured(server, questions, **options):
    """The summary of one client, who begins with the first of the questions."""
    options = {"seconds": 0.5, "stream_share": 0.5, "kill_share": 0.0, "timeout": 30.0, "attacks": False, **options}
    args = argparse.Namespace(url=server, max_new_tokens=8, seed=0, **options)
    cases = [[case(question) for question in questions], *([case(each)] for each in ANSWERS if each not in questions)]
    return asyncio.run(serve.measure(server, None, cases, args))


@pytest.mark.parametrize("streamed", [0.0, 1.0])
@pytest.mark.parametrize(
    "fault, kind, detail",
    [
        ("status", "error", "500: "),
        ("full forever", "error", "429: "),
        ("other answer", "mixed up", "'answer 7' (stop) instead of 'answer 1' (stop)"),
        ("garbled", "wrong", "'answer 1!' (stop) instead of 'answer 1' (stop)"),
        ("unfinished", "wrong", "'answer 1' (length) instead of 'answer 1' (stop)"),
        ("cut", "lost", "RemoteProtocolError"),
        ("no end", "lost", "the stream ended without [DONE]"),
        ("error", "error", "the graphics card caught fire"),
        ("slow", "lost", "ReadTimeout"),
    ],
)
def test_a_fault_is_seen_and_told(server, monkeypatch, fault, kind, detail, streamed):
    if fault in ("no end", "error") and not streamed:
        pytest.skip("only a stream can end like this")
    monkeypatch.setattr(Misbehaving, "faults", {"question 1": fault})
    timeout = 0.5 if fault == "slow" else 30.0
    found = measured(server, ["question 1"], seconds=0.05, stream_share=streamed, timeout=timeout)
    bad = {each: found[each] for each in serve.BAD if found[each]}
    assert set(bad) == {kind}
    assert found["correct"] > 0
    assert any(each.startswith(f"{kind}: ") and detail in each for each in found["details"])


def test_without_faults_all_is_right_and_counted(server):
    found = measured(server, ["question 0", "question 1"])
    assert found["correct"] == found["requests"] > 20
    assert found["details"] == {}
    assert found["tokens_per_second"] == pytest.approx(5 * found["requests_per_second"])
    assert 0 < found["first_text"]["p50"] < found["latency"]["p50"] <= found["latency"]["p95"] < found["seconds"]


def test_who_is_turned_away_waits_as_long_as_the_server_says(server, monkeypatch):
    monkeypatch.setattr(Misbehaving, "faults", dict.fromkeys(ANSWERS, "full"))
    found = measured(server, ["question 0"], seconds=0.5)
    # Eight clients, which come again after 0.2 and 0.4 seconds.
    assert found["refused"] == found["requests"]
    assert 8 <= found["requests"] <= 3 * 8


def test_who_is_dropped_in_a_stream_is_turned_away(server, monkeypatch):
    monkeypatch.setattr(serve, "WAIT_AFTER_STREAM", "0.2")
    monkeypatch.setattr(Misbehaving, "faults", dict.fromkeys(ANSWERS, "dropped"))
    found = measured(server, ["question 0"], seconds=0.5, stream_share=1.0)
    assert found["refused"] == found["requests"]
    assert 8 <= found["requests"] <= 3 * 8


def test_clients_that_hang_up_are_told_from_lost_requests(server, monkeypatch):
    monkeypatch.setattr(Misbehaving, "faults", {"question 0": "slow"})
    found = measured(server, ["question 0"], seconds=1.0, kill_share=1.0)
    assert found["killed"] > 0
    assert found["killed"] + found["correct"] == found["requests"]


def test_the_numbers_of_a_few_requests_by_hand():
    outcomes = [serve.Outcome("correct", seconds=second, tokens=10) for second in (1.0, 2.0, 3.0)]
    outcomes += [serve.Outcome("correct", seconds=4.0, first=0.5, tokens=30), serve.Outcome("killed", seconds=9.0)]
    outcomes += [serve.Outcome("wrong", seconds=9.0, tokens=50, detail="x")] * 2
    found = serve.summary(outcomes, 10.0)
    assert (found["requests"], found["correct"], found["wrong"], found["killed"]) == (7, 4, 2, 1)
    assert (found["requests_per_second"], found["tokens_per_second"]) == (0.4, 6.0)
    assert found["latency"]["p50"] == 2.5 and found["first_text"]["p50"] == 0.5
    assert found["details"] == {"wrong: x": 2}


@pytest.mark.slow
def test_openai_api_under_load(tmp_path, monkeypatch, capsys):
    """The whole of it, as it is called, with clients that hang up, while the server is attacked."""
    rows = [{"question": text, "answer": "-"} for text in ("你好", "头痛怎么办？", "Is it a cold?", "咳", "ab", "Why?")]
    flags = ["--model", make_tiny(tmp_path / "model"), "--questions", write_jsonl(tmp_path / "rows.jsonl", rows)]
    flags += ["--clients", "2", "--prompts", "2", "--seconds", "1", "--kill_share", "0.5", "--max_new_tokens", "16"]
    flags += ["--attacks"]
    flags += ["--output_file", str(tmp_path / "out" / "serve.json")]
    monkeypatch.setattr(serve, "SETTLING", 0.0)
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    serve.main()
    found = read_json(tmp_path / "out" / "serve.json")["servers"]["openai_api.py"]
    assert found["correct"] > 0
    assert found["correct"] + found["killed"] + found["refused"] == found["requests"]
    assert found["attacks"]["many prompts: 400"] > 0 and found["health"]["p50"] > 0
    assert found["tokens_per_second"] > 0 and found["memory_mb"]["peak"] >= found["memory_mb"]["before"] > 100
    assert (
        f"| openai_api.py | {found['requests']} | 0 | 0 | 0 | 0 | {found['refused']} | {found['killed']} | "
        in capsys.readouterr().out
    )


def test_too_few_different_answers_are_told(tmp_path):
    model = make_tiny(tmp_path / "model")
    rows = [{"question": "Hello", "answer": "Hello"}] * 4
    args = serve.parse_args(["--model", model, "--questions", write_jsonl(tmp_path / "rows.jsonl", rows)])
    with pytest.raises(SystemExit, match="1 questions with different answers, and 128 are needed"):
        serve.prepare(args)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", "no/such"], "is not a model. bash scripts/run_pipeline.sh creates outputs/sft-merged"),
        (["--url", "http://x", "--vllm_flags=--x"], "it starts neither openai_api.py nor vLLM"),
        (["--pid", "3"], "--pid is for --url"),
    ],
)
def test_impossible_flags_are_refused(tmp_path, capsys, flags, message):
    (tmp_path / "config.json").touch()
    with pytest.raises(SystemExit):
        serve.parse_args(["--model", str(tmp_path), *flags])
    assert message in capsys.readouterr().err
