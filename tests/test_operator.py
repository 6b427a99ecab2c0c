"""What an operator relies on: probes, log lines, request ids, metrics, named keys, TLS, settings, an orderly end."""

import asyncio
import json
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import openai_api
from benchmarks import probes
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from medicalgpt.serving import keys as keys_module
from medicalgpt.serving.batchers import Batcher, QueueFullError, make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Answer
from medicalgpt.serving.keys import ApiKeys, read_keys
from medicalgpt.serving.limits import uvicorn_config
from medicalgpt.serving.server import DrainingServer, check_server_flags
from medicalgpt.serving.server_logs import json_line, request_id_from, text_line
from medicalgpt.serving.web import ProbeMiddleware, bound_socket, client_of
from openai_api import OpenAIArguments, Service, make_app
from tests.gate import Gate
from tests.tiny import make_tiny

import httpx
import pytest
import uvicorn
from loguru import logger

ALICE, BOB = {"Authorization": "Bearer alices-key"}, {"Authorization": "Bearer bobs-key"}
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d [A-Z]+ +\S+ \S+ ")


def until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def serving(batcher: Batcher, keys: ApiKeys | None = None, **flags) -> Iterator[SimpleNamespace]:
    """The API on a real socket, in a thread of this process."""
    arguments = OpenAIArguments(model_name_or_path="tiny", port=0, **flags)
    service = Service(arguments, batcher.engine, batcher, keys)
    with bound_socket(arguments) as listener:
        server = DrainingServer(make_app(service), arguments, batcher=batcher, status=service.status, listener=listener)
        # Its own `run` handles signals, which only the main thread can.
        thread = threading.Thread(target=uvicorn.Server.run, args=[server, [listener]])
        thread.start()
        until(lambda: server.started)
        scheme = "https" if arguments.ssl_certfile else "http"
        url = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=30, verify=arguments.ssl_certfile or True) as client:
                yield SimpleNamespace(client=client, url=url, service=service, server=server, thread=thread)
        finally:
            server.should_exit = True
            thread.join(30)


@pytest.fixture(scope="module")
def batcher(tmp_path_factory) -> Iterator[Batcher]:
    path = make_tiny(tmp_path_factory.mktemp("model"), never_stops=True, max_position_embeddings=4096)
    # A request gets its place at once, even while the model waits at the gate.
    places = {"max_batch_size": 2, "max_waiting": 3}
    with make_batcher(ChatEngine.from_pretrained(path), batching="continuous", **places) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def gate(batcher) -> Gate:
    return Gate(batcher.engine.model)


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.touch(0o600)
    path.write_text("# clients\nalice: alices-key\n\nbob: bobs-key\n")
    return str(path)


@pytest.fixture(scope="module")
def served(batcher, keys_file) -> Iterator[SimpleNamespace]:
    with serving(batcher, ApiKeys(path=keys_file), api_keys_file=keys_file) as served:
        yield served


def body(tokens: int = 3, **fields) -> dict:
    return {"model": "tiny", "prompt": "x", "max_tokens": tokens, **fields}


