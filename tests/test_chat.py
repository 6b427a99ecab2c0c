"""ChatEngine: the same answer alone, streamed and in a batch; whole characters; errors and early ends."""

import copy
import dataclasses
import gc
import itertools
import re
import threading
import time
from collections import Counter

from medicalgpt.errors import UserError
from medicalgpt.serving.chat import ChatEngine, ChatTemplateError, PromptTooLongError, SpecialTokenError
from medicalgpt.serving.generation import GenerationRequest, Sampling, _draw, _kept
from tests.tiny import TURN_END, make_tiny

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing

ANSWERS = {
    "你好": "你好！我是小医，很高兴为您服务。",
    "头痛怎么办？": "多休息，多喝水；若持续，请就医。👩‍⚕️",
    "What is a cold?": "A cold is 感冒, a viral infection.",
}


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def rendered(engine: ChatEngine, conversations) -> list[list[int]]:
    return [engine.prompt_ids(messages) for messages in conversations]


# Lengths from 1 to about 120 tokens, so that every batch has padding.
VARIED = [ask(text) for text in ("咳", "hello", "我昨天开始发烧" * 5, "a", "What is a cold?", "头痛怎么办？", "x" * 77)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory) -> ChatEngine:
    """Knows ANSWERS by heart."""
    return ChatEngine.from_pretrained(make_tiny(tmp_path_factory.mktemp("taught"), answers=ANSWERS))


@pytest.fixture(scope="module")
def random(tmp_path_factory) -> ChatEngine:
    """Says anything, forever."""
    return ChatEngine.from_pretrained(make_tiny(tmp_path_factory.mktemp("random"), never_stops=True))


def running_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ChatEngine.stream"]


class Steps:
    """Counts the forward passes of a model, and can make one of them fail or slow."""

    def __init__(self, model, fail_at: int | None = None, delay: float = 0.0):
        self.count = 0
        self.fail_at = fail_at
        self.delay = delay
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1
        time.sleep(self.delay)
        if self.count == self.fail_at:
            raise RuntimeError("the graphics card caught fire")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ANSWERS)
def test_answer_is_the_learned_text_and_ends_by_itself(taught, question):
    answer = taught.chat(ask(question))
    assert (answer.text, answer.finish_reason) == (ANSWERS[question], "stop")
    assert answer.prompt_tokens == len(taught.prompt_ids(ask(question)))
    # One token per byte, and the token that ends the turn.
    assert answer.completion_tokens == len(ANSWERS[question].encode()) + 1


def test_either_end_token_stops(taught):
    """The stop tokens are those of generation_config and of the tokenizer together."""
    tokenizer, model = copy.deepcopy(taught.tokenizer), taught.model
    saved = model.generation_config.eos_token_id
    try:
        for eos_of_model, eos_of_tokenizer, stops in (
            (saved, "<|pad|>", True),
            (saved[0], "<|pad|>", True),
            (None, TURN_END, True),
            (None, "<|pad|>", False),
        ):
            model.generation_config.eos_token_id, tokenizer.eos_token = eos_of_model, eos_of_tokenizer
            answer = ChatEngine(model, tokenizer).chat(ask("你好"), Sampling(max_new_tokens=60))
            assert (answer.text == ANSWERS["你好"] and answer.finish_reason == "stop") == stops
        # A special token given as a stop string works too, although decoded text never shows it.
        answer = ChatEngine(model, tokenizer).chat(ask("你好"), Sampling(max_new_tokens=60, stop=(TURN_END,)))
        assert (answer.text, answer.finish_reason) == (ANSWERS["你好"], "stop")
    finally:
        model.generation_config.eos_token_id = saved


def test_length_limit(random):
    answer = random.chat(ask("hello"), Sampling(max_new_tokens=7))
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 7)


def test_text_is_what_the_tokens_decode_to(random):
    """Also where the model writes bytes that are not text; an unfinished character at the end is left out."""
    prompt = random.prompt_ids(ask("hello"))
    out = random.model.generate(torch.tensor([prompt]), max_new_tokens=80, do_sample=False)[0, len(prompt) :]
    decoded = random.tokenizer.decode(out, skip_special_tokens=True)
    assert "\N{REPLACEMENT CHARACTER}" in decoded
    answer = random.chat(ask("hello"), Sampling(max_new_tokens=80))
    assert answer.text == decoded.rstrip("\N{REPLACEMENT CHARACTER}")


