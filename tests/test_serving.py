"""Batchers: concurrent requests get the answers they would get alone; places, limits, errors and ends."""

import dataclasses
import threading
import time
from concurrent.futures import CancelledError
from functools import partial

from medicalgpt.errors import UserError
from medicalgpt.serving import batchers
from medicalgpt.serving.batchers import BatcherClosedError, ModelFailedError, QueueFullError, make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest, Sampling
from medicalgpt.serving.running_batch import RunningBatch
from tests.families import FAMILIES, make_family
from tests.gate import Gate
from tests.tiny import make_tiny

import pytest
import torch
from peft import LoraConfig, get_peft_model

KINDS = ["static", "continuous"]
GREEDY = Sampling(max_new_tokens=12)
LONG = Sampling(max_new_tokens=1500)
# Every setting, beside each other in one batch; three requests of each.
SETTINGS = [
    Sampling(max_new_tokens=20),
    Sampling(max_new_tokens=9, repetition_penalty=1.4, top_log_probs=2),
    Sampling(max_new_tokens=30, temperature=1.2, top_k=40, top_p=0.9, seed=11, log_probs=True),
    Sampling(max_new_tokens=25, temperature=0.7, repetition_penalty=1.2, seed=5, stop=("a", "是")),
]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


QUESTIONS = [ask(text) for text in ("咳", "我昨天开始发烧" * 4, "hello", "x" * 60, "What?", "头痛怎么办？")]


def endless(folder) -> ChatEngine:
    engine = ChatEngine.from_pretrained(make_tiny(folder))
    engine.stop_ids = frozenset()
    engine.model.generation_config.eos_token_id = None
    return engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> ChatEngine:
    """Says anything, forever."""
    return endless(tmp_path_factory.mktemp("random"))


@pytest.fixture(params=KINDS)
def batcher(request, engine):
    batcher = make_batcher(engine, batching=request.param, max_batch_size=3, max_waiting=4)
    yield batcher
    batcher.close(finish=False)


@pytest.fixture(scope="module")
def alone(engine) -> dict[str, str]:
    """What the engine says to each text by itself."""
    return {text: engine.chat(ask(text), GREEDY).text for text in ("one", "two", "three 三", "4" * 30, "hello")}


def until(condition, seconds: float = 20) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


def start(batcher, text: str = "hello", sampling: Sampling = LONG):
    """A request of which something is computed already."""
    begun = threading.Event()
    future = batcher.submit(
        dataclasses.replace(batcher.engine.request(ask(text), sampling), on_text=lambda piece: begun.set())
    )
    assert begun.wait(20)
    return future


