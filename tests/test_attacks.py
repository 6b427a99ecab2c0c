"""One visitor must not stop the others: attacks on live servers, each of which is answered, and the others with it."""

import io
import json
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import SimpleNamespace
from urllib.parse import urlsplit

from medicalgpt.errors import UserError
from medicalgpt.serving.page import serve
from tests.helpers import ROOT
from tests.servers import Server, running_server
from tests.tiny import make_tiny

import httpx
import psutil
import pytest

CONNECTIONS = 24
LIMITS = ["--max_connections", CONNECTIONS, "--header_timeout", 2, "--body_timeout", 3, "--max_prompt_chars", 3000]
QUEUE = ["--max_batch_size", 2, "--max_waiting", 3, "--max_new_tokens", 8]
PROGRAMS = {
    "api": ["openai_api.py", "--max_tokens_limit", 100_000],
    "small": ["fastapi_server_demo.py"],
    "page": ["gradio_demo.py"],
    "files": ["chatpdf.py", "--page", "True", "--auth", "li:secret", "--max_upload_bytes", 40_000],
}
HEALTH = {"api": "/health", "small": "/health", "page": "/", "files": "/"}
MB = 1_000_000


class Servers:
    """The programs on one model, each started when it is needed."""

    def __init__(self, model: str, stack: ExitStack):
        self.model = model
        self.stack = stack
        self.running: dict[str, Server] = {}

    def start(self, name: str) -> None:
        script, *flags = PROGRAMS[name]
        context = running_server(
            script, "--model_name_or_path", self.model, *flags, *QUEUE, *LIMITS, health=HEALTH[name]
        )
        self.running[name] = self.stack.enter_context(context)

    def __getitem__(self, name: str) -> Server:
        if name not in self.running:
            self.start(name)
        return self.running[name]


@pytest.fixture(scope="module")
def servers(tmp_path_factory) -> Iterator[Servers]:
    model = make_tiny(tmp_path_factory.mktemp("model"), never_stops=True, max_position_embeddings=200_000)
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = Servers(model, stack)
        list(pool.map(servers.start, ("api", "small", "files")))
        yield servers


# The page is served as the files are, so it is tried with them only in the slow tests.
@pytest.fixture(params=["api", "small", "files", pytest.param("page", marks=pytest.mark.slow)])
def server(servers, request) -> Server:
    server = servers[request.param]
    yield server
    # Whatever was done to it, it serves.
    assert healthy(server)


def healthy(server: Server) -> bool:
    name = "/health" if "Serving" in server.log() else "/"
    return httpx.get(server.url + name, timeout=60).status_code == 200


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=60)


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    found = b""
    try:
        while piece := connection.recv(65536):
            found += piece
    except ConnectionError:
        pass
    return found


def until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def send_until_closed(connection: socket.socket, piece: bytes, most: int) -> int:
    """How much the other side takes, at most `most` bytes."""
    sent = 0
    try:
        while sent < most:
            connection.sendall(piece)
            sent += len(piece)
    except ConnectionError:
        pass
    return sent


# --- connections -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "opening, piece",
    [
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ", b"x" * 65536),
        (b"GET /", b"x" * 65536),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"X: y\r\n" * 10_000),
    ],
    ids=["header", "url", "headers"],
)
def test_headers_without_end(server, opening, piece):
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    with connect(server) as connection:
        connection.sendall(opening + piece)
        assert received(connection).startswith(b"HTTP/1.1 431 ")
    with connect(server) as connection:
        connection.sendall(opening)
        send_until_closed(connection, piece, 40 * MB)
    assert memory().rss - before < 20 * MB


@pytest.mark.parametrize("chunk", [b"0\r\n", b"1;"], ids=["trailers", "extension of a chunk"])
def test_what_surrounds_a_body_without_end(servers, chunk):
    server = servers["api"]
    memory = psutil.Process(server.process.pid).memory_info
    before = memory().rss
    with connect(server) as connection:
        connection.sendall(b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk)
        send_until_closed(connection, b"X: " + b"y" * 65536, 40 * MB)
    assert memory().rss - before < 20 * MB
    assert healthy(server)


