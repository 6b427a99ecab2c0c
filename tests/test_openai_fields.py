"""Fields of the OpenAI interface: without effect, sampling, answers held to a schema, calls, reasoning."""

import json
import math
import re
from collections.abc import Iterator

from medicalgpt.models.tool_formats import TOOL_FORMATS
from medicalgpt.serving.answer_parts import CallPiece, CallReader, ThoughtReader, split_thoughts
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import AnswerState, GenerationRequest, Sampling
from medicalgpt.serving.guides import GuideError, GuideMaker, call_grammar, json_grammar, text_or_call_grammar
from openai_api import OpenAIArguments, Service, make_app
from tests.tiny import make_tiny, tiny_tokenizer

import pytest
import torch
from starlette.testclient import TestClient

ASK = [{"role": "user", "content": "x"}]
PERSON = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 9}, "kind": {"enum": ["a", "b"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
WORD = {
    "type": "object",
    "properties": {"word": {"enum": ["感冒", "咳嗽"]}, "count": {"type": "integer", "minimum": 1, "maximum": 3}},
    "required": ["word", "count"],
    "additionalProperties": False,
}
LOOK_UP = {"type": "function", "function": {"name": "look_up", "parameters": WORD}}
OTHER = {"type": "function", "function": {"name": "other", "parameters": PERSON}}
# 260 tokens, of one byte each, and the special ones.
VOCABULARY = 260


def schema_format(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> ChatEngine:
    return ChatEngine.from_pretrained(make_tiny(tmp_path_factory.mktemp("model"), max_position_embeddings=4096))


@pytest.fixture(scope="module")
def service(engine) -> Iterator[Service]:
    batcher = make_batcher(engine)
    arguments = OpenAIArguments(model_name_or_path="tiny", max_new_tokens=20)
    yield Service(arguments, engine, batcher, None)
    batcher.close(finish=False)


@pytest.fixture(scope="module")
def client(service) -> TestClient:
    return TestClient(make_app(service), "http://localhost")


def chat(client: TestClient, **fields):
    return client.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **fields})


def message(client: TestClient, **fields) -> dict:
    response = chat(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]


def chunks(response) -> list[dict]:
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# --- fields without effect -------------------------------------------------------------------------------------------


def test_fields_without_effect(client):
    plain = message(client, max_tokens=5)
    neutral = {
        **{"service_tier": "auto", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"a": "b"}},
        **{"store": True, "user": "u", "modalities": ["text"], "reasoning_effort": "low", "verbosity": "medium"},
        **{"use_beam_search": False, "functions": None, "logit_bias": {}, "presence_penalty": 0, "min_p": 0},
    }
    response = chat(client, max_tokens=5, **neutral)
    assert response.json()["choices"][0]["message"] == plain
    assert "x-ignored-fields" not in response.headers


def test_fields_of_messages_without_effect(client):
    call = {"id": "1", "function": {"name": "look_up", "arguments": "{}"}}
    bare = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "t", "tool_calls": [{**call, "type": "function"}]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "x"},
    ]
    cached = {"type": "ephemeral"}
    full = [
        {"role": "system", "content": [{"type": "text", "text": "s", "cache_control": cached}], "name": "n"},
        {"role": "user", "content": [{"type": "text", "text": "q", "cache_control": cached}], "name": "n"},
        {
            **{"role": "assistant", "content": "t", "name": "n", "reasoning_content": "hm", "refusal": None},
            "tool_calls": [{**call, "type": "function", "index": 0}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1", "name": "look_up"},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "done"}],
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
        },
        {"role": "user", "content": "x", "name": "n"},
    ]
    answers = [chat(client, messages=each, tools=[LOOK_UP], max_tokens=5) for each in (bare, full)]
    # The template of this model knows no reasoning, so that of earlier answers is left out.
    assert answers[0].json()["usage"] == answers[1].json()["usage"]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_unknown_fields_are_named(client):
    body = {"max_token": 3, "messages": [{**ASK[0], "nam": "n"}], "tools": [{**LOOK_UP, "extra": 1}], "max_tokens": 2}
    for stream in (False, True):
        response = chat(client, stream=stream, **body)
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "max_token, messages[0].nam, tools[0].extra"
    # Of names that clients make up, few and short ones.
    made_up = chat(client, **{"é\n" * 500: 1, **{f"f{number}": 1 for number in range(100)}}, max_tokens=1)
    assert 500 < len(made_up.headers["x-ignored-fields"]) < 4000
    raw = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1, "promt": "y"})
    assert raw.headers["x-ignored-fields"] == "promt"