def same(answer, alone) -> None:
    assert (answer.text, answer.token_ids, answer.finish_reason) == (alone.text, alone.token_ids, alone.finish_reason)
    assert answer.prompt_tokens == alone.prompt_tokens
    assert answer.log_probs == pytest.approx(alone.log_probs, abs=1e-4)
    for score, expected in zip(answer.scores, alone.scores, strict=True):
        assert score.token_id == expected.token_id
        assert score.log_prob == pytest.approx(expected.log_prob, abs=1e-4)
        assert [value for _, value in score.top] == pytest.approx([value for _, value in expected.top], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_given_alone_whatever_stands_beside_them(engine, kind):
    jobs = [(messages, sampling) for sampling in SETTINGS for messages in QUESTIONS]
    alone = [engine.chat(messages, sampling) for messages, sampling in jobs]
    assert len({answer.text for answer in alone}) > len(QUESTIONS)
    pieces = [[] for _ in jobs]
    with make_batcher(engine, batching=kind, max_batch_size=5, max_waiting=len(jobs)) as batcher:
        futures = [
            batcher.submit(dataclasses.replace(engine.request(messages, sampling), on_text=pieces[number].append))
            for number, (messages, sampling) in enumerate(jobs)
        ]
        for future, expected, shown in zip(futures, alone, pieces, strict=True):
            same(future.result(30), expected)
            assert "".join(shown) == expected.text


UNPAGED = {
    "qwen3_next": "layers of the kind linear_attention",
    "lfm2": "layers of the kind conv",
    "llama4_text": "layers of the kind chunked_attention",
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3"), r"compressed \(kv_lora_rank\)"),
}
QUICK = ("llama", "gemma2", "mixtral", "deepseek_v3")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_continuous_batching_of_every_family(tmp_path, family):
    engine = ChatEngine.from_pretrained(make_family(tmp_path, family, tie_word_embeddings=False))
    if family in UNPAGED:
        with pytest.raises(UserError, match=f"cannot serve this model: .*{UNPAGED[family]}. Use --batching static"):
            make_batcher(engine, batching="continuous")
        return
    alone = [engine.chat(messages, GREEDY) for messages in QUESTIONS]
    with make_batcher(engine, batching="continuous", max_batch_size=4) as batcher:
        futures = [batcher.submit(engine.request(messages, GREEDY)) for messages in QUESTIONS]
        for future, expected in zip(futures, alone, strict=True):
            same(future.result(30), expected)
    # The model attends as before.
    assert engine.chat(QUESTIONS[1], GREEDY) == alone[1]


# Families whose cache has layers other than keys and values.
UNPADDED = ("qwen3_next", "lfm2")


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_answers_of_every_family_join_and_leave_a_padded_batch(tmp_path, family):
    """They are computed once, and what stands in the batch next to them does not change them."""
    engine = ChatEngine.from_pretrained(make_family(tmp_path, family, tie_word_embeddings=False))
    assert bool(RunningBatch.obstacles(engine.model)) == (family in UNPADDED)
    if family in UNPADDED:
        return
    samplings = [dataclasses.replace(GREEDY, max_new_tokens=4 + 3 * number) for number in range(len(QUESTIONS))]
    requests = [engine.request(messages, own) for messages, own in zip(QUESTIONS, samplings, strict=True)]
    alone = engine.generate(requests)
    states = [engine.begin(request) for request in requests]
    computed = []
    hook = engine.model.register_forward_pre_hook(
        lambda model, args, inputs: computed.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    batch = RunningBatch(engine.model)
    steps = iter([False, True, False, True, True])
    pause = partial(next, steps, False)
    engine.extend(states[:2], pause, batch)
    engine.extend(states[:5], pause, batch)
    # The third leaves, and comes back later.
    engine.extend([*states[:2], *states[3:]], pause, batch)
    engine.extend([state for state in states if not state.ended], pause, batch)
    hook.remove()
    for state, expected in zip(states, alone, strict=True):
        same(state.answer, expected)
    prompts = [len(request.prompt_ids) for request in requests]
    joined = [(2, max(prompts[:2])), (3, max(prompts[2:5])), (1, prompts[5]), (1, len(states[2].prompt_ids) + 2)]
    assert [shape for shape in computed if shape[1] > 1] == joined


def test_continuous_batching_with_an_adapter(engine, tmp_path):
    base = endless(tmp_path)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = ChatEngine(get_peft_model(base.model, config).eval(), base.tokenizer)
    adapted.stop_ids = frozenset()
    alone = adapted.chat(QUESTIONS[1], GREEDY)
    assert alone.text != engine.chat(QUESTIONS[1], GREEDY).text
    with make_batcher(adapted, batching="continuous") as batcher:
        same(batcher.submit(adapted.request(QUESTIONS[1], GREEDY)).result(20), alone)


def test_several_new_tokens_at_once(engine):
    """Under load the library hands over an output that has grown by more than a token since the last one."""
    settings = []
    for sampling in (GREEDY, Sampling(max_new_tokens=30, temperature=0.7, seed=3, log_probs=True, top_log_probs=2)):
        text = engine.chat(ask("hello"), sampling).text
        # With a stop string, the answer ends within what comes at once.
        settings += [sampling, dataclasses.replace(sampling, stop=(text[len(text) // 2],))]
    alone = [engine.chat(ask("hello"), sampling) for sampling in settings]
    assert [answer.finish_reason for answer in alone] == ["length", "stop"] * 2
    assert alone[1].completion_tokens % 5 and alone[3].completion_tokens % 5
    with make_batcher(engine, batching="continuous") as batcher:
        manager, lengths = batcher._paged._manager, []
        get_result = manager.get_result

        def late(**options):
            output = get_result(**options)
            if output is None or (len(output.generated_tokens) % 5 and not output.is_finished()):
                return None
            lengths.append(len(output.generated_tokens))
            return output

        manager.get_result = late
        for sampling, expected in zip(settings, alone, strict=True):
            pieces = []
            request = dataclasses.replace(engine.request(ask("hello"), sampling), on_text=pieces.append)
            same(batcher.submit(request).result(20), expected)
            assert "".join(pieces) == expected.text
    assert lengths[:3] == [5, 10, 12]


def test_many_threads(alone, batcher):
    got = []

    def client(text: str) -> None:
        while len(got) < 24:
            try:
                got.append((text, batcher.submit(batcher.engine.request(ask(text), GREEDY)).result(20).text))
            except QueueFullError:
                time.sleep(0.01)

    threads = [threading.Thread(target=client, args=[text]) for text in (*alone, *alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(got) >= 24 and all(alone[text] == answer for text, answer in got)


@pytest.mark.parametrize("kind", KINDS)
def test_short_request_is_not_held_up_by_a_long_one(engine, kind):
    expected = engine.chat(ask("hi"), GREEDY), engine.chat(ask("hello"), LONG)
    with make_batcher(engine, batching=kind, max_batch_size=2) as batcher:
        long = start(batcher)
        same(batcher.submit(engine.request(ask("hi"), GREEDY)).result(20), expected[0])
        assert not long.done()
        # Interrupted or not, the long one says what it says alone.
        same(long.result(60), expected[1])


def test_cancelled_requests_free_their_places(batcher):
    running = [start(batcher)]
    waiting = [batcher.submit(batcher.engine.request(ask("hi"), LONG)) for _ in range(4)]
    until(lambda: batcher.running + batcher.waiting == 5)
    for future in (*waiting, *running):
        assert future.cancel()
    assert batcher.waiting == 0
    until(lambda: batcher.running == 0)
    with pytest.raises(CancelledError):
        running[0].result()
    assert batcher.submit(batcher.engine.request(ask("hi"), GREEDY)).result(20).completion_tokens == 12


def test_queue_limit(batcher):
    ids = batcher.engine.prompt_ids(ask("hi"))
    first = start(batcher)
    futures = []
    with pytest.raises(QueueFullError) as error:
        for _ in range(20):
            futures.append(batcher.submit(GenerationRequest(ids, LONG)))
    # Three run together and four wait.
    assert len(futures) == 6 and error.value.waiting >= 4
    request = GenerationRequest(ids, GREEDY)
    for future in futures[:3]:
        future.cancel()
    with pytest.raises(QueueFullError):
        batcher.submit_many([request] * 4)
    several = batcher.submit_many([request] * 3)
    for future in (first, *futures):
        future.cancel()
    assert all(future.result(20).completion_tokens == 12 for future in several)


def test_close_finishes_or_cancels(engine):
    for kind in KINDS:
        ids = engine.prompt_ids(ask("hi"))
        batcher = make_batcher(engine, batching=kind, max_batch_size=2)
        futures = [batcher.submit(GenerationRequest(ids, Sampling(max_new_tokens=60))) for _ in range(5)]
        batcher.close()
        assert [future.result(0).completion_tokens for future in futures] == [60] * 5
        with pytest.raises(BatcherClosedError):
            batcher.submit(GenerationRequest(ids, GREEDY))

        batcher = make_batcher(engine, batching=kind, max_batch_size=2)
        futures = [start(batcher), *(batcher.submit(GenerationRequest(ids, LONG)) for _ in range(3))]
        batcher.close(finish=False)
        assert all(future.cancelled() for future in futures)


class Fire:
    """A model that fails in some of its steps, counted from 1."""

    def __init__(self, engine: ChatEngine, *steps: int, error: type[Exception] = RuntimeError):
        self.failing, self.count, self.error = steps, 0, error
        self.handle = engine.model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.count += 1
        if not self.failing or self.count in self.failing:
            raise self.error("the graphics card caught fire")

    def __enter__(self) -> "Fire":
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_failed_batch_is_the_end_of_that_batch_only(engine, kind):
    """Its requests get the error, the others their answers, and whoever comes later is answered as before."""
    expected = engine.chat(ask("hi"), GREEDY)
    for error in (RuntimeError, torch.OutOfMemoryError):
        with make_batcher(engine, batching=kind, max_batch_size=2) as batcher:
            with Fire(engine, 400, error=error):
                running = [start(batcher), batcher.submit(engine.request(ask("hi"), LONG))]
                waiting = batcher.submit(engine.request(ask("hi"), GREEDY))
                for future in running:
                    with pytest.raises(RuntimeError, match="caught fire"):
                        future.result(30)
                same(waiting.result(30), expected)
                same(batcher.submit(engine.request(ask("hi"), GREEDY)).result(30), expected)
            assert batcher.problem is None and batcher.failure is None


@pytest.mark.parametrize("kind", KINDS)
def test_model_that_does_not_recover_is_given_up(engine, kind, monkeypatch):
    monkeypatch.setattr(batchers, "SECONDS_BETWEEN_TRIALS", 0.01)
    with make_batcher(engine, batching=kind, max_batch_size=1) as batcher:
        futures = [batcher.submit(engine.request(ask("hi"), LONG)) for _ in range(3)]
        assert batcher.problem is None
        with Fire(engine):
            for future in futures:
                with pytest.raises(RuntimeError, match="caught fire|does not recover"):
                    future.result(30)
            until(lambda: batcher.failure)
        assert batcher.problem == "The model has failed (RuntimeError) and does not recover."
        with pytest.raises(ModelFailedError):
            batcher.submit(engine.request(ask("hi"), GREEDY))
        assert (batcher.running, batcher.waiting) == (0, 0)
    # The model attends as before.
    assert engine.chat(ask("hi"), GREEDY).completion_tokens == 12


@pytest.mark.parametrize("kind", KINDS)
def test_stalled_model_is_a_problem(engine, kind):
    gate = Gate(engine.model)
    with make_batcher(engine, batching=kind, stall_seconds=0.2) as batcher, gate.shut():
        future = batcher.submit(engine.request(ask("hi"), GREEDY))
        until(lambda: batcher.problem)
        assert "generated nothing" in batcher.problem
        gate.allow(100)
        future.result(30)
        assert batcher.problem is None


def test_an_answer_that_fails_by_itself_does_not_fail_its_neighbours(alone, batcher):
    def fail(piece):
        raise RuntimeError("nobody can read this")

    ids = batcher.engine.prompt_ids(ask("hello"))
    bad, good = batcher.submit_many([GenerationRequest(ids, LONG, on_text=fail), GenerationRequest(ids, GREEDY)])
    assert good.result(20).text == alone["hello"]
    with pytest.raises(RuntimeError, match="nobody can read this"):
        bad.result(20)
    until(lambda: batcher.running == 0)


def test_layers_that_continuous_batching_does_not_know(engine, monkeypatch):
    monkeypatch.setattr(engine.model.config, "layer_types", ["full_attention", "linear_attention"])
    with pytest.raises(UserError, match="linear_attention.*--batching static"):
        make_batcher(engine, batching="continuous")


RECOMMENDED = {
    "do_sample": True,
    "temperature": 1.9,
    "top_k": 3,
    "num_beams": 2,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 1,
    "min_new_tokens": 9,
    "min_length": 30,
    "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (1, 1.5),
    "length_penalty": 2.0,
    "renormalize_logits": True,
    "guidance_scale": 1.5,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_checkpoint_recommends_changes_no_answer(engine, monkeypatch, kind):
    sampling = [GREEDY, Sampling(max_new_tokens=12, temperature=0.7, seed=3)]
    plain = [engine.chat(ask("hello"), one) for one in sampling]
    # The first token of the plain answer is forbidden.
    for name, value in {**RECOMMENDED, "bad_words_ids": [[plain[0].token_ids[0]]]}.items():
        monkeypatch.setattr(engine.model.generation_config, name, value)
    for one, expected in zip(sampling, plain, strict=True):
        same(engine.chat(ask("hello"), one), expected)
    with make_batcher(engine, batching=kind) as batcher:
        for one, expected in zip(sampling, plain, strict=True):
            same(batcher.submit(engine.request(ask("hello"), one)).result(20), expected)


def test_limits(engine):
    with pytest.raises(UserError, match="--max_batch_size is 0"):
        make_batcher(engine, max_batch_size=0)
