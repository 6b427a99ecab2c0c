"""Servers against their own OpenAPI schema: whatever is sent, it is answered or refused, never an error inside."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from fastapi_server_demo import ServerArguments, build_app
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.embeddings import Encoder
from medicalgpt.serving.engines import engine_from
from openai_api import OpenAIArguments, Service, make_app
from tests.tiny import make_tiny, save_encoder

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import sampled_from
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient
from transformers import AutoModelForCausalLM

LOCAL = {"Host": "localhost"}
MODEL = {"model": "tiny"}
# What is put right in generated bodies: a model that is not there, say, hides all that lies behind it.
RIGHT = {
    "/v1/chat/completions": [{}, MODEL, {**MODEL, "messages": [{"role": "user", "content": "x"}]}],
    "/v1/completions": [{}, MODEL, {**MODEL, "prompt": "x"}],
    "/v1/responses": [{}, MODEL, {**MODEL, "input": "x"}],
    "/tokenize": [{}, MODEL, {**MODEL, "prompt": "x"}],
    "/detokenize": [{}, MODEL, {**MODEL, "tokens": [1]}],
    **{path: [{}] for path in ("/v1/embeddings", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")},
    **{path: [{}] for path in ("/v1/models", "/v1/models/{model}", "/health", "/metrics")},
}


# What this server answers to the right request, if not 200: it has no encoder, and its adapters stay.
EXPECTED = {
    **{"/v1/models/{model}": 404, "/v1/embeddings": 501},
    **{"/v1/load_lora_adapter": 403, "/v1/unload_lora_adapter": 403},
}
# The bodies with many fields are tried more often.
EXAMPLES = {"/v1/chat/completions": 120, "/v1/completions": 120, "/v1/responses": 80}


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TestClient]:
    engine = ChatEngine.from_pretrained(make_tiny(tmp_path_factory.mktemp("model")))
    batcher = make_batcher(engine)
    arguments = OpenAIArguments(model_name_or_path="tiny", max_new_tokens=3, max_tokens_limit=8)
    yield TestClient(make_app(Service(arguments, engine, batcher, None)), "http://localhost")
    batcher.close(finish=False)


@pytest.fixture(scope="module")
def operations(client) -> dict[str, schemathesis.schemas.APIOperation]:
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=LOCAL)
    return {operation.ok().path: operation.ok() for operation in schema.get_all_operations()}


def test_every_route_is_tried(operations):
    assert sorted(operations) == sorted(RIGHT)


def send_anything(operation, right, examples: int, look) -> Counter:
    """Send requests as the schema describes them, and wrong ones; `look` sees each response. Returns the statuses."""
    statuses = Counter()
    cases = operation.as_strategy()
    if operation.method == "post":
        cases |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=cases, right=sampled_from(right))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case, right):
        if isinstance(case.body, dict):
            case.body = case.body | right
        response = case.call(headers=LOCAL)
        statuses[response.status_code] += 1
        look(case, response)

    send()
    return statuses


def no_server_error(case, response) -> None:
    case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("route", RIGHT)
def test_no_error_inside(client, operations, route):
    expected = EXPECTED.get(route, 200)

    def look(case, response):
        if response.status_code != expected:
            no_server_error(case, response)

    statuses = send_anything(operations[route], RIGHT[route], EXAMPLES.get(route, 30), look)
    assert statuses[expected] > 0, statuses


def test_no_error_inside_with_an_encoder_and_adapters_that_change(tmp_path):
    """The routes that a server has only with flags, and questions to a model that may have just been unloaded."""
    model, adapter = make_tiny(tmp_path / "model"), str(tmp_path / "adapter")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(adapter)
    arguments = OpenAIArguments(
        model_name_or_path=model,
        served_model_name="tiny",
        max_tokens_limit=8,
        max_new_tokens=3,
        allow_lora_updates=True,
    )
    encoder = Encoder(save_encoder(tmp_path / "encoder"), "encoder")
    engine = engine_from(arguments, by_name=True, changeable=True)
    with make_batcher(engine) as batcher, closing(encoder):
        client = TestClient(make_app(Service(arguments, engine, batcher, None, encoder)), "http://localhost")
        schema = schemathesis.openapi.from_asgi("/openapi.json", client.app, headers=LOCAL)
        operations = {operation.ok().path: operation.ok() for operation in schema.get_all_operations()}
        loading = {"lora_name": "a", "lora_path": adapter}
        for route, right in (
            ("/v1/embeddings", [{}, {"model": encoder.name, "input": "x"}, {"model": encoder.name}]),
            ("/v1/load_lora_adapter", [{}, loading, {"lora_path": adapter}, {"lora_name": "a"}]),
            ("/v1/chat/completions", [{**RIGHT["/v1/chat/completions"][2], "model": "a"}]),
            ("/v1/unload_lora_adapter", [{}, {"lora_name": "a"}]),
            ("/v1/models/{model}", [{}]),
        ):
            statuses = send_anything(operations[route], right, 40, no_server_error)
            assert route == "/v1/models/{model}" or statuses[200] > 0, (route, statuses)


def test_no_error_inside_of_the_small_server(tmp_path):
    engine = ChatEngine.from_pretrained(make_tiny(tmp_path))
    arguments = ServerArguments(model_name_or_path="tiny", max_new_tokens=3)
    with make_batcher(engine) as batcher:
        app = build_app(batcher, arguments, None)
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=LOCAL)
        for found in schema.get_all_operations():
            operation = found.ok()
            right = [{}, {"input": "x"}] if operation.path == "/chat" else [{}, {"inputs": ["x"]}]

            def look(case, response):
                case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
                assert response.status_code < 400 or set(response.json()) == {"detail"}

            statuses = send_anything(operation, right, 25, look)
            assert statuses[200] > 0, (operation.path, statuses)