def test_generation_settings_of_the_checkpoint_do_not_change_the_sampling(taught):
    """Published checkpoints carry do_sample, temperature and repetition_penalty; the caller's Sampling decides."""
    config = taught.model.generation_config
    saved = copy.deepcopy(config)
    try:
        config.update(do_sample=True, temperature=9.0, top_k=5, repetition_penalty=5.0, num_beams=3)
        config.stop_strings = ["喝水"]
        config.max_length = 3
        engine = ChatEngine(taught.model, taught.tokenizer)
        assert engine.chat(ask("你好")).text == ANSWERS["你好"]
        assert engine.chat(ask("头痛怎么办？")).text == "多休息，多"
    finally:
        taught.model.generation_config = saved


def test_messages_are_not_changed(taught):
    messages = [{"role": "system", "content": "你是小医"}, *ask("你好")]
    before = copy.deepcopy(messages)
    taught.chat(messages)
    list(taught.stream(taught.request(messages)))
    assert messages == before


def test_training_mode_comes_back_as_it_was(taught):
    model = taught.model
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    try:
        assert taught.chat(ask("你好")).text == ANSWERS["你好"]
        assert [module.training for module in model.modules()] == modes
    finally:
        model.eval()


def test_broken_weights_are_an_error_not_an_answer(random):
    engine = ChatEngine(copy.deepcopy(random.model), random.tokenizer)
    engine.model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match="NaN.*bfloat16"):
        engine.chat(ask("hello"))


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_prompt_is_the_rendered_template_without_a_second_bos(taught):
    """A tokenizer that puts a BOS before text must not put one before a template that writes its own."""
    tokenizer = copy.deepcopy(taught.tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("{{- bos_token }}", "")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("hello").input_ids[0] == tokenizer.bos_token_id
    ids = ChatEngine(taught.model, tokenizer).prompt_ids(ask("你好"))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    text = tokenizer.apply_chat_template(ask("你好"), add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    assert text.endswith("assistant\n")


def test_prompt_too_long(random):
    limit = random.context_length
    assert limit == 512
    overhead = len(random.prompt_ids(ask("x"))) - 1
    fits = ask("x" * (limit - overhead - 1))
    answer = random.chat(fits)
    assert (answer.prompt_tokens, answer.completion_tokens, answer.finish_reason) == (limit - 1, 1, "length")
    too_long = ask("x" * (limit - overhead))
    # Ids that come from elsewhere than `prompt_ids`.
    fitting, ids = random.prompt_ids(fits), [1] * limit
    for call in (lambda: random.chat(too_long), lambda: random.request(too_long), lambda: random.batch([fitting, ids])):
        with Steps(random.model) as steps, pytest.raises(PromptTooLongError, match="512 tokens.*512.*511") as error:
            call()
        assert (error.value.prompt_tokens, error.value.context_length, steps.count) == (512, 512, 0)
    assert issubclass(PromptTooLongError, ValueError)


def test_batch_mates_do_not_shorten_an_answer(random):
    """The context ends for each row on its own, whatever the padding."""
    overhead = len(random.prompt_ids(ask("x"))) - 1
    long, short = random.batch(
        rendered(random, [ask("x" * (512 - overhead - 10)), ask("x")]), Sampling(max_new_tokens=30), batch_size=2
    )
    assert (long.completion_tokens, short.completion_tokens) == (10, 30)


def test_context_length_with_yarn(random):
    model = copy.deepcopy(random.model)
    model.config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    assert ChatEngine(model, random.tokenizer).context_length == 2048


def test_no_template(taught):
    tokenizer = copy.deepcopy(taught.tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="supervised_finetuning.py.*--template_name"):
        ChatEngine(taught.model, tokenizer).chat(ask("你好"))


def test_template_refuses_messages(taught):
    with pytest.raises(ChatTemplateError, match="wizard"):
        taught.chat([{"role": "wizard", "content": "你好"}])
    with pytest.raises(ChatTemplateError):
        taught.chat([])


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_batched_greedy_equals_one_at_a_time(random, padding_side, penalty):
    sampling = Sampling(max_new_tokens=24, repetition_penalty=penalty)
    random.tokenizer.padding_side = padding_side
    alone = [random.chat(messages, sampling) for messages in VARIED]
    assert len({answer.text for answer in alone}) > 1
    for batch_size in (2, 3, len(VARIED)):
        assert random.batch(rendered(random, VARIED), sampling, batch_size=batch_size) == alone


def test_padding_is_not_penalised_as_a_token_of_the_prompt(random):
    """The longest prompt, whose token is the padding, is made of a letter that the other row is about to say."""
    tokenizer = copy.deepcopy(random.tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}"
    engine = ChatEngine(random.model, tokenizer)
    sampling = Sampling(max_new_tokens=60, repetition_penalty=5.0)
    alone = engine.chat(ask("hello"), sampling)
    letter = next(char for char in alone.text if char.isascii() and char.isalnum() and char not in "hello")
    assert engine.batch(rendered(engine, [ask("hello"), ask(letter * 20)]), sampling)[0] == alone


def test_batch_of_answers_that_end_at_different_steps(taught):
    questions = list(ANSWERS) * 2
    answers = taught.batch(rendered(taught, map(ask, questions)), batch_size=4)
    assert [answer.text for answer in answers] == [ANSWERS[question] for question in questions]


def test_batch_reports_progress_and_takes_nothing(random):
    done: list[int] = []
    random.batch(rendered(random, VARIED), Sampling(max_new_tokens=2), batch_size=3, progress=done.append)
    assert done == [3, 3, 1]
    assert random.batch([]) == []
    with pytest.raises(ValueError, match="batch_size is 0"):
        random.batch(rendered(random, VARIED), batch_size=0)


def test_batch_with_tools(taught):
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    prompts = [taught.prompt_ids(ask("你好"), offered) for offered in (None, tools)]
    plain, offered = taught.batch(prompts, Sampling(max_new_tokens=1), tools=[None, tools])
    assert [plain.prompt_tokens, offered.prompt_tokens] == list(map(len, prompts))
    assert offered.prompt_tokens > plain.prompt_tokens


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_text_that_spells_a_special_token_is_refused(taught, role):
    messages = [{"role": role, "content": f"hello{TURN_END} there"}, *ask("你好")]
    with pytest.raises(SpecialTokenError, match=re.escape(TURN_END)):
        taught.chat(messages)
    tools = [{"type": "function", "function": {"name": "look_up", "description": TURN_END}}]
    with pytest.raises(SpecialTokenError):
        taught.prompt_ids(ask("你好"), tools)


def test_raw_text_is_gone_on_with(taught):
    (answer,) = taught.generate([GenerationRequest(taught.completion_ids("你好"), Sampling(max_new_tokens=4))])
    assert answer.prompt_tokens == len("你好".encode())
    with pytest.raises(ValueError, match="empty"):
        taught.completion_ids("")
    with pytest.raises(PromptTooLongError, match="context of 512"):
        taught.completion_ids("x" * 512)


# --- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop, expected",
    [
        (("喝水",), "多休息，多"),
        ("喝水", "多休息，多"),
        (("就医", "水；若"), "多休息，多喝"),
        (("水", "多喝水"), "多休息，"),
        (("多",), ""),
        (("水；不",), ANSWERS["头痛怎么办？"]),
        (("。👩‍⚕️再见",), ANSWERS["头痛怎么办？"]),
    ],
)
def test_stop_strings(taught, stop, expected):
    sampling = Sampling(stop=stop)
    answer = taught.chat(ask("头痛怎么办？"), sampling)
    assert (answer.text, answer.finish_reason) == (expected, "stop")
    stream = taught.stream(taught.request(ask("头痛怎么办？"), sampling))
    assert "".join(stream) == expected
    assert stream.answer == answer
    assert taught.batch(rendered(taught, [ask("你好"), ask("头痛怎么办？")]), sampling)[1] == answer


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ANSWERS)
def test_stream_gives_whole_characters(taught, question):
    stream = taught.stream(taught.request(ask(question)))
    assert stream.answer is None
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == ANSWERS[question]
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert stream.answer == taught.chat(ask(question))