def test_strict_fields(client, service, monkeypatch):
    monkeypatch.setattr(service.arguments, "strict_fields", True)
    error = chat(client, max_token=3).json()["error"]
    assert error["param"] == "max_token" and "did you mean max_tokens" in error["message"]


@pytest.mark.parametrize(
    "field, value, reason",
    [
        ("guided_json", {}, "response_format"),
        ("min_tokens", 30, "above the 20 tokens"),
        ("stop_token_ids", [1], "use stop"),
        ("functions", [{"name": "f"}], "use tools"),
        ("modalities", ["audio"], "answers are text"),
        ("use_beam_search", True, "beams"),
        ("continue_final_message", True, "/v1/completions"),
        ("chat_template", "{{ x }}", "--template_name"),
    ],
)
def test_fields_that_would_change_the_answer_are_refused_with_a_way_out(client, field, value, reason):
    response = chat(client, **{field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field) and reason in error["message"]


# --- sampling --------------------------------------------------------------------------------------------------------


def test_n_and_top_p_without_a_temperature_mean_temperature_1(client):
    def texts(**fields) -> list[str]:
        return [
            choice["message"]["content"] for choice in chat(client, max_tokens=8, seed=3, **fields).json()["choices"]
        ]

    assert texts(n=3) == texts(n=3, temperature=1) and len(set(texts(n=3))) == 3
    assert texts(top_p=0.9) == texts(top_p=0.9, temperature=1) != texts()
    assert texts(n=1, top_p=1) == texts(temperature=0)


def test_least_tokens(client, engine):
    """A bias makes the model end at once, unless it must not."""
    (end,) = {engine.tokenizer.eos_token_id}
    ended = {"logit_bias": {str(end): 100}, "max_tokens": 6}
    lengths = [
        chat(client, **ended, **fields).json()["usage"]["completion_tokens"]
        for fields in ({}, {"min_tokens": 3}, {"ignore_eos": True})
    ]
    assert lengths == [1, 4, 6]
    refused = chat(client, ignore_eos=True, response_format={"type": "json_object"})
    assert refused.status_code == 400 and "where the schema ends it" in refused.text


def chosen_scores(engine: ChatEngine, scores: list[float], answer: list[int], **settings) -> list[float]:
    """Scores after the settings of a greedy request; prompt [0, 1]."""
    state = AnswerState(
        GenerationRequest([0, 1], Sampling(**settings)),
        engine.tokenizer,
        **{"special_ids": {}, "stop_ids": frozenset(), "stop_strings": (), "context_length": None},
        device=torch.device("cpu"),
    )
    changed = torch.tensor(scores)
    state.choose(changed, lambda: torch.tensor([0, 1, *answer]))
    return changed.tolist()


def test_penalties_and_biases_by_hand(engine):
    # OpenAI: the count of a token in the answer times the frequency penalty, and the presence penalty once.
    scores, answer = [1.0, 2.0, -1.0, 4.0], [2, 3, 3]
    assert chosen_scores(engine, scores, answer, presence_penalty=0.5) == pytest.approx([1, 2, -1.5, 3.5])
    assert chosen_scores(engine, scores, answer, frequency_penalty=0.25) == pytest.approx([1, 2, -1.25, 3.5])
    both = chosen_scores(engine, scores, answer, presence_penalty=-1, frequency_penalty=1)
    assert both == pytest.approx([1, 2, -1, 3])
    # The factor counts for the prompt as well, and lowers negative scores too.
    assert chosen_scores(engine, scores, answer, repetition_penalty=2) == pytest.approx([0.5, 1, -2, 2])
    assert chosen_scores(engine, scores, answer, logit_bias=((0, 100), (3, -2.5))) == pytest.approx([101, 2, -1, 1.5])
    # The bias comes before the factor.
    assert chosen_scores(engine, scores, [], logit_bias=((0, 3),), repetition_penalty=2)[0] == pytest.approx(2)


def test_min_p_by_hand(engine):
    # Probabilities 0.5, 0.3, 0.15, 0.05; of the best, 0.29 is 0.145.
    scores = [math.log(share) for share in (0.5, 0.3, 0.15, 0.05)]
    kept = chosen_scores(engine, scores, [], temperature=1.0, min_p=0.29, seed=0)
    assert [math.isfinite(score) for score in kept] == [True, True, True, False]
    # At twice the temperature, the shares of the best are their square roots: 1, 0.77, 0.55, 0.32.
    kept = chosen_scores(engine, scores, [], temperature=2.0, min_p=0.56, seed=0)
    assert [math.isfinite(score) for score in kept] == [True, True, False, False]
    assert all(math.isfinite(score) for score in chosen_scores(engine, scores, [], temperature=1.0, seed=0))


def test_sampling_fields_of_the_interface(client):
    # "A" is byte 65; a bias of 100 forces it, and penalties then stop it.
    known = client.post("/tokenize", json={"model": "tiny", "prompt": "A"}).json()["tokens"][0]
    forced = {"logit_bias": {str(known): 100}, "max_tokens": 4}
    assert message(client, **forced)["content"] == "AAAA"
    assert message(client, **forced, frequency_penalty=-2, presence_penalty=-2)["content"] == "AAAA"
    plain = message(client, max_tokens=12)["content"]
    assert message(client, max_tokens=12, repetition_penalty=10)["content"] != plain
    wrong = chat(client, logit_bias={str(VOCABULARY): 1})
    assert wrong.status_code == 400 and "from 0 to 259" in wrong.text
    for field in ({"logit_bias": {"5": 101}}, {"logit_bias": {"a": 1}}, {"presence_penalty": 3}, {"min_p": 2}):
        assert chat(client, **field).status_code == 400


# --- answers held to a schema ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 2])
def test_json_of_a_schema(client, temperature):
    """The model has random weights: only the grammar makes this JSON."""
    settings = {"temperature": temperature, "seed": 1, "max_tokens": 400}
    response = chat(client, response_format=schema_format(PERSON), **settings)
    (choice,) = response.json()["choices"]
    found = json.loads(choice["message"]["content"])
    assert set(found) == {"age", "kind"} and found["age"] in range(10) and found["kind"] in "ab"
    assert choice["finish_reason"] == "stop"
    streamed = chunks(chat(client, response_format=schema_format(PERSON), stream=True, **settings))
    pieces = [chunk["choices"][0]["delta"].get("content") for chunk in streamed]
    assert "".join(filter(None, pieces)) == choice["message"]["content"] and len(list(filter(None, pieces))) > 3


def test_answers_of_a_batch_follow_their_own_grammars(engine):
    """In a static batch, and alone. The model of the server attends to pages."""
    engine = ChatEngine.from_pretrained(engine.tokenizer.name_or_path)
    maker = GuideMaker(engine.tokenizer, VOCABULARY, engine.stop_ids)
    guides = [maker.guide(json_grammar({"enum": [word]}, {})) for word in ("one", "two and more")]
    requests = [
        GenerationRequest(engine.prompt_ids(ASK), Sampling(max_new_tokens=20), guide=guide) for guide in (*guides, None)
    ]
    one, two, free = engine.generate(requests)
    assert [one.text, two.text] == ['"one"', '"two and more"']
    assert free.text == engine.generate(requests[2:])[0].text


def test_an_answer_that_is_cut_off_comes_with_its_text(client):
    for format_ in (schema_format(PERSON), {"type": "json_object"}):
        (choice,) = chat(client, response_format=format_, max_tokens=1).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("{", "length")


@pytest.mark.parametrize(
    "schema, reason",
    [
        ({"type": "objct"}, "Invalid type: objct"),
        ({"not": {"type": "string"}}, 'Unimplemented keys: \\["not"\\]'),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"type": "string", "pattern": "(?=a)"}, "regex"),
        ({"enum": ["x" * 200_000]}, "at most 100000"),
    ],
)
def test_a_schema_that_cannot_be_followed(client, schema, reason):
    response = chat(client, response_format=schema_format(schema))
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "response_format")
    assert re.search(reason, error["message"])