def value(served, series: str) -> float:
    text = served.client.get("/metrics", headers=ALICE).text
    return sum(map(float, re.findall(rf"^{re.escape(series)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


@contextmanager
def logged(line_format) -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lines.append, format=line_format, level="INFO", backtrace=False, diagnose=False)
    try:
        yield lines
    finally:
        logger.remove(sink)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_probes_need_no_key_and_say_nothing(served, monkeypatch):
    for path in ("/live", "/ready"):
        for host in ({}, {"Host": "10.0.0.7:8000"}):
            answer = served.client.get(path, headers=host)
            assert (answer.status_code, answer.text) == (200, "ok\n")
        assert served.client.head(path).status_code == 200
        assert served.client.post(path).status_code == served.client.get(f"{path}/x").status_code == 401
    assert served.client.get("/health").status_code == 401
    monkeypatch.setattr(served.service.batcher, "failure", None)
    monkeypatch.setattr(type(served.service.batcher), "problem", "The secret of the machine.")
    answer = served.client.get("/ready")
    assert (answer.status_code, answer.text) == (503, "not ready\n")
    assert served.client.get("/live").status_code == 200
    assert served.client.get("/health", headers=ALICE).status_code == 503


def test_probes_below_a_prefix():
    async def status(path: str) -> int | str:
        sent = []

        async def app(scope, receive, send) -> None:
            sent.append({"status": "passed on"})

        async def send(message) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": path, "root_path": "/llm", "headers": []}
        await ProbeMiddleware(app, ready=lambda: True)(scope, None, send)
        return sent[0]["status"]

    assert asyncio.run(status("/llm/live")) == 200 and asyncio.run(status("/llm/v1/live")) == "passed on"


# --- request ids and the log -----------------------------------------------------------------------------------------

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"x-request-id": "abc-1.2:3/4"}, "abc-1.2:3/4"),
        ({"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, TRACE),
        ({"x-request-id": "own", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, "own"),
        ({"x-request-id": "a b", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}, TRACE),
        ({"x-request-id": "x" * 128}, "x" * 128),
        ({"x-request-id": "x" * 129}, None),
        ({"x-request-id": "a\n2026 ERROR"}, None),
        ({"x-request-id": "a\x1b[31m"}, None),
        ({"x-request-id": "a\x85b"}, None),
        ({"x-request-id": ""}, None),
        ({"traceparent": f"00-{'0' * 32}-b7ad6b7169203331-01"}, None),
        ({"traceparent": f"ff-{TRACE}-b7ad6b7169203331-01"}, None),
        ({"traceparent": TRACE}, None),
        ({}, None),
    ],
)
def test_request_ids(headers, expected):
    found = request_id_from({name.encode(): text.encode("latin-1") for name, text in headers.items()})
    assert found == expected if expected else re.fullmatch("req-[0-9a-f]{32}", found)


def test_a_request_is_one_line_with_its_client_route_and_tokens(served):
    with logged(json_line) as lines, logged(text_line) as texts:
        headers = ALICE | {"X-Request-Id": "my-id"}
        answer = served.client.post("/v1/completions?secret=1", json=body(), headers=headers)
        assert answer.headers["x-request-id"] == "my-id"
        served.client.get("/v1/models/what%1Bever", headers=BOB)
        served.client.get("/health", headers=BOB)
        served.client.get("/metrics")
        until(lambda: len(lines) == 3)
    found = [json.loads(line) for line in lines]
    usage = answer.json()["usage"]
    assert (
        found[0].items()
        >= {
            "level": "INFO",
            "request_id": "my-id",
            "client": "alice",
            "method": "POST",
            "route": "/v1/completions",
            "status": 200,
            "prompt_tokens": usage["prompt_tokens"],
            "completion_tokens": usage["completion_tokens"],
        }.items()
    )
    assert 0 < found[0]["seconds"] < 30 and found[0]["time"][10] == "T"
    assert [(each["client"], each["route"], each["status"]) for each in found[1:]] == [
        ("bob", "/v1/models/{model:path}", 404),
        # A wrong key is logged with the address.
        ("127.0.0.1", "other", 401),
    ]
    assert all(LINE.match(text) and text.count("\n") == 1 for text in texts)
    assert "my-id alice POST /v1/completions 200 in" in texts[0] and "secret" not in "".join([*texts, *lines])


FORGERY = "x\n2026-11-30T10:00:00.000+00:00 INFO    id alice forged\r\x1b[2K\x85\u2028{} <red>" + "y" * 100_000


@pytest.mark.parametrize("line_format", [text_line, json_line])
def test_no_line_can_be_forged(line_format):
    with logged(line_format) as lines:
        logger.bind(client="c").info("{}", FORGERY)
        try:
            raise ValueError(FORGERY)
        except ValueError as error:
            logger.opt(exception=error).error("failed")
    for line in lines:
        assert line.endswith("\n") and len(line) < 60_000
        first, *others = line.removesuffix("\n").splitlines()
        if line_format is json_line:
            assert not others and json.loads(first)["level"] in ("INFO", "ERROR")
        else:
            assert LINE.match(first) and all(other.startswith("    ") for other in others)
        assert "\x1b" not in line and "\r" not in line


def test_bytes_on_the_wire_cannot_forge_a_line(served):
    """Control characters in a path and in headers, and a client that a proxy names."""
    with logged(text_line) as lines:
        for headers in (
            {"X-Request-Id": "a\x85b"},
            {"X-Forwarded-For": "evil\x85 2026-11-30T10:00:00.000+00:00 " + "x" * 1000},
        ):
            raw = [(name, text.encode("latin-1")) for name, text in headers.items()]
            assert served.client.get("/v1/%0d%0aINFO", headers=raw).status_code == 401
        until(lambda: len(lines) == 2)
    for line in lines:
        assert LINE.match(line) and len(line.splitlines()) == 1 and len(line) < 400


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_tokens_of_cancelled_answers_are_counted_and_logged(served, batcher, gate):
    before = value(served, "vllm:generation_tokens_total"), value(served, "vllm:request_success_total")
    with logged(json_line) as lines, gate.shut():
        gate.allow(5)
        with served.client.stream("POST", "/v1/completions", json=body(1000, stream=True), headers=ALICE) as answer:
            assert answer.status_code == 200
            until(lambda: value(served, "vllm:num_requests_running") == 1)
            until(lambda: value(served, "vllm:generation_tokens_total") > before[0])
        until(lambda: lines)
        entry = json.loads(lines[0])
        assert 1 <= entry["completion_tokens"] <= 5 and entry["prompt_tokens"] > 0
    until(lambda: not batcher.running)
    assert value(served, "vllm:generation_tokens_total") - before[0] >= entry["completion_tokens"]
    assert value(served, "vllm:request_success_total") == before[1]


def test_names_and_labels_of_the_metrics(served):
    served.client.post("/v1/completions", json=body(), headers=ALICE)
    text = served.client.get("/metrics", headers=ALICE).text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert re.search(rf'^vllm:{name}_seconds_bucket{{le="0.01",model_name="tiny"}} ', text, re.MULTILINE), name
    assert re.search(r'^vllm:request_success_total{finished_reason="length",model_name="tiny"} ', text, re.MULTILINE)
    labels = 'http_request_method="POST",http_response_status_code="200",http_route="/v1/completions"'
    assert f"http_server_request_duration_seconds_count{{{labels}}} " in text
    for name in ("process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"):
        assert re.search(rf"^{name} [\d.e+]+$", text, re.MULTILINE), name
    # Clients cannot make up series.
    for number in range(3):
        served.client.get(f"/made/up/{number}", headers=ALICE)
        served.client.request(f"MADEUP{number}"[:6], "/metrics", headers=ALICE)
    assert "made" not in served.client.get("/metrics", headers=ALICE).text.lower()


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_begins_at_once_and_says_that_it_is_alive(served, gate, monkeypatch):
    monkeypatch.setattr(openai_api, "SECONDS_BETWEEN_COMMENTS", 0.05)
    with gate.shut(), served.client.stream("POST", "/v1/completions", json=body(stream=True), headers=ALICE) as answer:
        # Nothing is generated yet.
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
        assert gate.steps == 0
        gate.allow(1000)
        rest = [line for line in lines if line and line != ": keep-alive"]
    assert all(line.startswith("data: ") for line in rest) and rest[-1] == "data: [DONE]"


def test_what_came_in_the_meantime_is_written_at_once(monkeypatch):
    monkeypatch.setattr(openai_api, "SECONDS_BETWEEN_COMMENTS", 0.1)
    answers, answer = [Future(), Future()], Answer("abde", "stop", 1, 4)
    service = SimpleNamespace(arguments=OpenAIArguments(model_name_or_path="tiny"), seconds_to_wait=lambda: 1)

    async def collect() -> list:
        loop = asyncio.get_running_loop()
        events = asyncio.Queue()
        for event in ((0, "a"), (0, "b"), (1, "c"), (0, "d"), (0, "e")):
            events.put_nowait(event)
        request = SimpleNamespace(receive=lambda: asyncio.sleep(60), scope={"deadline": loop.time() + 60})
        answers[0].set_result(answer)
        loop.call_later(0.25, events.put_nowait, (0, answers[0]))
        loop.call_later(0.27, events.put_nowait, (1, "f"))
        answers[1].set_exception(QueueFullError(3))
        loop.call_later(0.27, events.put_nowait, (1, answers[1]))
        found = []
        with pytest.raises(openai_api.ApiError, match="3 requests wait already"):
            async for pieces in openai_api.received_pieces(service, request, events, 2):
                found.append(pieces)
        return found

    found = asyncio.run(collect())
    assert found[0] == [(0, "ab"), (1, "c"), (0, "de")]
    # While nothing comes there are empty ones, for comments; what comes before an error is not lost.
    assert [] in found[1:] and [piece for pieces in found[1:] for piece in pieces] == [(0, answer), (1, "f")]


# --- keys ------------------------------------------------------------------------------------------------------------


def test_clients_are_the_names_of_their_keys(served, batcher, gate):
    with gate.shut(), ThreadPoolExecutor(4) as pool:
        send = lambda key: pool.submit(served.client.post, "/v1/completions", json=body(), headers=key)  # noqa: E731
        answers = [send(ALICE)]
        until(lambda: batcher.running == 1)
        answers += [send(ALICE), send(BOB)]
        until(lambda: (batcher.running, batcher.waiting) == (2, 1))
        schedule = batcher._schedule
        assert sorted(job.client for job in (*schedule.running, *schedule.waiting)) == ["alice", "alice", "bob"]
        gate.allow(1000)
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
    # A key that all share does not make one client of them.
    assert client_of({"client": ("192.0.2.7", 1), "key_name": ""}) == "192.0.2.7"


def test_keys_change_without_a_restart(tmp_path, monkeypatch, log):
    monkeypatch.setattr(keys_module, "SECONDS_BETWEEN_LOOKS", 0)
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("alice: first")
    keys = ApiKeys("shared", str(path))
    assert [keys.name_of(key) for key in (b"first", b"shared", b"", b"firs")] == ["alice", "", None, None]
    path.write_text("alice: second-one\nbob: third")
    assert [keys.name_of(key) for key in (b"first", b"second-one", b"third")] == [None, "alice", "bob"]
    # A mistake does not lock everybody out, and is said once.
    for broken in ("alice second-one", "bob: shared"):
        path.write_text(broken)
        assert [keys.name_of(key) for key in (b"second-one", b"shared")] == ["alice", ""]
    path.unlink()
    assert [keys.name_of(b"third") for _ in range(3)] == ["bob"] * 3
    errors = [line for line in log if "stay as they were" in line]
    assert len(errors) == 3 and not re.search("first|second-one|third|shared", "".join(errors))
    path.touch(0o600)
    path.write_text("carol: fourth")
    assert keys.name_of(b"fourth") == "carol" and keys.name_of(b"third") is None


def test_all_mistakes_in_a_file_of_keys_are_named_and_no_key_is(tmp_path):
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text("alice: key-1\nno colon\nal ice: key-2\nbob: ke y\nalice: key-3\ncarol: key-1\n: key-4\n")
    with pytest.raises(UserError) as error:
        read_keys(str(path))
    message = str(error.value)
    assert re.findall(r"keys:(\d)", message) == ["2", "3", "4", "5", "6", "7"] and "key-" not in message
    path.write_text("# nobody\n")
    with pytest.raises(UserError, match="no keys"):
        read_keys(str(path))
    path.write_text("alice: key-1\n")
    for mode in (0o644, 0o660, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(UserError, match=f"permissions are {mode:o}.*chmod 600"):
            read_keys(str(path))
    # Groups are how containers and systemd pass secrets on.
    path.chmod(0o440)
    assert read_keys(str(path)) == {"alice": "key-1"}
    with pytest.raises(UserError, match="No such file"):
        read_keys(str(tmp_path / "nothing"))


# --- TLS, proxies, settings ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        try:
            subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no openssl here to make a certificate with")

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("a", "b"):
        extra = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
        openssl("req", "-x509", *new_key, *extra, "-keyout", f"{name}.key", "-out", f"{name}.pem")
    openssl("pkey", "-in", "a.key", "-aes256", "-passout", "pass:x", "-out", "locked.key")
    names = {"certfile": "a.pem", "keyfile": "a.key", "other": "b.key", "locked": "locked.key"}
    return SimpleNamespace(**{name: str(folder / file) for name, file in names.items()})


def test_https(batcher, certificate):
    flags = {"ssl_certfile": certificate.certfile, "ssl_keyfile": certificate.keyfile}
    check_server_flags(OpenAIArguments(model_name_or_path="tiny", **flags))
    with serving(batcher, **flags) as served:
        assert served.client.post("/v1/completions", json=body()).json()["usage"]["completion_tokens"] == 3
        with served.client.stream("POST", "/v1/completions", json=body(stream=True)) as answer:
            assert answer.read().endswith(b"data: [DONE]\n\n")
        # The limits of connections hold within TLS too.
        assert served.client.get("/live", headers={"X": "y" * 60_000}).status_code == 431
        with pytest.raises(httpx.TransportError):
            httpx.get(served.url.replace("https", "http") + "/live")


def test_flags_of_the_server_are_checked_all_at_once(certificate, tmp_path):
    def problem(**flags) -> str:
        with pytest.raises(UserError) as error:
            check_server_flags(OpenAIArguments(model_name_or_path="tiny", **flags))
        return str(error.value)

    message = problem(
        ssl_keyfile="x", root_path="llm/", forwarded_allow_ips="10.0.0.1,*", stop_timeout=-1, max_connections=0
    )
    for part in ("--ssl_keyfile has no effect", "--root_path llm/", "'*' is not", "--stop_timeout is -1", "max_conn"):
        assert part in message
    cert = certificate.certfile
    assert "No such file" in problem(ssl_certfile=str(tmp_path / "none"))
    assert "belong to each other" in problem(ssl_certfile=cert, ssl_keyfile=certificate.other)
    assert "openssl pkey" in problem(ssl_certfile=cert, ssl_keyfile=certificate.locked)


@pytest.mark.parametrize(
    ("trusted", "peer", "client"),
    [
        ("127.0.0.1,::1", "127.0.0.1", "192.0.2.9"),
        ("127.0.0.1,::1", "10.1.2.3", "10.1.2.3"),
        ("10.1.0.0/16", "10.1.2.3", "192.0.2.9"),
        ("10.1.0.0/16", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_only_trusted_proxies_name_clients(trusted, peer, client):
    seen = []

    async def app(scope, receive, send) -> None:
        seen.append((client_of(scope), scope["scheme"]))

    arguments = OpenAIArguments(model_name_or_path="tiny", forwarded_allow_ips=trusted)
    config = uvicorn_config(app, arguments)
    config.load()
    headers = [(b"x-forwarded-for", b"203.0.113.1, 192.0.2.9"), (b"x-forwarded-proto", b"https")]
    scope = {"type": "http", "client": (peer, 1), "scheme": "http", "headers": headers, "asgi": {}}
    asyncio.run(config.loaded_app(scope, None, None))
    assert seen == [(client, "https" if client == "192.0.2.9" else "http")]


def test_a_prefix_that_the_proxy_removes(batcher):
    with serving(batcher, root_path="/llm") as served:
        assert served.client.get("/ready").text == "ok\n"
        assert served.client.post("/v1/completions", json=body()).status_code == 200
        assert served.client.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]
        assert (
            value(
                served,
                'http_server_request_duration_seconds_count{http_request_method="POST",'
                'http_response_status_code="200",http_route="/v1/completions"}',
            )
            == 1
        )


def settings(*argv: str) -> OpenAIArguments:
    argv = ("--model_name_or_path", "tiny", *argv)
    return parse_args(OpenAIArguments, program="openai_api.py", argv=argv, env_prefix="MEDICALGPT_")[0]


def test_settings_from_the_environment(monkeypatch, tmp_path, capsys):
    """A flag counts more than --config, that more than a variable, and that more than the default."""
    config = tmp_path / "server.yaml"
    config.write_text("max_waiting: 7\nmax_batch_size: 5\n")
    for name, text in {
        "PORT": "8001", "MAX_WAITING": "6", "MAX_BATCH_SIZE": "6", "REQUEST_TIMEOUT": "20", "ACCEPT_IMAGES": "True",
        "LORA_MODEL": "", "API_KEY": "top-secret", "AUTH": "user:pass", "PROT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"MEDICALGPT_{name}", text)
    found = settings("--config", str(config), "--max_batch_size", "4")
    assert (found.port, found.max_waiting, found.max_batch_size, found.request_timeout) == (8001, 7, 4, 20)
    assert found.accept_images is True and found.lora_model is None
    # Read where it is needed, and not shown.
    assert found.api_key is None
    shown = "".join(capsys.readouterr())
    assert "MEDICALGPT_PROT is not a setting of this program: did you mean --port?" in shown
    assert "secret" not in shown and "pass" not in shown
    monkeypatch.setenv("MEDICALGPT_PORT", "eight")
    with pytest.raises(SystemExit):
        settings()
    assert "--port" in capsys.readouterr().err
    # Programs that are not servers have none.
    assert parse_args(OpenAIArguments, argv=["--model_name_or_path", "tiny"])[0].port == 8000


def test_no_secret_in_an_error_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        settings("--api_key", "top-secret", "--api_auth", "other-secret", "--nonsense", "1")
    assert "secret" not in capsys.readouterr().err


# --- the end ---------------------------------------------------------------------------------------------------------


def test_draining(batcher, gate):
    """What runs is finished, new requests are refused and told when to come again, and then the server ends."""
    with serving(batcher) as served, ThreadPoolExecutor() as pool, gate.shut():
        running = pool.submit(served.client.post, "/v1/completions", json=body())
        until(lambda: batcher.running == 1)
        served.server.handle_exit(15, None)
        assert served.client.get("/ready").status_code == 503
        assert served.client.get("/live").status_code == served.client.get("/health").status_code == 200
        for _ in range(3):
            refused = served.client.post("/v1/completions", json=body())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert refused.json()["error"]["code"] == "stopping" and "x-request-id" in refused.headers
            time.sleep(0.1)
        assert served.thread.is_alive()
        gate.allow(1000)
        assert running.result().status_code == 200
        served.thread.join(10)
        assert not served.thread.is_alive()


@pytest.mark.parametrize("signals", [1, 2])
def test_draining_has_a_limit_and_a_second_signal_ends_it(batcher, gate, signals):
    with serving(batcher, stop_timeout=0.3 if signals == 1 else 60) as served, ThreadPoolExecutor() as pool:
        with gate.shut():
            running = pool.submit(served.client.post, "/v1/completions", json=body())
            until(lambda: batcher.running == 1)
            for _ in range(signals):
                served.server.handle_exit(15, None)
            answer = running.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "stopping")
        served.thread.join(10)
        assert not served.thread.is_alive()
    until(lambda: not batcher.running)


def test_an_idle_server_ends_at_once(batcher):
    with serving(batcher) as served:
        began = time.monotonic()
        served.server.handle_exit(15, None)
        served.thread.join(10)
        assert not served.thread.is_alive() and time.monotonic() - began < 5


def test_the_benchmark_of_probes_counts_them(served, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "bobs-key")
    found = probes.measure(served.url, clients=0, seconds=0.2)
    assert set(found) == {"/live", "/ready", "/health"}
    assert all(each["number"] > 1 and 0 < each["p50"] <= each["p99"] <= each["max"] for each in found.values())
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(httpx.HTTPStatusError):
        probes.measure(served.url, clients=0, seconds=0.2)
