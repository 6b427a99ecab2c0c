"""Routes of openai_api.py beyond completions: responses, embeddings, tokens, adapters; and scores of prompts."""

import base64
import json
from collections.abc import Iterator

from medicalgpt.serving.batchers import batcher_from, make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.embeddings import Encoder
from medicalgpt.serving.engines import engine_from
from openai_api import OpenAIArguments, Service, make_app
from template import apply_template
from tests.tiny import make_tiny, save_encoder

import httpx
import numpy as np
import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

ASK = [{"role": "user", "content": "x"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}},
    "required": ["kind"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "look_up", "parameters": SCHEMA, "strict": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(scope="module")
def engine(model) -> ChatEngine:
    return ChatEngine.from_pretrained(model)


@pytest.fixture(scope="module")
def client(engine, tmp_path_factory) -> Iterator[TestClient]:
    batcher = make_batcher(engine)
    arguments = OpenAIArguments(model_name_or_path="tiny", max_new_tokens=20)
    encoder = Encoder(save_encoder(tmp_path_factory.mktemp("encoder")), "encoder")
    yield TestClient(make_app(Service(arguments, engine, batcher, None, encoder)), "http://localhost")
    batcher.close(finish=False)
    encoder.close()


def post(client: TestClient, path: str, status: int = 200, **body):
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return response


def respond(client: TestClient, **fields) -> dict:
    return post(client, "/v1/responses", model="tiny", **{"input": "x", **fields}).json()


def events_of(response) -> list[dict]:
    assert "[DONE]" not in response.text
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    found = []
    for block in blocks:
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


# --- responses -------------------------------------------------------------------------------------------------------


def test_response_is_the_chat_answer(client):
    chat = post(
        client, "/v1/chat/completions", model="tiny", messages=[{"role": "system", "content": "s"}, *ASK]
    ).json()
    found = respond(client, instructions="s", store=True, include=[], reasoning={"effort": "low"})
    (item,) = found["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (found["object"], found["status"]) == ("response", "incomplete")
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert found["usage"]["output_tokens"] == chat["usage"]["completion_tokens"] == 20


def test_response_with_a_schema_and_with_tools(client):
    text = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    found = respond(client, text=text, max_output_tokens=60)
    assert json.loads(found["output"][0]["content"][0]["text"])["kind"] in "ab" and found["status"] == "completed"
    assert found["text"]["format"]["schema"] == SCHEMA
    found = respond(client, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    (call,) = found["output"]
    assert (call["type"], call["name"]) == ("function_call", "look_up") and json.loads(call["arguments"])["kind"]
    # The client's own items go back as they came.
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "r"}
    items = [{"role": "user", "content": [{"type": "input_text", "text": "x"}]}, *found["output"], result]
    again = respond(client, input=items, tools=[TOOL], max_output_tokens=1)
    function = {"name": "look_up", "arguments": call["arguments"]}
    messages = [
        *ASK,
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
    ]
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]
    same = post(client, "/v1/chat/completions", model="tiny", messages=messages, tools=tools, max_tokens=1).json()
    assert again["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]


def test_events_of_a_response(client):
    events = events_of(post(client, "/v1/responses", model="tiny", input="x", stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert deltas > 3
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas),
        *("output_text.done", "content_part.done", "output_item.done", "incomplete"),
    ]
    text = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"]
    assert text == respond(client)["output"][0]["content"][0]["text"]
    settings = {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "max_output_tokens": 200}
    events = events_of(post(client, "/v1/responses", model="tiny", input="x", stream=True, **settings))
    arguments = "".join(event["delta"] for event in events if "arguments.delta" in event["type"])
    assert json.loads(arguments) and events[-1]["type"] == "response.completed"
    assert [item["arguments"] for item in events[-1]["response"]["output"]] == [arguments]


@pytest.mark.parametrize(
    "fields, param, reason",
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "nothing is stored"),
        ({"background": True}, "background", "use stream"),
        ({"truncation": "auto"}, "truncation", "never cut"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id", "needs it"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "message"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].function.name", "match"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema", "needs it"),
        ({"tool_choice": "required"}, "tool_choice", "without tools"),
    ],
)
def test_refused_responses(client, fields, param, reason):
    error = post(client, "/v1/responses", 400, model="tiny", **{"input": "x", **fields}).json()["error"]
    assert error["param"] == param and reason in error["message"]


def test_openai_client_reads_responses(client):
    """The parsing of the official client, over the application itself."""

    def send(request: httpx.Request) -> httpx.Response:
        answer = client.request(request.method, request.url.path, content=request.read(), headers=dict(request.headers))
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

    own = openai.OpenAI(
        base_url="http://localhost/v1", api_key="none", http_client=httpx.Client(transport=httpx.MockTransport(send))
    )
    answer = own.responses.create(model="tiny", input="x")
    with own.responses.stream(model="tiny", input="x") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert answer.output_text == text != ""
    assert len(own.embeddings.create(model="encoder", input=["a b", "c"]).data[1].embedding) == 16


# --- reasoning, in a model whose prompt begins it --------------------------------------------------------------------


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> Iterator[TestClient]:
    """Its prompts begin the reasoning, unless enable_thinking is false."""
    path = make_tiny(tmp_path_factory.mktemp("thinker"), max_position_embeddings=4096)
    engine = ChatEngine.from_pretrained(path)
    apply_template(engine.tokenizer, "qwen3_5")
    with make_batcher(engine) as batcher:
        arguments = OpenAIArguments(model_name_or_path="tiny", max_new_tokens=12)
        yield TestClient(make_app(Service(arguments, engine, batcher, None)), "http://localhost")


def test_reasoning_is_apart(thinker):
    def message(**fields):
        return post(thinker, "/v1/chat/completions", model="tiny", messages=ASK, **fields).json()["choices"][0][
            "message"
        ]

    thinking = message()
    # Random weights do not end their reasoning.
    assert thinking["content"] == "" and thinking["reasoning_content"]
    plain = message(chat_template_kwargs={"enable_thinking": False})
    assert plain["content"] and "reasoning_content" not in plain
    stream = post(thinker, "/v1/chat/completions", model="tiny", messages=ASK, stream=True).text
    deltas = [
        json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for line in stream.splitlines()
        if line.startswith("data: {")
    ]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == thinking["reasoning_content"]
    found = respond(thinker)
    assert [item["type"] for item in found["output"]] == ["reasoning"]
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_reasoning_comes_before_json(thinker):
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
    settings = {"response_format": format_, "chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 60}
    found = post(thinker, "/v1/chat/completions", model="tiny", messages=ASK, **settings).json()["choices"][0][
        "message"
    ]
    assert json.loads(found["content"])["kind"] in "ab"
    # JSON begins only after the reasoning, which random weights do not end.
    settings["chat_template_kwargs"] = {}
    found = post(thinker, "/v1/chat/completions", model="tiny", messages=ASK, **settings).json()["choices"][0][
        "message"
    ]
    assert found["reasoning_content"] and found["content"] == ""


def test_reasoning_in_the_history_is_what_the_template_makes_of_it(thinker):
    """The template shows the reasoning of the current turn's calls, and drops that of earlier turns."""

    def tokens(*messages) -> int:
        return post(thinker, "/tokenize", model="tiny", messages=list(messages)).json()["count"]

    answer = {"role": "assistant", "content": "b"}
    asked, again = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}
    for field in ({"reasoning_content": "hm"}, {"reasoning": "hm"}):
        assert tokens(asked, {**answer, **field}, again) == tokens(asked, answer, again)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "tool_call_id": "1", "content": "r"}
    assert tokens(asked, {**calling, "reasoning_content": "hm"}, result) == tokens(asked, calling, result) + len("hm")


