"""What MedicalGPT's front ends took: a template that is only compared, and a user with a password as the key."""

import asyncio
import base64

from medicalgpt.errors import UserError
from medicalgpt.serving import web
from medicalgpt.serving.keys import ApiKeys
from medicalgpt.serving.web import AccessMiddleware
from template import apply_template, check_template
from tests.tiny import tiny_tokenizer

import pytest
from starlette.responses import PlainTextResponse


@pytest.mark.parametrize("system_prompt", [None, "Answer briefly."])
def test_the_template_of_the_model_may_be_named(system_prompt):
    tokenizer = tiny_tokenizer()
    apply_template(tokenizer, "chatml", system_prompt)
    before = tokenizer.chat_template
    check_template(tokenizer, "chatml")
    check_template(tokenizer, None)
    assert tokenizer.chat_template == before


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_another_template_is_refused(name):
    tokenizer = tiny_tokenizer()
    with pytest.raises(
        UserError, match=f"--template_name {name} is not the chat template saved with the model. Omit it"
    ):
        check_template(tokenizer, name)


def status(header: str | None, key: str) -> int:
    """The status of a request with this Authorization header to a server with this key."""
    sent = []

    async def send(message) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "http.request", "body": b"", "more_body": False}

    app = AccessMiddleware(
        PlainTextResponse("ok"),
        refuse=lambda refusal: PlainTextResponse("", refusal.status_code),
        keys=ApiKeys(key),
        max_body_bytes=lambda scope: 100,
        body_seconds=10,
    )
    headers = [(b"host", b"127.0.0.1")] + ([(b"authorization", header.encode())] if header else [])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


def test_keys_cannot_be_guessed_at_will(monkeypatch):
    """After too many wrong ones an address has to wait, whatever it sends; others do not."""
    monkeypatch.setattr(web, "WRONG_KEYS", 3)
    failures = web.Failures(web.WRONG_KEYS)
    clock = [1000.0]
    monkeypatch.setattr(web.time, "monotonic", lambda: clock[0])
    for _ in range(3):
        failures.check("a")
        failures.add("a")
    failures.check("b")
    with pytest.raises(web.RequestRefused) as refused:
        failures.check("a")
    assert (refused.value.status_code, refused.value.headers) == (429, {"Retry-After": "60"})
    clock[0] += 61
    failures.check("a")
    failures.add("a")
    failures.check("a")
    # Only so many are remembered.
    monkeypatch.setattr(web, "MAX_CLIENTS", 2)
    for client in "cdefg":
        failures.add(client)
    assert len(failures._counts) == 2


@pytest.mark.parametrize(
    ("address", "client"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("a socket", "a socket"),
    ],
)
def test_a_client_is_an_address_or_a_network(address, client):
    assert web.client_of({"client": (address, 1)}) == client
    assert web.client_of({"client": None}) == ""


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (basic("user:password"), 200),
        ("Bearer user:password", 200),
        ("bearer user:password", 200),
        (basic("user:passwort"), 401),
        (basic("user"), 401),
        ("Basic ?", 401),
        ("user:password", 401),
        ("Digest user:password", 401),
        (None, 401),
    ],
)
def test_a_user_with_a_password_is_a_key(header, expected):
    assert status(header, "user:password") == expected


def test_a_key_without_a_user_is_not_taken_from_basic():
    assert status(basic("secret"), "secret") == 401 and status("Bearer secret", "secret") == 200


def test_the_bodies_of_all_requests_together_are_bounded(monkeypatch):
    """Until a request is answered, its images are in memory."""
    monkeypatch.setattr(web, "MAX_BODY_BYTES", 100)
    held = asyncio.Event()

    async def answer(scope, receive, send) -> None:
        await receive()
        await held.wait()

    app = AccessMiddleware(
        answer, refuse=lambda refusal: None, any_host=True, max_body_bytes=lambda scope: 90, body_seconds=10
    )

    async def receive() -> dict:
        return {"type": "http.request", "body": b"x" * 60, "more_body": False}

    async def ask() -> web.RequestRefused:
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        first = asyncio.create_task(app(scope, receive, None))
        await asyncio.sleep(0)
        with pytest.raises(web.RequestRefused) as refused:
            await app(scope, receive, None)
        held.set()
        await first
        await app(scope, receive, None)
        return refused.value

    refused = asyncio.run(ask())
    assert (refused.status_code, refused.code, refused.headers) == (429, "queue_full", {"Retry-After": "5"})
    assert app.bytes_held == 0