@pytest.mark.parametrize("part", [b"", b"GET /health HTTP/1.1\r\nHost: loc"], ids=["idle", "half of a header"])
def test_connection_that_does_not_go_on(server, part):
    with connect(server) as connection:
        connection.sendall(part)
        assert received(connection)[:13] == (b"HTTP/1.1 408 " if part else b"")


def test_slow_header(servers):
    """A byte now and then does not prolong it."""
    with connect(servers["small"]) as connection, pytest.raises(ConnectionError):
        connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        for _ in range(600):
            connection.sendall(b"x")
            time.sleep(0.1)


def test_body_that_does_not_go_on(server):
    path = {"openai_api.py": "/v1/completions", "fastapi_server_demo.py": "/chat"}.get(
        server.process.args[1].rpartition("/")[2], "/login"
    )
    kind = "application/x-www-form-urlencoded" if path == "/login" else "application/json"
    with connect(server) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\na".encode()
        )
        assert received(connection).startswith(b"HTTP/1.1 408 ")


def test_more_connections_than_places(server):
    """Those that wait make room; the honest ones that come later are answered."""
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server)) for _ in range(3 * CONNECTIONS)]
        for connection in connections[::2]:
            # Those that came first have made room already.
            with suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: loc")
        assert healthy(server)
        assert psutil.Process(server.process.pid).num_fds() < 3 * CONNECTIONS


def test_all_places_taken_by_answers(servers):
    server = servers["api"]
    body = json.dumps({"model": "model0", "prompt": "x", "max_tokens": 100_000}).encode()
    name = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    body = body.replace(b"model0", name.encode())
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with ExitStack() as stack:
        # Two run and three wait; the others are refused at once, so they are sent a body that does not end yet.
        for _ in range(5):
            connection = stack.enter_context(connect(server))
            connection.sendall(head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.5)
        for _ in range(CONNECTIONS - 5):
            connection = stack.enter_context(connect(server))
            connection.sendall(head + b"Content-Length: 99\r\n\r\n{")
        assert healthy(server)


def test_number_of_open_files_is_the_limit():
    """`ulimit -n` is lower than --max_connections."""
    program = (
        "from medicalgpt.serving import arguments, limits\n"
        "print(limits.connection_limits(arguments.ServeArguments('x')).connections)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)),
    )
    assert 100 < int(done.stdout) < 192, done.stderr
    assert "--max_connections 1000: only" in done.stderr and "ulimit -n is 256" in done.stderr


# --- requests --------------------------------------------------------------------------------------------------------


def ask(server: Server, body: dict, path: str = "/v1/completions", **options) -> httpx.Response:
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    return httpx.post(server.url + path, json={"model": model, **body}, timeout=120, **options)