def test_variables_of_the_template(thinker):
    wrong = post(
        thinker, "/v1/chat/completions", 400, model="tiny", messages=ASK, chat_template_kwargs={"messages": []}
    )
    assert "the server sets this itself" in wrong.text
    unread = post(
        thinker, "/v1/chat/completions", model="tiny", messages=ASK, chat_template_kwargs={"mood": 1}, max_tokens=1
    )
    assert unread.headers["x-ignored-fields"] == "chat_template_kwargs.mood"


# --- scores of prompts -----------------------------------------------------------------------------------------------


def by_hand(model: str, ids: list[int]) -> list[float]:
    """The log-probability of each token but the first, by the model itself."""
    own = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        log_probs = own(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [log_probs[position, token_id].item() for position, token_id in enumerate(ids[1:])]


def test_echo_with_log_probabilities(client, model, engine):
    """What multiple choice in lm-eval reads: the scores of a prompt, and one token after it."""
    prompts = [engine.tokenizer(text).input_ids for text in ("感冒 a", "abc")]
    fields = {"model": "tiny", "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choices = post(client, "/v1/completions", **fields).json()["choices"]
    for choice, ids, text in zip(choices, prompts, ("感冒 a", "abc"), strict=True):
        scores = choice["logprobs"]
        assert choice["text"].startswith(text) and len(scores["token_logprobs"]) == len(ids) + 1
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        assert scores["token_logprobs"][1:-1] == pytest.approx(by_hand(model, ids), abs=1e-4)
        assert all(
            max(top.values()) >= own - 1e-6
            for top, own in list(zip(scores["top_logprobs"], scores["token_logprobs"], strict=True))[1:]
        )
    without = post(client, "/v1/completions", **fields | {"max_tokens": 0}).json()
    assert [choice["text"] for choice in without["choices"]] == ["感冒 a", "abc"]
    assert without["choices"][1]["logprobs"]["token_logprobs"] == choices[1]["logprobs"]["token_logprobs"][:-1]
    assert without["usage"]["completion_tokens"] == 0
    plain = post(client, "/v1/completions", model="tiny", prompt="abc", echo=True, max_tokens=2).json()["choices"][0]
    streamed = post(client, "/v1/completions", model="tiny", prompt="abc", echo=True, max_tokens=2, stream=True).text
    pieces = [
        json.loads(line[6:])["choices"][0]["text"] for line in streamed.splitlines() if line.startswith("data: {")
    ]
    assert "".join(pieces) == plain["text"] and plain["text"].startswith("abc")


def test_scores_of_long_prompts_are_read_in_parts(engine, model, monkeypatch):
    from medicalgpt.serving import prompt_scores

    monkeypatch.setattr(prompt_scores, "MAX_SCORES", 1)
    own = ChatEngine.from_pretrained(model)
    ids = list(range(1, 60))
    found = prompt_scores.PromptScorer(own).scores(own, ids, 0)
    assert [score.log_prob for score in found] == pytest.approx(by_hand(model, ids), abs=1e-4)


# --- embeddings and tokens -------------------------------------------------------------------------------------------


def test_embeddings(client):
    found = post(client, "/v1/embeddings", model="encoder", input=["a b", "c d e"]).json()
    vectors = np.array([row["embedding"] for row in found["data"]])
    assert vectors.shape == (2, 16) and np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1])
    assert found["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    coded = post(client, "/v1/embeddings", model="encoder", input="a b", encoding_format="base64").json()["data"][0]
    assert np.frombuffer(base64.b64decode(coded["embedding"]), "<f4") == pytest.approx(vectors[0], abs=1e-6)
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["tiny", "encoder"]
    for fields, status, reason in (
        ({"model": "tiny", "input": "a"}, 404, "this server has 'encoder'"),
        ({"model": "encoder", "input": [1, 2]}, 400, "send text"),
        ({"model": "encoder", "input": []}, 400, "at least 1"),
        ({"model": "encoder", "input": "a", "dimensions": 8}, 400, "have 16"),
    ):
        assert reason in post(client, "/v1/embeddings", status, **fields).json()["error"]["message"]


def test_without_an_encoder(thinker):
    error = post(thinker, "/v1/embeddings", 501, model="tiny", input="a").json()["error"]
    assert "--embedding_model" in error["message"]


def test_tokens(client, engine):
    found = post(client, "/tokenize", model="tiny", prompt="感a", return_token_strs=True).json()
    assert found["tokens"] == engine.tokenizer("感a").input_ids and found["count"] == 4 == len(found["token_strs"])
    assert found["max_model_len"] == 4096
    assert post(client, "/detokenize", model="tiny", tokens=found["tokens"]).json() == {"prompt": "感a"}
    rendered = post(client, "/tokenize", messages=ASK).json()["tokens"]
    assert rendered == engine.prompt_ids(ASK)
    assert "from 0 to 259" in post(client, "/detokenize", 400, tokens=[260]).text
    assert "either prompt or messages" in post(client, "/tokenize", 400, model="tiny").text


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> dict[str, str]:
    folder, found = tmp_path_factory.mktemp("adapters"), {}
    for number, name in enumerate("ab"):
        torch.manual_seed(number)
        adapted = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model),
            LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        )
        adapted.save_pretrained(folder / name)
        found[name] = str(folder / name)
    return found