@pytest.mark.parametrize("seed", range(3))
def test_stream_joined_is_the_chat_text(random, seed):
    """Random bytes: broken characters in every position."""
    sampling = Sampling(max_new_tokens=150, temperature=1.5, seed=seed)
    stream = random.stream(random.request(ask("hello"), sampling))
    assert "".join(stream) == random.chat(ask("hello"), sampling).text == stream.answer.text


def test_character_cut_by_the_length_limit_is_left_out(taught):
    for tokens in range(1, 13):
        answer = taught.chat(ask("你好"), Sampling(max_new_tokens=tokens))
        assert answer.text == ANSWERS["你好"].encode()[:tokens].decode(errors="ignore")
        assert "".join(taught.stream(taught.request(ask("你好"), Sampling(max_new_tokens=tokens)))) == answer.text


@pytest.mark.parametrize("way", ["close", "with", "drop", "interrupt"])
def test_ending_a_stream_early_stops_the_thread(random, way):
    with Steps(random.model, delay=0.002) as steps:
        stream = random.stream(random.request(ask("hello"), Sampling(max_new_tokens=400)))
        next(stream)
        assert running_threads()
        if way == "close":
            stream.close()
            assert stream.answer is None
            assert list(stream) == []
        elif way == "with":
            with stream:
                next(stream)
        elif way == "interrupt":
            with pytest.raises(KeyboardInterrupt), stream:
                raise KeyboardInterrupt
        else:
            gc.disable()
            try:
                del stream
            finally:
                gc.enable()
        assert not running_threads()
        stopped_at = steps.count
        assert stopped_at < 200
        time.sleep(0.05)
        assert steps.count == stopped_at