@pytest.mark.parametrize(
    "body, told",
    [
        ({"prompt": "x", "stop": "a" * 1001}, "stop: String should have at most 1000 characters"),
        ({"prompt": "x", "stop": "a" * 1_900_000}, "stop: String should have at most 1000 characters"),
        ({"prompt": "x" * 3001}, "3001 characters, and at most 3000"),
        ({"prompt": ["x" * 2000, "y" * 2000]}, "4000 characters, and at most 3000"),
        ({"prompt": ["x"] * 100_000}, "prompt: it has 100000 items, at most 1024"),
        ({"prompt": ["x"] * 1000}, "1000 answers; this server takes at most 5"),
        ({"prompt": [None] * 300_000}, "prompt: it has 300000 items, at most 1024"),
        ({"prompt": "x", "y" * 1_900_000: 1}, "unknown field"),
        ({"prompt": "x", "logit_bias": {str(i): "" for i in range(100_000)}}, "logit_bias: it has 100000 items"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_too_much_is_refused_before_it_is_read(servers, body, told):
    answer = ask(servers["api"], body)
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]
    assert len(answer.content) < 2000


@pytest.mark.parametrize(
    "body, told",
    [
        ({"messages": [{}] * 200_000}, "more than 100000 lists and objects"),
        ({"messages": [{}] * 50_000}, "messages: it has 50000 items"),
        ({"messages": [{"role": "user", "content": [{}] * 50_000}]}, "it has 50000 items"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{}] * 50_000}, "tools: it has 50000 items"),
        ({"messages": [{"role": "user", "content": "x" * 3000}] * 2}, "characters, and at most 3000"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_chats_that_are_too_much(servers, body, told):
    answer = ask(servers["api"], body, "/v1/chat/completions")
    assert answer.status_code == 400 and told in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "path, body, status, told",
    [
        ("/chat", {"input": "x" * 3001}, 400, "characters, and at most 3000"),
        ("/chat", {"input": "x", "history": [["a"]] * 50_000}, 422, "history"),
        ("/chat", {"input": "x", "history": [[]] * 300_000}, 400, "more than 100000 lists and objects"),
        ("/batch", {"inputs": [1] * 600_000}, 422, "inputs"),
        ("/chat", {"input": "x" * 3_000_000}, 413, "more than 2000000 bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_small_server_too(servers, path, body, status, told):
    answer = httpx.post(servers["small"].url + path, json=body, timeout=120)
    assert answer.status_code == status and told in answer.json()["detail"] and len(answer.text) < 1000


def counted(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    # Of all models; a name with labels is one series.
    found = re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def test_client_that_leaves_is_counted_and_leaves_no_trace_in_the_log(servers):
    """Its tokens too, and a body that it has cut off is not a mistake in the body."""
    server = servers["api"]
    status = (
        'http_server_request_duration_seconds_count{http_request_method="POST",http_response_status_code="%d",'
        'http_route="/v1/completions"}'
    )
    before = counted(server, "vllm:generation_tokens_total")
    left, wrong = counted(server, status % 499), counted(server, status % 400)
    with pytest.raises(httpx.ReadTimeout):
        ask_quickly = httpx.Timeout(60, read=2)
        model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
        body = {"model": model, "prompt": "x", "max_tokens": 100_000}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=ask_quickly)
    until(lambda: counted(server, "vllm:num_requests_running") == 0)
    assert counted(server, "vllm:generation_tokens_total") > before
    with connect(server) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 99\r\n\r\n{"
        )
        time.sleep(0.3)
    until(lambda: counted(server, status % 499) == left + 2)
    assert counted(server, status % 400) == wrong
    assert "never retrieved" not in server.log() and "Traceback" not in server.log()


def test_one_client_does_not_keep_the_others_out(servers):
    """It has all places until somebody else comes, who is answered while the first one's answers run."""
    server = servers["api"]
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]

    def occupy(number: int) -> int:
        body = {"model": model, "prompt": "x", "max_tokens": 100_000}
        with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as answer:
            if answer.status_code == 200:
                done.wait(60)
            return answer.status_code

    done = threading.Event()
    with ThreadPoolExecutor(5) as pool:
        greedy = [pool.submit(occupy, number) for number in range(5)]
        until(lambda: counted(server, "vllm:num_requests_waiting") == 3)
        # The limit of a queue holds for the same client, ...
        assert ask(server, {"prompt": "x"}).status_code == 429
        # ... and another one, which a proxy names, is answered.
        answer = ask(server, {"prompt": "x", "max_tokens": 3}, headers={"X-Forwarded-For": "192.0.2.1"})
        assert answer.status_code == 200, answer.text
        done.set()
        assert sorted(future.result() for future in greedy) in ([200] * 4 + [429], [200] * 2 + [429] * 3, [200] * 5)


# --- pages -----------------------------------------------------------------------------------------------------------


def test_page_refuses_long_bodies(servers):
    body = json.dumps({"data": ["x" * 3_000_000], "fn_index": 0, "session_hash": "a"})
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{servers['files'].url}/gradio_api/queue/join", content=body, headers=headers, timeout=60)
    assert answer.status_code == 413


def test_other_sites_may_not_use_the_page(servers):
    """Whatever the Host header is, and with or without a password."""
    for name, host in (("files", "localhost"), ("files", "chat.example.org")):
        url = servers[name].url
        for origin in ("https://evil.example", "null", "http://localhost:1", "https://chat.example.org.evil.example"):
            for method, path in (("GET", "/config"), ("POST", "/gradio_api/upload"), ("OPTIONS", "/gradio_api/upload")):
                headers = {"Host": host, "Origin": origin, "Access-Control-Request-Method": "POST"}
                answer = httpx.request(method, url + path, headers=headers)
                assert answer.status_code == 403, (name, origin, path)
                assert "access-control-allow-origin" not in answer.headers
        own = httpx.get(url, headers={"Host": host, "Origin": f"http://{host}"})
        assert own.status_code == 200
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert httpx.post(f"{url}/gradio_api/queue/join", headers=foreign, json={}).status_code == 403
    assert httpx.get(url, headers=foreign).status_code == 200


def upload(client: httpx.Client, name: str, content: bytes) -> httpx.Response:
    return client.post("/gradio_api/upload", files={"files": (name, io.BytesIO(content))})


def test_uploads_are_bounded_together(servers):
    """By --max_upload_bytes 40000, of which a visitor may have a quarter."""
    url = servers["files"].url
    clients = [httpx.Client(base_url=url, headers={"X-Forwarded-For": f"192.0.2.{n}"}) for n in range(6)]
    for client in clients:
        assert client.post("/login", data={"username": "li", "password": "secret"}).status_code == 200
    first = clients[0]
    assert upload(first, "a.txt", b"a" * 5000).status_code == 200
    full = upload(first, "b.txt", b"b" * 5000)
    assert full.status_code == 507 and "No room" in full.text and full.headers["retry-after"] == "60"
    assert upload(first, "c.txt", b"c" * 50_000).status_code == 507
    codes = [upload(client, f"{n}.txt", bytes([65 + n]) * 8000).status_code for n, client in enumerate(clients[1:])]
    assert codes == [200] * 4 + [507]
    chunked = first.post("/gradio_api/upload", content=iter([b"x"]), headers={"Content-Type": "multipart/form-data"})
    assert chunked.status_code == 411


# The last test of this server: nobody can log in for a while.
def test_passwords_cannot_be_guessed(servers):
    with httpx.Client(base_url=servers["files"].url, headers={"X-Forwarded-For": "198.51.100.7"}) as client:
        codes = [client.post("/login", data={"username": "li", "password": str(n)}).status_code for n in range(30)]
        assert codes == [400] * 10 + [429] * 20
        right = client.post("/login", data={"username": "li", "password": "secret"})
        assert right.status_code == 429 and 1 <= int(right.headers["retry-after"]) <= 60
    # Another client is not affected.
    other = httpx.post(
        f"{servers['files'].url}/login",
        data={"username": "li", "password": "secret"},
        headers={"X-Forwarded-For": "203.0.113.1"},
    )
    assert other.status_code == 200


# --- a model that fails ----------------------------------------------------------------------------------------------

FAILING = """
import sys
from pathlib import Path

sys.path[0] = {root!r}
import torch
from transformers import Qwen3ForCausalLM

forward = Qwen3ForCausalLM.forward


def fail(self, *args, **options):
    if Path({broken!r}).exists():
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return forward(self, *args, **options)


Qwen3ForCausalLM.forward = fail
import {program}

{program}.main()
"""


@pytest.mark.parametrize("program", ["openai_api", pytest.param("fastapi_server_demo", marks=pytest.mark.slow)])
def test_program_ends_if_its_model_does_not_recover(tmp_path, program):
    broken, script = tmp_path / "broken", tmp_path / f"{program}_failing.py"
    script.write_text(FAILING.format(root=str(ROOT), broken=str(broken), program=program))
    model = make_tiny(tmp_path / "model")
    with running_server(str(script), "--model_name_or_path", model, "--max_new_tokens", 4) as server:
        if program == "openai_api":
            assert ask(server, {"prompt": "x"}).status_code == 200
        broken.touch()
        if program == "openai_api":
            assert ask(server, {"prompt": "x"}).status_code == 500
            # It recovers if the fault goes, ...
            broken.unlink()
            until(lambda: ask(server, {"prompt": "x"}).status_code == 200)
            assert healthy(server)
            broken.touch()
            ask(server, {"prompt": "x"})
        else:
            httpx.post(f"{server.url}/chat", json={"input": "x"}, timeout=60)
        # ... and otherwise the process ends, for its supervisor to start another one.
        assert server.process.wait(60) not in (0, None)
        assert "does not recover" in server.log()


def test_page_ends_if_its_model_does_not_recover():
    with pytest.raises(UserError, match="does not recover"):
        serve(SimpleNamespace(failure="The model does not recover."))
    # As long as the model answers, it is served.
    serve(SimpleNamespace(failure=None), seconds=0.3)