def test_adapters_are_loaded_and_unloaded(model, adapters):
    arguments = OpenAIArguments(
        model_name_or_path=model, served_model_name="base", max_new_tokens=8, allow_lora_updates=True
    )
    engine = engine_from(arguments, by_name=True, changeable=True)
    with batcher_from(engine, arguments) as batcher:
        page = TestClient(make_app(Service(arguments, engine, batcher, None)), "http://localhost")

        def names() -> list[str]:
            return [each["id"] for each in page.get("/v1/models").json()["data"]]

        def text(name: str) -> str:
            return post(page, "/v1/completions", model=name, prompt="abc").json()["choices"][0]["text"]

        def scores(name: str) -> list[float]:
            fields = {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": "abcdef"}
            return post(page, "/v1/completions", model=name, **fields).json()["choices"][0]["logprobs"][
                "token_logprobs"
            ][1:]

        own, own_scores = text("base"), scores("base")
        for name, path in adapters.items():
            done = post(page, "/v1/load_lora_adapter", lora_name=name, lora_path=path)
            assert done.text == f"Success: LoRA adapter '{name}' added successfully."
        assert names() == ["base", "a", "b"]
        texts = {name: text(name) for name in names()}
        assert texts["base"] == own and len(set(texts.values())) == 3
        alone = ChatEngine.from_pretrained(model, lora_model=adapters["b"])
        assert texts["b"] == alone.generate([_completion(alone, "abc", 8)])[0].text
        assert scores("base") == pytest.approx(own_scores) and scores("a") != pytest.approx(own_scores, abs=1e-2)
        for fields, status, reason in (
            ({"lora_name": "a", "lora_path": adapters["a"]}, 400, "already"),
            ({"lora_name": "c", "lora_path": "/nowhere"}, 400, "/nowhere"),
        ):
            assert reason in post(page, "/v1/load_lora_adapter", status, **fields).json()["error"]["message"]
        assert post(page, "/v1/unload_lora_adapter", 404, lora_name="c")
        assert "no adapter" in post(page, "/v1/unload_lora_adapter", 400, lora_name="base").text
        for name in adapters:
            post(page, "/v1/unload_lora_adapter", lora_name=name)
            post(page, "/v1/completions", 404, model=name, prompt="abc")
        assert names() == ["base"] and text("base") == own
        post(page, "/v1/load_lora_adapter", lora_name="b", lora_path=adapters["b"])
        assert text("b") == texts["b"]


def _completion(engine: ChatEngine, text: str, tokens: int):
    from medicalgpt.serving.generation import GenerationRequest, Sampling

    return GenerationRequest(engine.completion_ids(text), Sampling(max_new_tokens=tokens))


def test_adapters_stay_without_the_flag(client):
    for path, fields in (("load", {"lora_name": "a", "lora_path": "b"}), ("unload", {"lora_name": "a"})):
        error = post(client, f"/v1/{path}_lora_adapter", 403, **fields).json()["error"]
        assert "--allow_lora_updates" in error["message"]