def test_stream_that_nobody_reads_computes_nothing(random):
    with Steps(random.model) as steps:
        stream = random.stream(random.request(ask("hello")))
        stream.close()
        assert steps.count == 0 and not running_threads()


def test_error_in_the_generation_thread_reaches_the_caller(random):
    pieces = []
    with Steps(random.model, fail_at=30), pytest.raises(RuntimeError, match="caught fire"):
        for piece in random.stream(random.request(ask("hello"))):
            pieces.append(piece)
    assert pieces and not running_threads()
    assert random.chat(ask("hello"), Sampling(max_new_tokens=5)).completion_tokens == 5


def test_two_streams_at_a_time(taught):
    streams = [taught.stream(taught.request(ask(question))) for question in ANSWERS]
    rounds = list(itertools.zip_longest(*streams, fillvalue=""))
    assert ["".join(pieces) for pieces in zip(*rounds, strict=True)] == list(ANSWERS.values())


# --- sampling --------------------------------------------------------------------------------------------------------

WARM = Sampling(max_new_tokens=30, temperature=1.0, seed=7)


def test_same_seed_same_text(random):
    first = random.chat(ask("hello"), WARM)
    assert random.chat(ask("hello"), WARM) == first
    assert "".join(random.stream(random.request(ask("hello"), WARM))) == first.text
    assert random.chat(ask("hello"), dataclasses.replace(WARM, seed=8)).text != first.text
    assert random.chat(ask("hello"), dataclasses.replace(WARM, temperature=0)).text != first.text


def test_batch_samples_row_i_with_seed_plus_i(random):
    sampling = dataclasses.replace(WARM, top_k=20, top_p=0.9, repetition_penalty=1.2)
    alone = [
        random.chat(messages, dataclasses.replace(sampling, seed=sampling.seed + index))
        for index, messages in enumerate(VARIED)
    ]
    for batch_size in (1, 3, 7):
        assert random.batch(rendered(random, VARIED), sampling, batch_size=batch_size) == alone


def test_without_a_seed_torchs_global_seed_decides(random):
    free = dataclasses.replace(WARM, seed=None)
    torch.manual_seed(1)
    first, second = random.chat(ask("hello"), free), random.chat(ask("hello"), free)
    assert first.text != second.text
    torch.manual_seed(1)
    assert random.chat(ask("hello"), free) == first


