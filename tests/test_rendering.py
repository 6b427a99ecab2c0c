"""A prompt is rendered once on its way from a conversation to the engine, whichever program asks."""

from collections import Counter

import inference
from eval_pipeline import answer_questions
from medicalgpt.evaluation.held_out import Question
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from openai_api import OpenAIArguments, Service, make_app
from tests.helpers import run_here, write_jsonl
from tests.tiny import make_tiny

import pytest
from starlette.testclient import TestClient
from transformers import PreTrainedTokenizerBase

TEXTS = ["hello", "how are you?", "你好", "x" * 40, "bye"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rendered(monkeypatch) -> Counter:
    """How often each conversation was rendered, by its last text; probes of the template are not counted."""
    counts: Counter = Counter()
    render = PreTrainedTokenizerBase.apply_chat_template

    def counted(self, conversation, *args, **kwargs):
        if conversation[-1]["content"] in TEXTS:
            counts[conversation[-1]["content"]] += 1
        return render(self, conversation, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", counted)
    return counts


def test_inference_renders_each_row_of_a_file_once(model, rendered, tmp_path):
    rows = write_jsonl(tmp_path / "q.jsonl", [{"question": text} for text in TEXTS])
    flags = ("--data_file", rows, "--output_file", tmp_path / "a.jsonl", "--batch_size", 2, "--max_new_tokens", 3)
    run_here("inference.py", "--model_name_or_path", model, *flags)
    assert rendered == Counter(TEXTS)


def test_inference_renders_each_turn_of_a_conversation_once(model, rendered, monkeypatch):
    monkeypatch.setattr(inference, "read_lines", lambda: iter(TEXTS))
    inference.talk(ChatEngine.from_pretrained(model), inference.Sampling(max_new_tokens=3), None)
    assert rendered == Counter(TEXTS)


@pytest.mark.parametrize("more", [{}, {"n": 3, "temperature": 1.0}, {"stream": True}])
def test_the_api_renders_each_request_once(model, rendered, more):
    engine = ChatEngine.from_pretrained(model)
    with make_batcher(engine) as batcher:
        service = Service(OpenAIArguments(model_name_or_path="tiny"), engine, batcher, None)
        client = TestClient(make_app(service), "http://localhost")
        for text in TEXTS:
            body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **more}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert rendered == Counter(TEXTS)


def test_evaluation_renders_each_question_once(model, rendered):
    questions = [
        Question(f"rows.jsonl:{n}", "all", [{"role": "user", "content": text}], None, "?")
        for n, text in enumerate(TEXTS, 1)
    ]
    answers = answer_questions(ChatEngine.from_pretrained(model), questions, max_new_tokens=3, batch_size=2)
    assert len(answers) == len(TEXTS) and rendered == Counter(TEXTS)
