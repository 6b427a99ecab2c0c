"""openai_api.py against its own OpenAPI schema: whatever is sent, it is answered or refused, never an error inside."""

from collections import Counter
from collections.abc import Iterator

from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from openai_api import OpenAIArguments, Service, make_app
from tests.tiny import make_tiny

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import sampled_from
from starlette.testclient import TestClient

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


@pytest.mark.parametrize("route", RIGHT)
def test_no_error_inside(client, operations, route):
    statuses = Counter()
    operation = operations[route]
    cases = operation.as_strategy()
    if operation.method == "post":
        cases |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

    @given(case=cases, right=sampled_from(RIGHT[route]))
    @settings(
        max_examples=EXAMPLES.get(route, 30),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def send(case, right):
        if isinstance(case.body, dict):
            case.body = case.body | right
        response = case.call(headers=LOCAL)
        if response.status_code != EXPECTED.get(route):
            case.validate_response(response, checks=[schemathesis.checks.not_a_server_error])
        statuses[response.status_code] += 1
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}

    send()
    assert statuses[EXPECTED.get(route, 200)] > 0, statuses