@pytest.mark.parametrize("sampling", [WARM, Sampling(max_new_tokens=30)])
def test_seeded_and_greedy_answers_leave_torchs_global_generator_alone(random, sampling):
    """A look at a model in training does not change the batches that follow."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    random.chat(ask("hello"), sampling)
    random.batch(rendered(random, VARIED), sampling)
    list(random.stream(random.request(ask("hello"), sampling)))
    assert torch.equal(torch.rand(3), expected)


def test_answers_come_with_their_tokens_and_how_probable_these_were(random):
    """Log-probabilities as drawn are those of the model at that temperature, whatever stands beside a row."""
    sampling = Sampling(max_new_tokens=6, temperature=0.8, seed=5, log_probs=True)
    prompts = rendered(random, VARIED)
    for prompt, answer in zip(prompts, random.batch(prompts, sampling, batch_size=len(prompts)), strict=True):
        assert answer.completion_tokens == len(answer.token_ids) == len(answer.log_probs)
        with torch.no_grad():
            logits = random.model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
        # This model never stops, so that its ends are not part of the draw.
        logits[:, random.model.generation_config.suppress_tokens] = -torch.inf
        expected = (logits / 0.8).log_softmax(-1)[range(len(answer.token_ids)), list(answer.token_ids)]
        assert torch.allclose(torch.tensor(answer.log_probs), expected, atol=1e-4)
    assert random.chat(ask("hello"), Sampling(max_new_tokens=3)).log_probs == ()
    with pytest.raises(ValueError, match="log_probs"):
        Sampling(log_probs=True)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "seed": 4, "repetition_penalty": 1.5, "top_k": 5}])
def test_scores_are_those_of_the_model_before_any_sampling(random, settings):
    question = ask("hello")
    answer = random.chat(question, Sampling(max_new_tokens=12, top_log_probs=3, **settings))
    prompt = random.prompt_ids(question)
    with torch.no_grad():
        logits = random.model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1]
    # The checkpoint of the fixture forbids these.
    logits[:, random.model.generation_config.suppress_tokens] = float("-inf")
    expected = logits.log_softmax(-1)
    assert [score.token_id for score in answer.scores] == list(answer.token_ids)
    for score, row in zip(answer.scores, expected, strict=True):
        assert score.log_prob == pytest.approx(row[score.token_id].item(), abs=1e-4)
        best = row.topk(3)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert random.chat(question, Sampling(max_new_tokens=3, top_log_probs=0)).scores[0].top == ()
    assert random.chat(question, Sampling(max_new_tokens=3)).scores == ()


def draws(scores: list[float], count: int = 4000, **settings) -> dict[int, float]:
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(**settings)
    likely = _kept(torch.tensor(scores), sampling)
    found = Counter(int(_draw(likely, generator).argmax()) for _ in range(count))
    return {token: times / count for token, times in found.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    scores = [2.0, 1.0, -1.0, 0.5]
    expected = torch.tensor(scores).div(temperature).softmax(-1)
    found = draws(scores, temperature=temperature)
    for token, probability in enumerate(expected.tolist()):
        # 4 standard errors of a share of 4000 draws.
        assert abs(found.get(token, 0) - probability) < 4 * (probability * (1 - probability) / 4000) ** 0.5


def test_top_k_and_top_p_cut():
    scores = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().tolist()
    assert set(draws(scores, temperature=1.0)) == {0, 1, 2, 3}
    assert set(draws(scores, temperature=1.0, top_k=2)) == {1, 3}
    # 0.4 + 0.3 reach 0.65; 0.4 alone does not.
    assert set(draws(scores, temperature=1.0, top_p=0.65)) == {1, 3}
    assert set(draws(scores, temperature=1.0, top_p=0.75)) == {1, 2, 3}
    assert set(draws(scores, temperature=1.0, top_p=1e-6)) == {1}
    assert set(draws(scores, temperature=1.0, top_k=100)) == {0, 1, 2, 3}
    assert set(draws(scores, temperature=1e-30)) == {1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"stop": ("",)},
        {"seed": -1},
        {"seed": 2**62},
    ],
)
def test_settings_out_of_range(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        Sampling(**wrong)


def test_a_raw_text_is_continued_where_it_ends(random, monkeypatch):
    """Some tokenizers end each text with the token that ends answers; after it, the model would begin another text."""
    tokenizer = random.tokenizer
    plain = random.completion_ids("Fever is")
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])

    def with_both_ends(text, add_special_tokens=True, **options):
        ids = tokenizer.encode(text, add_special_tokens=False)
        return {"input_ids": [begin, *ids, end] if add_special_tokens else ids}

    monkeypatch.setattr(random, "tokenizer", with_both_ends)
    assert random.completion_ids("Fever is") == [begin, *plain]
    with pytest.raises(ValueError, match="empty"):
        random.completion_ids("")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_adapter_folder_and_adapter_on_top(tmp_path):
    """Both ways of naming an adapter answer as the adapted model does, with the adapter's stop tokens."""
    base = make_tiny(tmp_path / "base", seed=3)
    engine = ChatEngine.from_pretrained(base)
    torch.manual_seed(0)
    model = get_peft_model(engine.model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    adapted = ChatEngine(model, engine.tokenizer).chat(ask("hello"), Sampling(max_new_tokens=40))
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    assert adapted.text != ChatEngine.from_pretrained(base).chat(ask("hello"), Sampling(max_new_tokens=40)).text
    for loaded in (ChatEngine.from_pretrained(folder), ChatEngine.from_pretrained(base, lora_model=folder)):
        assert loaded.chat(ask("hello"), Sampling(max_new_tokens=40)) == adapted

    first = adapted.text[0]
    tokenizer = engine.tokenizer
    config = copy.deepcopy(engine.model.generation_config)
    config.eos_token_id = tokenizer(first).input_ids
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stopped = ChatEngine.from_pretrained(base, lora_model=folder).chat(ask("hello"))
    assert (stopped.text, stopped.finish_reason) == ("", "stop")

    with pytest.raises(UserError, match="already"):
        ChatEngine.from_pretrained(folder, lora_model=folder)
    with pytest.raises(UserError, match="no adapter"):
        ChatEngine.from_pretrained(base, lora_model=base)
