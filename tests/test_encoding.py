"""From rows to token ids, blocks and batches: no token lost, none added, none seen by the wrong neighbour."""

from medicalgpt.args import DataArguments
from medicalgpt.data.encoding import (
    IGNORED,
    EncodingError,
    Sample,
    encode_chat,
    encode_document,
    encode_prompt,
    render_prompts,
)
from medicalgpt.data.loading import FileAccount, LoadedData
from medicalgpt.data.tokenizing import encode_rows
from medicalgpt.readers.problems import Place
from template import apply_template
from tests.helpers import chat
from tests.tiny import tiny_tokenizer

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

TEXT = "感冒 is a cold.\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def loaded(rows) -> LoadedData:
    """Rows of one file that has no other."""
    rows = [{**row, "place": Place("f", number)._asdict()} for number, row in enumerate(rows, start=1)]
    return LoadedData(rows, [], {"train": [FileAccount("f", "", rows=len(rows))], "validation": []})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def own_specials():
    """A tokenizer that adds special tokens by itself, as Llama's (start) and T5's (end) do."""

    def make(start: bool, end: bool):
        tokenizer = tiny_tokenizer()
        tokenizer.bos_token = "<|im_start|>"
        ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", tokenizer.eos_token)]
        template = f"{'<|im_start|> ' if start else ''}$A{' ' + tokenizer.eos_token if end else ''}"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=ends)
        return tokenizer

    return make


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("end", [False, True])
def test_a_document_has_one_start_and_one_end(own_specials, start, end):
    tokenizer = own_specials(start, end)
    (sample,) = encode_document(tokenizer, {"text": TEXT}, block_size=1000)
    body = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    expected = [tokenizer.bos_token_id] * start + body + [tokenizer.eos_token_id]
    assert sample == Sample(expected, expected)


def test_a_document_without_end_token(tokenizer):
    (sample,) = encode_document(tokenizer, {"text": TEXT}, block_size=1000, end=False)
    assert tokenizer.decode(sample.input_ids) == TEXT


@pytest.mark.parametrize("block_size", [1, 7, 20, 21, 1000])
def test_pieces_of_a_document_lose_nothing(tokenizer, block_size):
    (whole,) = encode_document(tokenizer, {"text": TEXT}, block_size=10_000)
    pieces = encode_document(tokenizer, {"text": TEXT}, block_size=block_size)
    assert [token for piece in pieces for token in piece.input_ids] == whole.input_ids
    assert all(piece.labels == piece.input_ids for piece in pieces)
    assert {len(piece.input_ids) for piece in pieces[:-1]} <= {block_size}
    assert 0 < len(pieces[-1].input_ids) <= block_size


# --- conversations ---------------------------------------------------------------------------------------------------


def test_only_answers_and_turn_ends_are_supervised(tokenizer):
    (sample,) = encode_chat(tokenizer, chat([user("问"), assistant("答"), user("Q"), assistant("A")]))
    trained = [token for token in sample.labels if token != IGNORED]
    assert tokenizer.decode(trained) == "答<|im_end|>A<|im_end|>"
    assert [i for i, label in zip(sample.input_ids, sample.labels, strict=True) if label != IGNORED] == trained
    (everything,) = encode_chat(tokenizer, chat([user("问"), assistant("答")]), train_on_inputs=True)
    assert everything.labels == everything.input_ids


def trained_texts(tokenizer, samples):
    return [tokenizer.decode([label for label in sample.labels if label != IGNORED]) for sample in samples]


def test_without_history_the_last_answer_alone_is_trained(tokenizer):
    row = chat([user("问"), assistant("答"), user("Q"), assistant("A")])
    samples = encode_chat(tokenizer, row, mask_history=True)
    assert trained_texts(tokenizer, samples) == ["A<|im_end|>"]
    assert samples[0].input_ids == encode_chat(tokenizer, row)[0].input_ids


