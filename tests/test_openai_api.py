"""openai_api.py: OpenAI's own client and plain bytes against live servers; refusals; broken clients; an orderly end."""

import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from urllib.parse import urlsplit

from medicalgpt.errors import UserError
from medicalgpt.models.tool_formats import TOOL_FORMATS
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Sampling
from medicalgpt.serving.served_models import token_bytes, token_text
from openai_api import OpenAIArguments, Service, make_app
from tests.helpers import run_here
from tests.servers import Server, running_server
from tests.tiny import TURN_END, make_tiny

import openai
import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM, AutoTokenizer

KEY = "a-key-that-nobody-may-see"
HELLO = "你好！👩‍⚕️"
FACTS = '{"drug": "布洛芬", "mg": 200}'
LOOK_UP = {
    "type": "function",
    "function": {"name": "look_up", "parameters": {"type": "object", "properties": {"word": {"type": "string"}}}},
}
OTHER = {"type": "function", "function": {"name": "other", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "look_up", "arguments": {"word": "%s"}}\n</tool_call>'


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answered(text: str, *results: str) -> list[dict]:
    """A question, calls for "a" and "b", and their results."""
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": word}}} for word in "ab"]
    message = {"role": "assistant", "content": "", "tool_calls": calls}
    return [*ask(text), message, *({"role": "tool", "content": result} for result in results)]


# What the model knows by heart: a conversation, tools, the answer.
TAUGHT = [
    (ask("你好"), None, HELLO),
    (ask("facts"), None, FACTS),
    (ask("cold"), [LOOK_UP], "I look.\n" + CALL % "感冒"),
    (ask("both"), [LOOK_UP], CALL % "a" + "\n" + CALL % "b"),
    (ask("hello"), [LOOK_UP], "Hello."),
    (answered("both", "1", "2"), [LOOK_UP], "1, then 2"),
    (answered("both", "2", "1"), [LOOK_UP], "2, then 1"),
]


def teach(path: str) -> str:
    """Train a tiny model until it gives the answers of TAUGHT."""
    make_tiny(path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    # The usual explanation of tools has 500 tokens of this tokenizer, which would take long to learn.
    names = "{{- 'Tools:' }}{%- for tool in tools %}{{ ' ' ~ tool.function.name }}{%- endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace(TOOL_FORMATS["qwen"].tool_list, names)
    tokenizer.save_pretrained(path)
    rows = []
    for messages, tools, answer in TAUGHT:
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
        rows.append((prompt, tokenizer(answer + TURN_END, add_special_tokens=False).input_ids))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    endless = make_tiny(folder / "endless", never_stops=True, max_position_embeddings=200_000)
    return {"taught": teach(str(folder / "taught")), "endless": endless}


@pytest.fixture(scope="module")
def servers(paths) -> Iterator[dict[str, Server]]:
    """taught: knows answers, open to this machine. busy: never stops by itself, has a key and hardly any room."""
    flags = {
        "taught": ["--max_request_bytes", 100_000],
        "busy": [
            *("--served_model_name", "busy", "--max_batch_size", 1, "--max_waiting", 1, "--request_timeout", 5),
            *("--max_tokens_limit", 100_000, "--max_request_bytes", 5000, "--allow_origins", "https://good.example"),
            *("--body_timeout", 2),
        ],
    }
    environments = {"taught": {}, "busy": {"MEDICALGPT_API_KEY": KEY}}
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        contexts = {
            name: running_server(
                "openai_api.py",
                *("--model_name_or_path", paths["endless" if name == "busy" else "taught"], *flags[name]),
                env=environments[name],
            )
            for name in flags
        }
        yield dict(zip(contexts, pool.map(stack.enter_context, contexts.values()), strict=True))


@pytest.fixture(scope="module")
def server(servers) -> Server:
    return servers["taught"]


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def busy(servers) -> Server:
    return servers["busy"]


@pytest.fixture(scope="module")
def busy_client(busy) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{busy.url}/v1", api_key=KEY, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def engine(paths) -> ChatEngine:
    return ChatEngine.from_pretrained(paths["taught"])


def post(server: Server, path: str, body, headers: dict | None = None) -> tuple[int, dict, bytes]:
    """A request by hand. `body`: an object for JSON, or bytes as they are."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    connection.request("POST", path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, content


def get(server: Server, path: str, headers: dict | None = None) -> tuple[int, dict, bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=60)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, content


def metric(server: Server, name: str, key: str = "none") -> float:
    text = get(server, "/metrics", {"Authorization": f"Bearer {key}"})[2].decode()
    # Of all models; a name with labels is one series.
    return sum(map(float, re.findall(rf"^{re.escape(name)}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)))


def chat(client: openai.OpenAI, text: str, **settings):
    return client.chat.completions.create(model=settings.pop("model", "taught"), messages=ask(text), **settings)


# --- answers ---------------------------------------------------------------------------------------------------------


def test_whole_answer_is_the_engines(client, engine):
    answer = chat(client, "你好")
    expected = engine.chat(ask("你好"))
    assert answer.choices[0].message.content == HELLO == expected.text
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "taught", "stop")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, expected.completion_tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert answer._request_id.startswith("req-")
    cut = chat(client, "你好", max_tokens=3).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("你", "length")
    assert chat(client, "你好", max_completion_tokens=3).choices[0].message.content == "你"


def test_bytes_of_a_stream(server):
    """https://html.spec.whatwg.org/multipage/server-sent-events.html: lines of `data: `, an empty line after each."""
    body = {"model": "taught", "messages": ask("你好"), "stream": True}
    status, headers, content = post(server, "/v1/chat/completions", body)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert headers["cache-control"] == "no-cache"
    assert content.endswith(b"\n\n") and b"\r" not in content
    events = content.removesuffix(b"\n\n").split(b"\n\n")
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    assert events.pop() == b"data: [DONE]"
    chunks = [json.loads(event.removeprefix(b"data: ")) for event in events]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert len(choices) == len(chunks) and all("usage" not in chunk for chunk in chunks)
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    pieces = [choice["delta"]["content"] for choice in choices[1:-1]]
    # What comes while the previous piece is written is joined, so that their number depends on the machine.
    assert pieces and "".join(pieces) == HELLO


def test_stream_of_the_client_and_its_usage(client):
    *chunks, last = chat(client, "你好", stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == HELLO
    assert last.choices == [] and last.usage == chat(client, "你好").usage
    assert all(chunk.usage is None for chunk in chunks)


def test_line_ends_inside_of_a_text_do_not_end_an_event(tmp_path, engine):
    """Some clients split lines where Unicode does."""
    with local(engine) as page:
        (model,) = page.app.state.service.models.values()
        model.name = "a\u2028b\x85c"
        page.app.state.service.models = {model.name: model}
        body = {"model": "a\u2028b\x85c", "messages": ask("你好"), "stream": True, "max_tokens": 2}
        text = page.post("/v1/chat/completions", json=body).text
    assert all(line == "" or line.startswith("data: ") for line in text.splitlines())
    assert json.loads(text.splitlines()[0].removeprefix("data: "))["model"] == "a\u2028b\x85c"


def test_n_and_seed(client):
    settings = {"temperature": 1.5, "max_tokens": 8, "seed": 5}
    answers = chat(client, "x", n=3, **settings)
    texts = [choice.message.content for choice in answers.choices]
    assert [choice.index for choice in answers.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert chat(client, "x", **settings | {"seed": 7}).choices[0].message.content == texts[2]
    assert answers.usage.completion_tokens > 8 >= chat(client, "x", **settings).usage.completion_tokens
    assert answers.usage.prompt_tokens == chat(client, "x", **settings).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(client, "x", n=3, stream=True, **settings):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    unseeded = {"temperature": 1.5, "max_tokens": 30}
    assert chat(client, "x", **unseeded).choices[0] != chat(client, "x", **unseeded).choices[0]


def test_stop_and_extensions(client):
    choice = chat(client, "facts", stop=["nothing", "布洛"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ('{"drug": "', "stop")
    pieces = chat(client, "facts", stop="布洛", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in pieces) == '{"drug": "'
    hot = chat(client, "你好", temperature=2, extra_body={"top_k": 1, "repetition_penalty": 1.0})
    assert hot.choices[0].message.content == HELLO


def test_log_probs(client, engine):
    expected = engine.chat(ask("你好"), Sampling(top_log_probs=2))
    content = chat(client, "你好", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in content).decode() == HELLO
    # The end of the turn is not part of the text.
    assert len(content) == len(expected.scores) - 1
    for token, score in zip(content, expected.scores, strict=False):
        assert token.logprob == pytest.approx(score.log_prob, abs=1e-4)
        assert [top.logprob for top in token.top_logprobs] == pytest.approx([each[1] for each in score.top], abs=1e-4)
        assert token.top_logprobs[0].bytes == token.bytes
    plain = chat(client, "你好", logprobs=True).choices[0].logprobs.content
    assert [token.bytes for token in plain] == [token.bytes for token in content] and plain[0].top_logprobs == []
    *_, last = chat(client, "你好", logprobs=True, stream=True)
    assert [token.bytes for token in last.choices[0].logprobs.content] == [token.bytes for token in content]


def test_token_bytes_of_other_tokenizers(engine):
    class Pieces:
        names = ["▁好", "<0xE4>", "s"]

        def convert_ids_to_tokens(self, token_id):
            return self.names[token_id]

        def decode(self, ids, **_):
            return ["好", "\N{REPLACEMENT CHARACTER}", "s"][ids[0]]

    found = [token_bytes(Pieces(), token_id) for token_id in range(3)]
    assert found == [" 好".encode(), b"\xe4", b"s"]
    assert [token_text(each) for each in found] == [" 好", "bytes:\\xe4", "s"]
    one = engine.tokenizer("好").input_ids
    assert b"".join(token_bytes(engine.tokenizer, token_id) for token_id in one) == "好".encode()


def test_completions(client, engine):
    prompt = engine.tokenizer.apply_chat_template(ask("你好"), add_generation_prompt=True, tokenize=False)
    ids = engine.prompt_ids(ask("你好"))
    settings = {"model": "taught", "max_tokens": 60}
    for form in (prompt, [prompt], ids, [ids]):
        answer = client.completions.create(prompt=form, **settings)
        assert (answer.object, [choice.text for choice in answer.choices]) == ("text_completion", [HELLO])
        assert answer.choices[0].finish_reason == "stop"
    facts = engine.prompt_ids(ask("facts"))
    several = client.completions.create(prompt=[ids, facts], n=2, temperature=1e-6, **settings)
    assert [choice.text for choice in several.choices] == [HELLO, HELLO, FACTS, FACTS]
    assert several.usage.prompt_tokens == len(ids) + len(facts)
    pieces = [chunk.choices[0] for chunk in client.completions.create(prompt=ids, stream=True, **settings)]
    assert "".join(piece.text for piece in pieces) == HELLO
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]


def test_log_probs_of_completions(client, engine):
    ids = engine.prompt_ids(ask("facts"))
    choice = client.completions.create(model="taught", prompt=ids, max_tokens=60, logprobs=1).choices[0]
    scores = choice.logprobs
    assert len(scores.tokens) == len(FACTS.encode()) == len(scores.token_logprobs) == len(scores.text_offset)
    assert scores.tokens[:3] == list('{"d') and scores.tokens[10].startswith("bytes:\\x")
    assert scores.top_logprobs[0] == {"{": scores.token_logprobs[0]}
    quote = len('{"drug": "布洛芬'.encode())
    assert FACTS[scores.text_offset[quote]] == scores.tokens[quote] == '"'


def test_32_clients_at_a_time_get_their_own_answers(client):
    def marker(number: int) -> str:
        answer = client.completions.create(model="taught", prompt=f"marker {number}", max_tokens=12, temperature=0)
        return answer.choices[0].text

    def streamed(number: int) -> str:
        chunks = client.completions.create(model="taught", prompt=f"marker {number}", max_tokens=12, stream=True)
        return "".join(chunk.choices[0].text for chunk in chunks)

    alone = [marker(number) for number in range(32)]
    assert len(set(alone)) > 8
    with ThreadPoolExecutor(32) as pool:
        together = list(pool.map(lambda number: (marker, streamed)[number % 2](number), range(32)))
    assert together == alone


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tool_call_whole(client):
    choice = chat(client, "cold", tools=[LOOK_UP]).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "look_up") and call.id.startswith("call_")
    assert json.loads(call.function.arguments) == {"word": "感冒"}


def test_tool_call_streamed(client):
    *chunks, last = [chunk.choices[0] for chunk in chat(client, "both", tools=[LOOK_UP], stream=True)]
    assert last.finish_reason == "tool_calls"
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    first, second = [call for call in calls if call.id]
    assert (first.index, second.index) == (0, 1) and first.id != second.id
    texts = {0: "", 1: ""}
    for call in calls:
        texts[call.index] += call.function.arguments
    assert [json.loads(text)["word"] for text in texts.values()] == ["a", "b"]
    assert not any(chunk.delta.content for chunk in chunks)
    chunks = [chunk.choices[0].delta for chunk in chat(client, "cold", tools=[LOOK_UP], stream=True)]
    assert "".join(delta.content or "" for delta in chunks) == "I look."


def test_round_trip_with_results_in_another_order(client):
    """The client's own message goes back as it came; templates know results by their order."""
    message = chat(client, "both", tools=[LOOK_UP]).choices[0].message
    first, second = message.tool_calls
    results = [
        {"role": "tool", "tool_call_id": second.id, "content": "2"},
        {"role": "tool", "tool_call_id": first.id, "content": [{"type": "text", "text": "1"}]},
    ]
    messages = [*ask("both"), message, *results]
    answer = client.chat.completions.create(model="taught", messages=messages, tools=[LOOK_UP])
    assert answer.choices[0].message.content == "1, then 2"
    for wrong, reason in (
        ([*ask("both"), message, results[0]], "must follow"),
        ([*ask("both"), message, results[0], *ask("x")], "must come first"),
        ([*ask("both"), message, results[0], results[0]], "answers no call"),
        ([*ask("both"), results[0]], "answers no call"),
    ):
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(model="taught", messages=wrong, tools=[LOOK_UP])


def test_tool_choice(client):
    assert chat(client, "cold", tools=[LOOK_UP], tool_choice="required").choices[0].message.tool_calls
    named = {"type": "function", "function": {"name": "look_up"}}
    # Only the named tool is offered, as it was when the model was taught.
    assert chat(client, "cold", tools=[OTHER, LOOK_UP], tool_choice=named).choices[0].message.tool_calls
    # With none, no tool is offered either.
    assert chat(client, "你好", tools=[LOOK_UP], tool_choice="none").choices[0].message.content == HELLO
    # What the model would not say by itself, it is held to.
    for choice in ("required", named):
        assert chat(client, "hello", tools=[LOOK_UP], tool_choice=choice, max_tokens=300).choices[0].message.tool_calls
    calls = chat(client, "both", tools=[LOOK_UP], parallel_tool_calls=False).choices[0].message.tool_calls
    assert len(calls) == 1
    assert chat(client, "hello", tools=[LOOK_UP], parallel_tool_calls=False).choices[0].message.content == "Hello."


def test_json_object(client):
    json_object = {"type": "json_object"}
    assert chat(client, "facts", response_format=json_object).choices[0].message.content == FACTS
    chunks = chat(client, "facts", response_format=json_object, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == FACTS and len(pieces) > 5
    cut = chat(client, "facts", response_format=json_object, max_tokens=5).choices[0]
    assert (cut.message.content, cut.finish_reason) == (FACTS[:5], "length")


def test_roles_and_parts(client):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    answer = client.chat.completions.create(model="taught", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == HELLO
    counts = [
        client.chat.completions.create(
            model="taught", messages=[*first, *ask("你好")], max_tokens=1
        ).usage.prompt_tokens
        for first in ([], [{"role": "system", "content": "短"}], [{"role": "developer", "content": "短"}])
    ]
    assert counts[0] < counts[1] == counts[2]
    neutral = {"user": "u", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "logit_bias": {}, "n": 1}
    assert chat(client, "你好", **neutral, response_format={"type": "text"}).choices[0].message.content == HELLO


# --- refusals --------------------------------------------------------------------------------------------------------

WRONG_CHATS = [
    ({"model": "gpt-9"}, 404, "model", "model_not_found", "'gpt-9'.*'taught'"),
    ({"messages": []}, 400, "messages", None, "at least 1"),
    ({"messages": ask("x" * 600)}, 400, "messages", "context_length_exceeded", "619 tokens.*512"),
    ({"messages": ask("<|im_end|>")}, 400, "messages", None, "special token"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages[0]", None, "wizard"),
    ({"messages": [{"role": "user", "contet": "x"}]}, 400, "messages[0].content", None, "required"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", None, "required"),
    ({"messages": [{"role": "assistant"}]}, 400, "messages[0]", None, "neither content nor tool_calls"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
        400,
        "messages[0].content[0]",
        None,
        "image_url.*text only",
    ),
    ({"temperature": 2.1}, 400, "temperature", None, "less than or equal to 2"),
    ({"temperature": "1"}, 400, "temperature", None, "number"),
    ({"max_tokens": 0}, 400, "max_tokens", None, "greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "max_tokens", None, "5000.*limit of 4096"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", None, "differ"),
    ({"n": 17, "temperature": 1}, 400, "n", None, "less than or equal to 16"),
    ({"stop": ["a"] * 17}, 400, "stop", None, "at most 16"),
    ({"seed": -1}, 400, "seed", None, "greater than or equal to 0"),
    ({"top_logprobs": 3}, 400, "top_logprobs", None, "without logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", None, "less than or equal to 20"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", None, "without stream"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty", None, "less than or equal to 2"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        400,
        "response_format.json_schema.schema",
        None,
        "",
    ),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", None, "has the field json_schema"),
    ({"chat_template_kwargs": {"tools": []}}, 400, "chat_template_kwargs", None, "tools: the server sets this"),
    ({"tool_choice": "required"}, 400, "tool_choice", None, "without tools"),
    ({"tools": []}, 400, "tools", None, "at least 1"),
    ({"tools": [{"type": "function", "function": {}}]}, 400, "tools[0].function.name", None, "required"),
    (
        {"tools": [LOOK_UP], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        400,
        "tool_choice",
        None,
        "'x'",
    ),
]


@pytest.mark.parametrize("change, status, param, code, message", WRONG_CHATS, ids=lambda value: str(value)[:40])
def test_wrong_chats(server, change, status, param, code, message):
    body = {"model": "taught", "messages": ask("你好")} | change
    found, _, content = post(server, "/v1/chat/completions", body)
    error = json.loads(content)["error"]
    assert (found, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error" and re.search(message, error["message"])


@pytest.mark.parametrize(
    "change, param, message",
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "at least one"),
        ({"prompt": [1, 260]}, "prompt", "from 0 to 259"),
        ({"prompt": [-1]}, "prompt", "from 0 to 259"),
        ({"prompt": [1] * 512}, "prompt", "512 tokens"),
        ({"prompt": "x" * 512}, "prompt", "512 tokens"),
        ({"prompt": ["x"] * 81}, "n", "81 answers.*80"),
        ({"max_tokens": 0}, "max_tokens", "0 is for echo"),
        ({"suffix": "b"}, "suffix", "fill in"),
        ({"best_of": 3}, "best_of", "use n"),
    ],
)
def test_wrong_completions(server, change, param, message):
    status, _, content = post(server, "/v1/completions", {"model": "taught", "prompt": "x"} | change)
    error = json.loads(content)["error"]
    assert (status, error["param"]) == (400, param) and re.search(message, error["message"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b"[" * 5000,
        b'{"model": "taught", "messages": [{"role": "user", "content": "\\udc00"}]}',
        b'{"model": "taught", "messages": [{"role": "user", "content": "x"}], "tools": '
        b'[{"type": "function", "function": {"name": "f", "parameters": {"default": NaN}}}]}',
        b'{"model": "taught", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"model": "taught", "messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    ],
)
def test_malformed_bodies(server, body):
    status, _, content = post(server, "/v1/chat/completions", body)
    assert status == 400 and json.loads(content)["error"]["type"] == "invalid_request_error"


def test_other_refusals(server):
    body = {"model": "taught", "messages": ask("你好")}
    for headers, path, expected in (
        ({"Content-Type": "text/plain"}, "/v1/chat/completions", 415),
        ({"Host": "evil.example"}, "/v1/chat/completions", 403),
        ({"Host": "127.0.0.1.evil.example:80"}, "/v1/chat/completions", 403),
        ({"Host": "localhost:1"}, "/v1/chat/completions", 200),
        ({"Host": "[::1]:1"}, "/v1/chat/completions", 200),
        ({}, "/v1/chat", 404),
        ({}, "/v1/models", 405),
    ):
        status, answered, content = post(server, path, body, headers)
        assert status == expected, (headers, path)
        assert "access-control-allow-origin" not in answered
        assert status == 200 or set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
    for size in (100_001, 3_000_000):
        assert post(server, "/v1/chat/completions", b" " * size)[0] == 413
    assert get(server, "/docs")[0] == get(server, "/redoc")[0] == 404


def test_chunked_body_over_the_limit(server):
    with socket.create_connection(("127.0.0.1", urlsplit(server.url).port), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        # 120 kB without an end.
        for _ in range(12):
            connection.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_models_health_metrics_schema(server, client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.max_model_len) == ("taught", "model", 512)
    assert client.models.retrieve("taught") == model
    with pytest.raises(openai.NotFoundError, match="a/b"):
        client.models.retrieve("a/b")
    assert json.loads(get(server, "/health")[2]) == {"status": "ok"}
    assert "/v1/chat/completions" in json.loads(get(server, "/openapi.json")[2])["paths"]
    before = {
        name: metric(server, name)
        for name in (
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:inter_token_latency_seconds_count",
            "vllm:time_to_first_token_seconds_count",
            "vllm:request_queue_time_seconds_count",
            "vllm:e2e_request_latency_seconds_count",
            'vllm:request_success_total{finished_reason="stop",model_name="taught"}',
            'http_server_request_duration_seconds_count{http_request_method="POST",http_response_status_code="200",'
            'http_route="/v1/chat/completions"}',
        )
    }
    usage = chat(client, "你好").usage
    risen = [metric(server, name) - value for name, value in before.items()]
    assert risen == [usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens - 1, 1, 1, 1, 1, 1]
    assert metric(server, "vllm:num_requests_running") == metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "process_resident_memory_bytes") > 1e6


def test_the_printed_command_runs(server):
    (command,) = re.findall(r"    curl .*\n.*\n", server.log())
    done = os.popen(command + " -s 2>/dev/null").read()
    assert json.loads(done)["object"] == "chat.completion"


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The last test of this server.
def test_running_answers_end_when_the_server_is_stopped(server, client):
    stream = iter(chat(client, "x", n=16, temperature=2, seed=1, max_tokens=400, stream=True))
    next(stream)
    assert get(server, "/ready")[0] == 200
    server.process.send_signal(signal.SIGTERM)
    # New ones are refused, while it goes on listening.
    wait_until(lambda: get(server, "/ready")[0] == 503)
    status, headers, content = post(server, "/v1/chat/completions", {"model": "taught", "messages": ask("x")})
    assert (status, headers["retry-after"], json.loads(content)["error"]["code"]) == (503, "5", "stopping")
    assert get(server, "/live")[0] == get(server, "/health")[0] == 200
    ended = [chunk.choices[0].index for chunk in stream if chunk.choices[0].finish_reason]
    assert sorted(ended) == list(range(16))
    assert server.process.wait(30) == 0
    assert "stopped" in server.log() and "Traceback" not in server.log()


# --- a server with a key and hardly any room --------------------------------------------------------------------------


def test_key_on_every_route(busy, busy_client):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Bearer \xe9"}):
        for path in ("/health", "/metrics", "/v1/models", "/openapi.json", "/nothing"):
            status, _, content = get(busy, path, headers)
            assert (status, json.loads(content)["error"]["code"]) == (401, "invalid_api_key")
        assert post(busy, "/v1/chat/completions", b"{", headers)[0] == 401
    with pytest.raises(openai.AuthenticationError):
        busy_client.with_options(api_key="wrong").models.list()
    assert get(busy, "/health", {"Authorization": f"Bearer {KEY}", "Host": "model.example"})[0] == 200
    assert KEY not in busy.log()


def test_only_named_origins(busy):
    key = {"Authorization": f"Bearer {KEY}"}
    allowed = get(busy, "/health", key | {"Origin": "https://good.example"})[1]
    assert allowed["access-control-allow-origin"] == "https://good.example"
    assert "access-control-allow-origin" not in get(busy, "/health", key | {"Origin": "https://bad.example"})[1]


def endless(busy_client: openai.OpenAI, **settings):
    return chat(busy_client, "x", model="busy", max_tokens=100_000, **settings)


def test_killed_clients_free_their_places_and_a_full_queue_says_so(busy, busy_client):
    def busy_with() -> tuple[float, float]:
        return metric(busy, "vllm:num_requests_running", KEY), metric(busy, "vllm:num_requests_waiting", KEY)

    finished = metric(busy, "vllm:generation_tokens_total", KEY)
    running = endless(busy_client, stream=True)
    next(iter(running))
    wait_until(lambda: busy_with() == (1, 0))
    waiting = socket.create_connection(("127.0.0.1", urlsplit(busy.url).port))
    body = json.dumps({"model": "busy", "messages": ask("x"), "max_tokens": 100_000}).encode()
    waiting.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    wait_until(lambda: busy_with() == (1, 1))
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError, match="wait already") as error:
            endless(busy_client, stream=stream)
        assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
        assert error.value.code == "queue_full"
    waiting.close()
    wait_until(lambda: busy_with() == (1, 0))
    running.response.close()
    wait_until(lambda: busy_with() == (0, 0))
    # What was generated for clients that left is counted, too.
    assert metric(busy, "vllm:generation_tokens_total", KEY) > finished
    assert chat(busy_client, "x", model="busy", max_tokens=3).usage.completion_tokens == 3


def test_time_limit(busy, busy_client):
    """Of a stream, of an answer that waits for its turn, and of a body that does not arrive."""

    def streamed() -> str:
        with pytest.raises(openai.APIError, match="longer than 5 s") as error:
            for _ in endless(busy_client, stream=True):
                begun.set()
        return error.value.code

    begun = threading.Event()
    slow = socket.create_connection(("127.0.0.1", urlsplit(busy.url).port), timeout=30)
    slow.sendall(
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {KEY}\r\n"
        'Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"model": '.encode()
    )
    with ThreadPoolExecutor() as pool:
        first = pool.submit(streamed)
        begun.wait(30)
        with pytest.raises(openai.InternalServerError, match="longer than 5 s") as error:
            endless(busy_client)
        assert (error.value.status_code, error.value.code, first.result()) == (504, "timeout", "timeout")
    assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
    slow.close()
    wait_until(lambda: metric(busy, "vllm:num_requests_running", KEY) == 0)


# The last test of this server.
def test_second_signal_ends_running_answers_with_an_error(busy, busy_client):
    stream = endless(busy_client, stream=True)
    next(iter(stream))
    for _ in range(2):
        busy.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    with pytest.raises(openai.APIError, match="stopping"):
        list(stream)
    assert busy.process.wait(30) == 0
    assert "stopped" in busy.log() and "Traceback" not in busy.log()


# --- inside of this process -------------------------------------------------------------------------------------------


class local:
    """The server's application without a socket around an engine."""

    def __init__(self, engine: ChatEngine, **flags):
        self.batcher = make_batcher(engine)
        arguments = OpenAIArguments(model_name_or_path="tiny", **flags)
        self.client = TestClient(make_app(Service(arguments, engine, self.batcher, None)), "http://localhost")

    def __enter__(self) -> TestClient:
        return self.client

    def __exit__(self, *_):
        self.batcher.close(finish=False)


def test_failure_while_generating(engine):
    """It has a status of its own; in a stream it is the last event."""
    steps, fail_at = [], []

    def fail(*_):
        steps.append(None)
        # Once: whether the model still answers is tried with a request of its own.
        if [len(steps)] == fail_at:
            fail_at.clear()
            raise RuntimeError("secret of the machine")

    handle = engine.model.register_forward_pre_hook(fail)
    body = {"model": "tiny", "messages": ask("你好")}
    try:
        with local(engine) as page:

            def recovered() -> None:
                assert page.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200

            for step, stream in ((1, False), (1, True), (12, False)):
                recovered()
                steps.clear()
                fail_at = [step]
                answer = page.post("/v1/chat/completions", json=body | {"stream": stream})
                assert answer.status_code == 200 if stream else 500
                *_, last = answer.text.removesuffix("\n\n").split("data: ")
                assert json.loads(last)["error"]["type"] == "server_error" and "secret" not in answer.text
            recovered()
            steps.clear()
            fail_at = [12]
            answer = page.post("/v1/chat/completions", json=body | {"stream": True})
            assert answer.status_code == 200 and "[DONE]" not in answer.text and "secret" not in answer.text
            events = [json.loads(event.removeprefix("data: ")) for event in answer.text.strip().split("\n\n")]
            assert events[-2]["choices"] and events[-1]["error"]["type"] == "server_error"
            # The next one is answered.
            answer = page.post("/v1/chat/completions", json=body)
            assert answer.json()["choices"][0]["message"]["content"] == HELLO
    finally:
        handle.remove()


def test_flags_are_the_defaults_of_requests(engine):
    with local(engine, max_new_tokens=3, system_prompt="短") as page:
        body = {"model": "tiny", "messages": ask("你好")}
        short = page.post("/v1/chat/completions", json=body).json()
        assert short["usage"]["completion_tokens"] == 3
        assert short["usage"]["prompt_tokens"] == len(
            engine.prompt_ids([{"role": "system", "content": "短"}, *ask("你好")])
        )
        own = page.post(
            "/v1/chat/completions", json=body | {"messages": [{"role": "system", "content": "长长"}, *ask("你好")]}
        )
        assert own.json()["usage"]["prompt_tokens"] > short["usage"]["prompt_tokens"]


def test_model_without_a_form_for_tools(engine):
    template = engine.tokenizer.chat_template
    engine.tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    try:
        with local(engine) as page:
            body = {"model": "tiny", "messages": ask("你好"), "tools": [LOOK_UP]}
            answer = page.post("/v1/chat/completions", json=body)
    finally:
        engine.tokenizer.chat_template = template
    assert answer.status_code == 400 and "no form for tools" in answer.text


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--host", "0.0.0.0"], "without a key.*MEDICALGPT_API_KEY"),
        (["--host", "192.168.0.1"], "without a key"),
        (["--host", "::"], "without a key"),
        (["--api_key", ""], "at least one"),
        (["--api_key", "with space"], "without spaces"),
        (["--allow_origins", "*"], "wildcard"),
        (["--allow_origins", "https://*.example"], "wildcard"),
        (["--allow_origins", "good.example"], "not an origin"),
        (["--max_tokens_limit", 100], "max_new_tokens 512.*100"),
        (["--request_timeout", 0, "--max_connections", 0], "max_connections is 0.*request_timeout is 0"),
        (["--temperature", -1], "temperature"),
        (["--port", 70_000], "--port 70000"),
    ],
)
def test_refused_before_anything_is_loaded(monkeypatch, flags, message):
    monkeypatch.delenv("MEDICALGPT_API_KEY", raising=False)
    with pytest.raises(UserError, match=re.compile(message, re.DOTALL)):
        run_here("openai_api.py", "--model_name_or_path", "/nowhere", *flags)


def test_port_in_use():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(UserError, match=r"(?s)in use.*Give another --port"):
            run_here("openai_api.py", "--model_name_or_path", "/nowhere", "--port", taken.getsockname()[1])