def test_grammars_are_compiled_once():
    maker = GuideMaker(tiny_tokenizer(), VOCABULARY, [1])
    assert maker.guide(json_grammar(PERSON, {})) is maker.guide(json_grammar(PERSON, {}))
    with pytest.raises(GuideError, match="no fast version"):
        GuideMaker(tiny_tokenizer(), VOCABULARY, []).guide(json_grammar(PERSON, {}))


# --- tools -----------------------------------------------------------------------------------------------------------


def test_forced_calls(client):
    settings = {"tools": [LOOK_UP, OTHER], "temperature": 2, "seed": 4, "max_tokens": 600}
    named = {"type": "function", "function": {"name": "look_up"}}
    for choice in ("required", named):
        response = chat(client, tool_choice=choice, parallel_tool_calls=False, **settings).json()["choices"][0]
        assert response["finish_reason"] == "tool_calls", response
        (call,) = response["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        schema = {"look_up": WORD, "other": PERSON}[call["function"]["name"]]
        assert set(arguments) == set(schema["required"])
    assert call["function"]["name"] == "look_up"
    cut = chat(client, tool_choice="required", **settings | {"max_tokens": 11}).json()["choices"][0]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("<tool_call>", "length")


def test_calls_are_streamed_piece_by_piece(client):
    settings = {"tools": [LOOK_UP], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 600}
    response = chat(client, stream=True, **settings)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks(response)]
    pieces = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert {piece["index"] for piece in pieces} == {0}
    assert pieces[0]["function"] == {"name": "look_up", "arguments": ""} and pieces[0]["id"].startswith("call_")
    assert len(pieces) > 5 and all(set(piece) == {"index", "function"} for piece in pieces[1:])
    whole = message(client, **settings)["tool_calls"][0]["function"]["arguments"]
    assert json.loads("".join(piece["function"]["arguments"] for piece in pieces)) == json.loads(whole)
    assert not any(delta.get("content") for delta in deltas)
    assert chunks(response)[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_or_json(client):
    """With tools and a format, the answer is one or the other."""
    settings = {"tools": [LOOK_UP], "response_format": schema_format(PERSON), "temperature": 2, "max_tokens": 600}
    kinds = set()
    for seed in range(12):
        found = message(client, seed=seed, parallel_tool_calls=False, **settings)
        kinds.add("call" if found.get("tool_calls") else "json")
        assert found.get("tool_calls") or set(json.loads(found["content"])) == {"age", "kind"}
        if len(kinds) == 2:
            break
    assert kinds == {"call", "json"}


CALLS = {
    "default": 'Action: look_up\nAction Input: {"word": "感冒", "count": 2}',
    "qwen": '<tool_call>\n{"name": "look_up", "arguments": {"word": "感冒", "count": 2}}\n</tool_call>',
    "llama3": '{"name": "look_up", "parameters": {"word": "感冒", "count": 2}}',
    "glm4": 'look_up\n{"word": "感冒", "count": 2}',
    "mistral": '[TOOL_CALLS] [{"name": "look_up", "arguments": {"word": "感冒", "count": 2}}]',
    "qwen3_5": "<tool_call>\n<function=look_up>\n<parameter=word>\n感冒\n</parameter>\n<parameter=count>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "deepseek3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n"
    '{"word": "感冒", "count": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
}


def follows(maker: GuideMaker, grammar: str, text: str) -> bool:
    """Whether a text is an answer of the grammar."""
    answer, ids = maker.guide(grammar).begin(), tiny_tokenizer()(text, add_special_tokens=False).input_ids
    for length in range(len(ids) + 1):
        scores = torch.zeros(VOCABULARY)
        answer.restrict(scores, torch.tensor(ids[:length], dtype=torch.long))
        if length < len(ids) and not math.isfinite(scores[ids[length]]):
            return False
    return math.isfinite(scores[tiny_tokenizer().eos_token_id])


@pytest.fixture(scope="module")
def maker() -> GuideMaker:
    tokenizer = tiny_tokenizer()
    return GuideMaker(tokenizer, VOCABULARY, [tokenizer.eos_token_id])


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_grammar_of_each_tool_format(maker, name):
    form, tools = TOOL_FORMATS[name], {"look_up": WORD, "other": PERSON}
    grammar = call_grammar(form.shape, tools, {}, "possible")
    assert follows(maker, grammar, CALLS[name])
    assert follows(maker, grammar, f"<think>\nhm {{}}\n</think>\n\n{CALLS[name]}")
    assert not follows(maker, grammar, "Hello.")
    assert not follows(maker, grammar, CALLS[name].replace("look_up", "unknown"))
    assert not follows(maker, grammar, CALLS[name].replace("2", "7"))
    _, (call,) = form.parse(CALLS[name], [LOOK_UP])
    assert call["function"] == {"name": "look_up", "arguments": {"word": "感冒", "count": 2}}
    begun = call_grammar(form.shape, tools, {}, "begun")
    assert follows(maker, begun, f"hm</think>\n{CALLS[name]}") and not follows(maker, begun, CALLS[name])
    if form.shape.between is not None and not form.shape.end:
        twice = form.shape.between.join([CALLS[name]] * 2)
        assert follows(maker, grammar, twice)
        assert not follows(maker, call_grammar(form.shape, tools, {}, parallel=False), twice)
    if form.shape.trigger:
        free = text_or_call_grammar(form.shape, tools, {})
        for text in ("Hello < [ .", CALLS[name], f"Hello.\n{CALLS[name]}"):
            assert follows(maker, free, text)
        assert not follows(maker, free, CALLS[name].replace("2", "7"))


def test_marks_that_are_special_tokens():
    tokenizer = tiny_tokenizer()
    maker = GuideMaker(tokenizer, VOCABULARY, [tokenizer.eos_token_id])
    mark = tokenizer.convert_tokens_to_ids("<|im_start|>")
    answer = maker.guide(
        call_grammar(
            TOOL_FORMATS["qwen"].shape,
            {"a": PERSON},
            {"<tool_call>": mark},
        )
    ).begin()
    scores = torch.zeros(VOCABULARY)
    answer.restrict(scores, torch.tensor([], dtype=torch.long))
    assert scores.isfinite().nonzero()[:, 0].tolist() == [mark]


def test_strict_tools_without_a_mark_have_to_be_forced(client, service, monkeypatch):
    (model,) = service.models.values()
    strict = [{"type": "function", "function": {**LOOK_UP["function"], "strict": True}}]
    assert chat(client, tools=strict, max_tokens=3).status_code == 200
    monkeypatch.setattr(model, "form", TOOL_FORMATS["llama3"])
    response = chat(client, tools=strict)
    assert response.status_code == 400 and "tool_choice to required" in response.text


@pytest.mark.parametrize("name", [name for name, form in TOOL_FORMATS.items() if form.shape.head])
def test_pieces_of_a_call(name):
    reader, found = CallReader(TOOL_FORMATS[name], {"look_up"}, thoughts_begun=False), []
    text = f"Well.\n{CALLS[name]}"
    for length in range(1, len(text) + 1):
        found += reader.feed(text[:length])
    assert found[0] == CallPiece(0, "look_up") and len(found) > 20
    assert json.loads("".join(piece.arguments for piece in found)) == {"word": "感冒", "count": 2}


def test_calls_in_reasoning_or_of_unknown_tools_are_not_streamed():
    form = TOOL_FORMATS["qwen"]
    assert CallReader(form, {"other"}, False).feed(CALLS["qwen"]) == []
    assert CallReader(form, {"look_up"}, False).feed(f"<think>{CALLS['qwen']}") == []
    reader = CallReader(form, {"look_up"}, True)
    assert reader.feed(CALLS["qwen"]) == []
    pieces = reader.feed(f"{CALLS['qwen']}</think>\n{CALLS['qwen']}\n{CALLS['qwen']}")
    assert [piece.index for piece in pieces if piece.name] == [0, 1]


# --- reasoning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, begun, thought, said",
    [
        ("<think>\nhm\n\nso\n</think>\n\nYes.\n", False, "hm\n\nso", "Yes.\n"),
        ("<think>\n\n</think>\n\nYes.", False, "", "Yes."),
        ("hm\n</think>\nYes.", True, "hm", "Yes."),
        ("never ends", True, "never ends", ""),
        ("<think>cut", False, "cut", ""),
        ("<thin", False, "", "<thin"),
        ("\n<think>a</think>b", False, "a", "b"),
        ("Yes <think> no </think>", False, "", "Yes <think> no </think>"),
    ],
)
def test_reasoning_apart(text, begun, thought, said):
    assert split_thoughts(text, begun) == (thought, said)
    reader = ThoughtReader(begun)
    pieces = [reader.feed(char) for char in text] + [reader.feed("", last=True)]
    assert ["".join(each) for each in zip(*pieces, strict=True)] == [thought, said]