def test_an_answer_that_is_context_is_not_trained(tokenizer):
    row = chat([user("Q1"), {**assistant("bad"), "train": False}, user("Q2"), assistant("good")])
    (sample,) = encode_chat(tokenizer, row)
    assert trained_texts(tokenizer, [sample]) == ["good<|im_end|>"]
    plain = chat([{name: item for name, item in turn.items() if name != "train"} for turn in row["messages"]])
    assert sample.input_ids == encode_chat(tokenizer, plain)[0].input_ids
    assert trained_texts(tokenizer, encode_chat(tokenizer, plain)) == ["bad<|im_end|>good<|im_end|>"]
    (inputs,) = trained_texts(tokenizer, encode_chat(tokenizer, row, train_on_inputs=True))
    assert "bad" not in inputs and "Q2" in inputs
    row = chat([user("Q1"), assistant("good"), user("Q2"), {**assistant("bad"), "train": False}])
    assert trained_texts(tokenizer, encode_chat(tokenizer, row)) == ["good<|im_end|>"]
    # With the prompts, the one before the last answer is trained too: up to the answer, which is not there at all.
    (sample,) = encode_chat(tokenizer, row, train_on_inputs=True)
    assert sample.labels == sample.input_ids == encode_prompt(tokenizer, chat(row["messages"][:3]))[0].prompt_ids
    with pytest.raises(EncodingError, match="its last answer is not to be trained on"):
        encode_chat(tokenizer, row, mask_history=True)


def test_the_assistant_may_begin(tokenizer):
    row = chat([{**assistant("Hello."), "train": False}, user("Q"), assistant("A")])
    assert trained_texts(tokenizer, encode_chat(tokenizer, row)) == ["A<|im_end|>"]


def test_system_turns_in_the_middle_and_empty_ones_are_kept(tokenizer):
    turns = [user("Q1"), assistant("A1"), {"role": "system", "content": "Brief."}, user("Q2"), assistant("A2")]
    (sample,) = encode_chat(tokenizer, chat([{"role": "system", "content": ""}, *turns]))
    text = tokenizer.decode(sample.input_ids)
    assert (
        text.startswith("<|im_start|>system\n<|im_end|>\n") and "system\nBrief.<|im_end|>\n<|im_start|>user\nQ2" in text
    )


