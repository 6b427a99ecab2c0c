"""Who may ask: the same rules for the API, the small server and the page, over IPv4 and IPv6."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import fastapi_server_demo
import gradio_demo
import openai_api
from medicalgpt.serving.batchers import Batcher, make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.page import launch
from medicalgpt.serving.web import bound_socket, is_loopback, url_host
from tests.tiny import make_tiny

import httpx
import pytest
import uvicorn

HOSTS = ["127.0.0.1", "::1"]


@contextmanager
def running(app, arguments) -> Iterator[str]:
    """An application on the socket that its program takes."""
    with bound_socket(arguments) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, args=[[listener]])
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://{url_host(arguments.host)}:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


@contextmanager
def api(batcher: Batcher, host: str) -> Iterator[str]:
    arguments = openai_api.OpenAIArguments(model_name_or_path="tiny", host=host, port=0)
    service = openai_api.Service(arguments, batcher.engine, batcher, None)
    with running(openai_api.make_app(service), arguments) as url:
        yield f"{url}/health"


@contextmanager
def small_server(batcher: Batcher, host: str) -> Iterator[str]:
    arguments = fastapi_server_demo.ServerArguments(model_name_or_path="tiny", host=host, port=0)
    with running(fastapi_server_demo.build_app(batcher, arguments, None), arguments) as url:
        yield f"{url}/health"


@contextmanager
def page(batcher: Batcher, host: str) -> Iterator[str]:
    arguments = gradio_demo.DemoArguments(model_name_or_path="tiny", host=host, port=0)
    blocks = gradio_demo.build_page(batcher, arguments)
    yield launch(blocks, arguments, None)
    blocks.close(verbose=False)


@pytest.fixture(scope="module", params=HOSTS)
def host(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def batcher(tmp_path_factory) -> Iterator[Batcher]:
    with make_batcher(ChatEngine.from_pretrained(make_tiny(tmp_path_factory.mktemp("model")))) as batcher:
        yield batcher


@pytest.fixture(scope="module")
def addresses(batcher, host) -> Iterator[dict[str, str]]:
    """All three without a key, as a user starts them with --host."""
    with ExitStack() as stack:
        yield {front_end.__name__: stack.enter_context(front_end(batcher, host)) for front_end in FRONT_ENDS}


FRONT_ENDS = (api, small_server, page)


@pytest.mark.parametrize("name", [front_end.__name__ for front_end in FRONT_ENDS])
def test_the_printed_address_is_answered_and_another_name_is_refused(addresses, host, name):
    url = addresses[name]
    assert url.startswith(f"http://{url_host(host)}:")
    answered = httpx.get(url, timeout=30)
    assert answered.status_code == 200, answered.text
    # All names of this machine, with and without a port.
    for own in ("127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:1", "localhost:1", "LOCALHOST"):
        assert httpx.get(url, headers={"Host": own}).status_code == 200, own
    for other in ("evil.example", "127.0.0.1.evil.example:80", "[::1].evil.example", "[::2]:80", "10.0.0.1", ""):
        refused = httpx.get(url, headers={"Host": other})
        assert refused.status_code == 403 and "Ask by 127.0.0.1 or localhost" in refused.text, other


@pytest.mark.parametrize(
    "name, expected",
    [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(name, expected):
    assert is_loopback(name) is expected
