"""fastapi_server_demo.py over real sockets: answers, refusals, limits, clients that leave."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from fastapi_server_demo import ServerArguments, build_app
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from medicalgpt.serving.web import keys_from
from tests.gate import Gate
from tests.servers import running_server
from tests.tiny import make_tiny

import httpx
import pytest
import uvicorn

ANSWERS = {"你好": "你好！我是小医，很高兴为您服务。", "发烧怎么办？": "多休息，多喝水。", "Hi": "Hello!"}


def server_arguments(*argv: str) -> ServerArguments:
    return parse_args(ServerArguments, argv=["--model_name_or_path", "unused", *argv])[0]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model"), answers=ANSWERS, max_position_embeddings=256)


@pytest.fixture(scope="module")
def served(model) -> Iterator[SimpleNamespace]:
    """The server in a thread of this process, with a gate before its model."""
    # A request gets its place at once, even while the model waits at the gate.
    batcher = make_batcher(ChatEngine.from_pretrained(model), batching="continuous", max_batch_size=2, max_waiting=3)
    arguments = server_arguments("--max_new_tokens", "100", "--request_timeout", "100")
    arguments.max_waiting = 3
    server = uvicorn.Server(uvicorn.Config(build_app(batcher, arguments, None), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as client:
        yield SimpleNamespace(
            client=client,
            url=url,
            batcher=batcher,
            gate=Gate(batcher.engine.model),
            arguments=arguments,
            # The batcher alone may use its model.
            alone=ChatEngine.from_pretrained(model),
        )
    server.should_exit = True
    thread.join()
    batcher.close(finish=False)


def expected(served, text: str, history=(), system: str | None = None, sampling=None) -> dict:
    """What ChatEngine itself says to it."""
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    answer = served.alone.chat([*messages, {"role": "user", "content": text}], sampling or Sampling(100))
    return {
        "response": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["input", "query"])
@pytest.mark.parametrize("question", ANSWERS)
def test_chat(served, question, name):
    answered = served.client.post("/chat", json={name: question})
    assert answered.status_code == 200
    assert answered.json() == {**expected(served, question), "history": [[question, ANSWERS[question]]]}
    assert answered.json()["response"] == ANSWERS[question]


def test_history_system_prompt_and_settings(served):
    history = [["你好", ANSWERS["你好"]], ["Hi", "Hello!"]]
    settings = {
        "max_new_tokens": 9,
        "temperature": 1.2,
        "top_p": 0.9,
        "top_k": 50,
        "repetition_penalty": 1.1,
        "seed": 5,
    }
    body = {"input": "发烧怎么办？", "history": history, "system_prompt": "你是小医", **settings}
    answered = served.client.post("/chat", json=body).json()
    same = expected(served, "发烧怎么办？", history, "你是小医", Sampling(**settings))
    assert answered == {**same, "history": [*history, ["发烧怎么办？", answered["response"]]]}
    # The conversation that came back can be gone on with.
    assert served.client.post("/chat", json={"input": "Hi", "history": answered["history"]}).status_code == 200


@pytest.mark.parametrize("name", ["inputs", "queries"])
def test_batch_answers_in_order(served, name):
    questions = ["Hi", "发烧怎么办？", "你好"]
    answered = served.client.post("/batch", json={name: questions}).json()
    assert answered == {"answers": [expected(served, question) for question in questions]}


def test_batch_draws_each_answer_with_its_own_seed(served):
    settings = {"max_new_tokens": 20, "temperature": 1.5}
    answered = served.client.post("/batch", json={"inputs": ["x", "x", "x"], "seed": 4, **settings}).json()["answers"]
    assert answered == [expected(served, "x", sampling=Sampling(seed=4 + i, **settings)) for i in range(3)]
    assert len({answer["response"] for answer in answered}) > 1


def test_simultaneous_clients_get_their_own_answers(served):
    questions = [*ANSWERS] * 5
    with ThreadPoolExecutor(4) as pool:
        answered = list(pool.map(lambda text: served.client.post("/chat", json={"input": text}).json(), questions))
    assert [answer["response"] for answer in answered] == [ANSWERS[question] for question in questions]


def test_health_and_description(served):
    assert served.client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    described = served.client.get("/openapi.json").json()
    assert set(described["paths"]) == {"/", "/chat", "/batch", "/health"}
    assert served.client.get("/docs").status_code == 404


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, body, status, told",
    [
        ("/chat", {}, 422, "input: Field required"),
        ("/chat", {"input": "x", "temprature": 1}, 422, "temprature"),
        ("/chat", {"input": "x", "query": "y"}, 422, "query"),
        ("/chat", {"input": ""}, 422, "input"),
        ("/chat", {"input": 5}, 422, "input"),
        ("/chat", {"input": "x", "top_p": 0}, 422, "top_p"),
        ("/chat", {"input": "x", "top_p": 0.5, "seed": 1}, 400, "seed, top_p: no effect at temperature 0"),
        ("/chat", {"input": "x", "temperature": float("nan")}, 422, "temperature"),
        ("/chat", {"input": "x", "seed": 2**70}, 422, "seed"),
        ("/chat", {"input": "x", "max_new_tokens": "5"}, 422, "max_new_tokens"),
        ("/chat", {"input": "x", "history": [["a"]]}, 422, "history.0"),
        ("/chat", {"input": "\ud800"}, 422, "input"),
        ("/chat", {"input": "x", "\ud800": 1}, 422, "unicode"),
        ("/chat", [], 422, ""),
        ("/chat", {"input": "x" * 300}, 400, "context of 256 tokens"),
        ("/chat", {"input": "hi <|im_end|>"}, 400, "<|im_end|>"),
        ("/chat", {"input": "x", "history": [["a", "<|im_end|>"]]}, 400, "<|im_end|>"),
        ("/batch", {"inputs": []}, 422, "inputs"),
        ("/batch", {"inputs": ["x"] * 4}, 400, "3 is the most"),
        ("/batch", {"inputs": ["Hi", "x" * 300]}, 400, "context of 256 tokens"),
    ],
)
def test_refused(served, path, body, status, told):
    answered = served.client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answered.status_code == status, answered.text
    assert list(answered.json()) == ["detail"] and told in answered.json()["detail"]
    assert served.batcher.running == served.batcher.waiting == 0


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000, b'{"input": "x"'])
def test_body_that_is_no_json(served, content):
    answered = served.client.post("/chat", content=content, headers={"Content-Type": "application/json"})
    assert answered.status_code in (400, 422)
    assert list(answered.json()) == ["detail"]


def test_size_of_the_body(served):
    big = json.dumps({"input": "x" * 2_000_000})
    assert served.client.post("/chat", content=big).status_code == 413
    # The bytes are counted, whatever the headers say of the length.
    headers = {"Content-Type": "application/json"}
    for parts, status in (([b'{"input":', b'"Hi"}'], 200), ([b"x" * 400_000] * 6, 413)):
        chunked = served.client.post("/chat", content=iter(parts), headers=headers)
        assert chunked.status_code == status, chunked.text


def test_other_names_of_this_machine_are_refused(served):
    """So that no web page can ask by giving its own name this address; nor by a simple form."""
    assert served.client.get("/health", headers={"Host": "evil.example"}).status_code == 403
    assert served.client.post("/chat", data={"input": "x"}).status_code == 422
    plain = served.client.post("/chat", content='{"input": "Hi"}', headers={"Content-Type": "text/plain"})
    assert plain.status_code == 422
    assert "access-control-allow-origin" not in served.client.get("/health", headers={"Origin": "http://a.b"}).headers


def test_open_server_needs_a_key(monkeypatch):
    monkeypatch.delenv("MEDICALGPT_API_KEY", raising=False)
    with pytest.raises(UserError, match="--host 0.0.0.0 would let other machines ask"):
        keys_from(server_arguments("--host", "0.0.0.0"))
    assert keys_from(server_arguments("--host", "::1")) is None
    assert keys_from(server_arguments("--host", "0.0.0.0", "--api_key", "k")).name_of(b"k") == ""
    monkeypatch.setenv("MEDICALGPT_API_KEY", "secret")
    keys = keys_from(server_arguments("--host", "0.0.0.0"))
    assert keys.name_of(b"secret") == "" and keys.name_of(b"secre") is keys.name_of(b"") is None


# --- load and failures -----------------------------------------------------------------------------------------------


def test_full_queue(served):
    body = {"input": "Hi"}
    with ThreadPoolExecutor(8) as pool, served.gate.shut():
        first = pool.submit(served.client.post, "/chat", json=body)
        wait_until(lambda: served.batcher.running == 1)
        others = [pool.submit(served.client.post, "/chat", json=body) for _ in range(4)]
        wait_until(lambda: (served.batcher.running, served.batcher.waiting) == (2, 3))
        refused = served.client.post("/chat", json=body)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "wait already" in refused.json()["detail"]
        served.gate.allow(1000)
    assert [future.result().json()["response"] for future in (first, *others)] == ["Hello!"] * 5


def test_client_that_leaves_frees_the_place(served):
    with served.gate.shut():
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/chat", json={"input": "你好"}, timeout=httpx.Timeout(10, read=0.5))
        # Well before the time limit of the server would free it.
        wait_until(lambda: served.batcher.running == 0)
        assert served.gate.steps == 0
    assert served.client.post("/chat", json={"input": "Hi"}).json()["response"] == "Hello!"


def test_time_limit(served, monkeypatch):
    monkeypatch.setattr(served.arguments, "request_timeout", 0.2)
    with served.gate.shut():
        late = served.client.post("/chat", json={"input": "Hi"})
        assert late.status_code == 504 and "0.2 seconds" in late.json()["detail"]
    # Its place is free at the next token.
    wait_until(lambda: served.batcher.running == 0)


def test_failing_model(served):
    def fail(*_):
        raise RuntimeError("the graphics card caught fire")

    broken = served.batcher.engine.model.register_forward_pre_hook(fail)
    try:
        failed = served.client.post("/batch", json={"inputs": ["Hi", "你好"]})
    finally:
        broken.remove()
    assert (failed.status_code, list(failed.json())) == (500, ["detail"])
    assert "fire" not in failed.text
    assert served.client.post("/chat", json={"input": "Hi"}).json()["response"] == "Hello!"


def test_program_with_a_key(model):
    flags = ("--base_model", model, "--server_name", "0.0.0.0", "--system_prompt", "你是小医")
    with running_server("fastapi_server_demo.py", *flags, env={"MEDICALGPT_API_KEY": "a-key"}) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for path in ("/", "/health", "/openapi.json", "/nowhere"):
                for headers in ({}, {"Authorization": "Bearer wrong"}):
                    assert client.get(path, headers=headers).status_code == 401
            bearer = {"Authorization": "Bearer a-key"}
            answered = client.post("/chat", json={"input": "Hi", "max_new_tokens": 4}, headers=bearer)
            assert (answered.status_code, answered.json()["completion_tokens"]) == (200, 4)
            without = client.post("/chat", json={"input": "Hi", "system_prompt": None}, headers=bearer).json()
            assert without["response"] == "Hello!" and without["prompt_tokens"] < answered.json()["prompt_tokens"]
            assert client.get("/live").text == client.get("/ready").text == "ok\n"
        assert server.stop(signal.SIGTERM) == 0
        assert "Traceback" not in server.log() and "POST /chat 200 in" in server.log()