def test_what_a_template_would_leave_out_is_refused():
    """Templates of models often skip what they do not know, without a word."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' ~ m.role ~ ':' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content ~ '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content ~ '<|im_end|>' }}"
        "{% endif %}{% endfor %}{{ '<|im_start|>assistant:' if add_generation_prompt }}"
    )
    thinking = {**assistant("A"), "reasoning_content": "hm"}
    with pytest.raises(EncodingError, match="leaves out the reasoning of turn 2"):
        encode_chat(tokenizer, chat([user("Q"), thinking]))
    with pytest.raises(EncodingError, match=r"leaves out turn 1 \(system\)"):
        encode_chat(tokenizer, chat([{"role": "system", "content": "Brief."}, user("Q"), assistant("A")]))
    assert encode_chat(tokenizer, chat([{"role": "system", "content": ""}, user("Q"), assistant("A")]))


def test_turns_that_later_ones_change_become_samples_of_their_own(tokenizer):
    """qwen3 takes the thoughts out of earlier turns, but not between a call and the answer to its result."""
    apply_template(thinking := tiny_tokenizer(), "qwen3")
    call = {"type": "function", "function": {"name": "dose", "arguments": {"drug": "x"}}}
    messages = [
        user("Q1"),
        {"role": "assistant", "content": "", "reasoning_content": "T1", "tool_calls": [call]},
        {"role": "tool", "content": "1 g"},
        {"role": "assistant", "content": "A1", "reasoning_content": "T2"},
        user("Q2"),
        {"role": "assistant", "content": "A2", "reasoning_content": "T3"},
    ]
    first, second = trained_texts(thinking, encode_chat(thinking, chat(messages)))
    assert first.startswith("<think>\nT1\n</think>") and first.endswith("<think>\nT2\n</think>\n\nA1<|im_end|>")
    assert first.count("<|im_end|>") == 2
    assert second == "<think>\nT3\n</think>\n\nA2<|im_end|>"
    (last,) = encode_chat(thinking, chat(messages), mask_history=True)
    assert trained_texts(thinking, [last]) == [second]
    assert "T1" not in thinking.decode(last.input_ids)
    everything = "".join(trained_texts(thinking, encode_chat(thinking, chat(messages), train_on_inputs=True)))
    for text in ("Q1", "T1", "1 g", "T2", "A1", "Q2", "T3", "A2"):
        assert everything.count(text) == 1


def test_turns_that_are_not_to_be_trained_are_context(tokenizer):
    messages = [
        user("Q1"),
        assistant("A1") | {"train": False},
        user("Q2"),
        assistant("A2"),
        user("Q3"),
        assistant("A3"),
    ]
    (plain,) = encode_chat(tokenizer, chat([{k: v for k, v in m.items() if k != "train"} for m in messages]))
    (sample,) = encode_chat(tokenizer, chat(messages))
    assert sample.input_ids == plain.input_ids
    assert trained_texts(tokenizer, [sample]) == ["A2<|im_end|>A3<|im_end|>"]
    (with_prompts,) = encode_chat(tokenizer, chat(messages), train_on_inputs=True)
    (text,) = trained_texts(tokenizer, [with_prompts])
    assert "A1" not in text and all(text.count(part) == 1 for part in ("Q1", "Q2", "A2", "Q3", "A3"))
    masked = [*messages[:5], assistant("A3") | {"train": False}]
    assert trained_texts(tokenizer, encode_chat(tokenizer, chat(masked))) == ["A2<|im_end|>"]
    with pytest.raises(EncodingError, match="its last answer is not to be trained on"):
        encode_chat(tokenizer, chat(masked), mask_history=True)
    with pytest.raises(EncodingError, match="its every answer is not"):
        encode_chat(tokenizer, chat(messages[:2]))


def with_template(name, *special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special])
    apply_template(tokenizer, name)
    return tokenizer


def test_a_text_after_the_last_turn_of_all_does_not_part_the_turns():
    """phi3 ends a conversation with a token of its own, which is not there when another question follows."""
    phi = with_template("phi3", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    (sample,) = encode_chat(phi, chat([user("Q1"), assistant("A1"), user("Q2"), assistant("A2")]))
    assert trained_texts(phi, [sample]) == ["A1<|end|>A2<|end|>"]


@pytest.mark.parametrize(
    ("name", "thought", "remedy"),
    [("qwen3_5", None, "without thinking"), ("qwen3_5_nothink", "T", "with thinking")],
)
def test_an_answer_that_does_not_go_on_from_the_prompt_is_refused(name, thought, remedy):
    """The prompt of qwen3_5 opens a thought by itself, that of qwen3_5_nothink has closed one."""
    tokenizer = with_template(name)
    answer = assistant("A") | ({"reasoning_content": thought} if thought else {})
    with pytest.raises(EncodingError, match="trained after another prompt") as refused:
        encode_chat(tokenizer, chat([user("Q"), answer]))
    assert remedy in refused.value.remedy


def test_too_long_is_refused_and_never_cut(tokenizer):
    messages = [user("Q"), assistant("A" * 50)]
    (sample,) = encode_chat(tokenizer, chat(messages))
    length = len(sample.input_ids)
    assert encode_chat(tokenizer, chat(messages), max_length=length) == [sample]
    with pytest.raises(EncodingError, match=f"^{length} tokens, longer than the {length - 1} that fit") as refused:
        encode_chat(tokenizer, chat(messages), max_length=length - 1)
    assert (refused.value.too_long, refused.value.tokens) == (True, length)
    assert "--model_max_length" in refused.value.remedy


def test_what_the_template_refuses_is_a_problem_of_the_row(tokenizer):
    other = tiny_tokenizer()
    other.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(EncodingError, match="the chat template refuses it: no system here") as refused:
        encode_chat(other, chat([user("Q"), assistant("A")]))
    assert "--template_name" in refused.value.remedy and not refused.value.too_long


def test_prompts_are_spread_over_the_rows_and_end_where_answers_begin(tokenizer):
    rows = [{"messages": [user(f"Q{n}"), assistant("A"), user("x"), assistant("y")], "tools": None} for n in range(9)]
    prompts = [tokenizer.decode(ids) for ids in render_prompts(tokenizer, rows, 3)]
    assert [prompt.split("\n")[1] for prompt in prompts] == [f"Q{n}<|im_end|>" for n in (0, 3, 6)]
    for prompt in prompts:
        assert prompt.endswith("<|im_start|>assistant\n")
    assert len(render_prompts(tokenizer, rows[:2], 5)) == 2
    assert render_prompts(tokenizer, rows, 0) == []


# --- all rows of a side ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [None, 2])
def test_rows_keep_their_order_and_may_give_several_samples(tokenizer, processes):
    data = loaded([{"text": "a" * length} for length in (3, 25, 1, 12)])
    encoded = encode_rows(
        data, "train", lambda row: encode_document(tokenizer, {"text": row["text"]}, block_size=10), processes
    )
    assert encoded.column_names == ["input_ids", "labels", "place"]
    assert [place["line"] for place in encoded["place"]] == [1, 2, 2, 2, 3, 4, 4]
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 10, 10, 6, 2, 10, 3]
    assert encoded["labels"][:] == encoded["input_ids"][:]
    assert data.problems == []


def fit(row):
    if len(row["text"]) > 2:
        raise EncodingError("3 tokens", "Shorten it", too_long=True)
    if row["text"] == "?":
        raise EncodingError("a question", "Answer it")
    return [Sample([1], [1])]


def test_rows_that_cannot_be_encoded_join_the_problems(tokenizer):
    data = loaded([{"text": text} for text in ("a", "bbb", "?", "c")])
    encoded = encode_rows(data, "train", fit)
    assert [Place(**place) for place in encoded["place"]] == [("f", 1, 0), ("f", 4, 0)]
    assert [(str(problem), problem.kind) for problem in data.problems] == [
        ("f:2: 3 tokens. Shorten it.", "too long"),
        ("f:3: a question. Answer it.", "unusable"),
    ]
    data.settle(DataArguments(skip_bad_rows=True, skip_long_rows=True))
    assert [row["place"] for row in data.train] == encoded["place"][:]
    assert data.account["train"][0].used == 2


@pytest.mark.parametrize("texts", [[], ["bbb", "?"]])
def test_no_row_at_all_is_no_crash(texts):
    """Where every row is a problem, the report of the problems is what the user has to see."""
    data = loaded([{"text": text} for text in texts])
    assert len(encode_rows(data, "train", fit)) == 0
    assert len(data.problems) == len(texts)


def test_a_text_that_spells_a_special_token_is_refused(tokenizer):
    with pytest.raises(EncodingError, match=r"turn 2 holds <\|im_end\|>"):
        encode_chat(tokenizer, chat([user("Q"), assistant("A<|im_end|>B")]))
    call = {"type": "function", "function": {"name": "f", "arguments": {"text": ["<|im_start|>"]}}}
    with pytest.raises(EncodingError, match=r"turn 2 holds <\|im_start\|>"):
        encode_chat(tokenizer, chat([user("Q"), assistant("A") | {"tool_calls": [call]}]))
    tool = {"type": "function", "function": {"name": "f", "description": "ends with <|im_end|>"}}
    with pytest.raises(EncodingError, match=r"`tools` holds <\|im_end\|>"):
        encode_chat(tokenizer, chat([user("Q"), assistant("A")], [tool]))
