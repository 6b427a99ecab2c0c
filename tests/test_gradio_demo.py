"""gradio_demo.py in a real browser: streaming, stop, turns, errors, hostile text, several visitors; who is let in."""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import gradio_demo
from gradio_demo import (
    EXAMPLES,
    MAX_IMAGE_BYTES,
    MAX_UPLOAD_BYTES,
    DemoArguments,
    build_page,
    opened_thoughts,
    read_tools,
    thinking_default,
)
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from medicalgpt.serving.batchers import BatcherClosedError, ModelFailedError, make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import Answer, GenerationRequest, Sampling
from medicalgpt.serving.page import describe, launch
from medicalgpt.serving.schedule import QueueFullError
from medicalgpt.serving.uploads import Uploads
from medicalgpt.serving.web import auth_from
from template import apply_template
from tests.gate import Gate
from tests.pictures import COLOURS, learn_colours, save
from tests.servers import running_server
from tests.tiny import make_tiny, tiny_tokenizer

import httpx
import pytest
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

SCRIPT = '<script>window.hacked = 1</script><img src="x" onerror="window.hacked = 1">'
GREETING, FEVER = "你好", "发烧怎么办？"
ANSWERS = {
    GREETING: "你好！我是小医，很高兴为您服务。",
    FEVER: "多休息，多喝水，量体温；三天不退，请就医。",
    "html": f"{SCRIPT}x <y> &amp; `<b>` < 3",
    "image": "![x](http://images.invalid/x.png) Done.",
    "think": "<think>\nfever?\n</think>\n\nRest.",
}

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and its driver (Debian: apt install chromium chromium-driver)"
)


def page_arguments(*argv: str) -> DemoArguments:
    return parse_args(DemoArguments, argv=["--model_name_or_path", "unused", *argv])[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return make_tiny(tmp_path_factory.mktemp("model"), answers=ANSWERS, max_position_embeddings=256)


@pytest.fixture(scope="module")
def served(model, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """The page on a model that knows ANSWERS by heart, with the gate before it, and what it was asked.

    `answers` are given before the model is asked.
    """
    # A request gets its place at once, even while the model waits at the gate.
    engine = ChatEngine.from_pretrained(model)
    batcher = make_batcher(engine, batching="continuous", max_batch_size=2, max_waiting=1)
    gate, prompts, samplings, answers, submit = Gate(batcher.engine.model), [], [], [], batcher.submit

    def noted(request):
        prompts.append(request.prompt_ids)
        samplings.append(request.sampling)
        if not answers:
            return submit(request)
        future = Future()
        future.set_result(answers.pop(0))
        return future

    batcher.submit = noted
    feedback = tmp_path_factory.mktemp("feedback") / "feedback.jsonl"
    flags = ("--max_new_tokens", "100", "--top_k", "500", "--repetition_penalty", "1.001")
    arguments = page_arguments("--port", "0", *flags, "--feedback_file", str(feedback))
    page = build_page(batcher, arguments)
    url = launch(page, arguments, None)
    yield SimpleNamespace(
        **{"url": url, "batcher": batcher, "gate": gate, "prompts": prompts, "samplings": samplings},
        **{"answers": answers, "feedback": feedback},
    )
    batcher.close(finish=False)
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1000", "--lang=en"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        yield driver


class Visitor:
    """A tab of the browser with the page in it."""

    def __init__(self, browser: webdriver.Chrome, url: str):
        self.browser = browser
        browser.get(url)
        self.tab = browser.current_window_handle
        self.until(lambda: self.js("return document.querySelector('#question textarea') !== null"))

    def js(self, script: str, *values):
        return self.browser.execute_script(script, *values)

    def until(self, condition) -> None:
        WebDriverWait(self.browser, 30, poll_frequency=0.05).until(lambda _: condition())

    def element(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def texts(self) -> list[str]:
        """What the bubbles say, the oldest first, as a person sees it."""
        selector = ".user.message, .bot.message:not(.pending)"
        return self.js(f"return [...document.querySelectorAll('{selector}')].map(e => e.innerText.trim())")

    def box(self) -> str:
        return self.js("return document.querySelector('#question textarea').value")

    def notice(self) -> str:
        return self.js("return document.querySelector('#notice')?.innerText.trim() ?? ''")

    def enabled(self, name: str) -> bool:
        return self.element(f"#{name}").is_enabled()

    def click(self, name: str) -> None:
        self.until(lambda: self.enabled(name))
        self.element(f"#{name}").click()

    def write(self, text: str) -> None:
        self.element("#question textarea").send_keys(text)

    def ask(self, text: str) -> None:
        """Ask, and wait until the page is ready for the next question."""
        texts, notice = len(self.texts()), self.notice()
        self.write(text)
        self.click("send")
        answered = lambda: len(self.texts()) > texts or self.notice() not in ("", notice)  # noqa: E731
        self.until(lambda: answered() and self.enabled("send"))


@pytest.fixture
def visitor(browser, served) -> Visitor:
    served.prompts.clear()
    served.answers.clear()
    return Visitor(browser, served.url)


def asked(served, *texts: str) -> list[int]:
    """The prompt of a conversation whose turns are these texts."""
    roles = ["user", "assistant"] * len(texts)
    return served.batcher.engine.prompt_ids(
        [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    )


# --- one visitor -----------------------------------------------------------------------------------------------------


@needs_browser
def test_answer_grows_and_the_next_question_follows_on_it(visitor, served):
    with served.gate.shut():
        visitor.write(FEVER)
        visitor.click("send")
        seen = []
        for _ in range(3):
            served.gate.allow(9)
            visitor.until(lambda: len(visitor.texts()) == 2 and visitor.texts()[1] not in ("", *seen))
            seen.append(visitor.texts()[1])
        assert [len(text) for text in seen] == sorted({len(text) for text in seen})
        assert all(ANSWERS[FEVER].startswith(text) and text != ANSWERS[FEVER] for text in seen)
        assert visitor.box() == "" and not visitor.enabled("send")
        served.gate.allow(100)
        visitor.until(lambda: visitor.texts() == [FEVER, ANSWERS[FEVER]] and visitor.enabled("send"))
    assert not visitor.enabled("stop")
    visitor.ask(GREETING)
    assert served.prompts == [asked(served, FEVER), asked(served, FEVER, ANSWERS[FEVER], GREETING)]
    assert served.samplings == [Sampling(100, top_k=500, repetition_penalty=1.001)] * 2


@needs_browser
def test_stop_ends_the_generation_and_keeps_what_was_said(visitor, served):
    with served.gate.shut():
        visitor.write(FEVER)
        visitor.click("send")
        served.gate.allow(13)
        visitor.until(lambda: len(visitor.texts()) == 2 and len(visitor.texts()[1]) == 4)
        assert served.batcher.running == 1
        visitor.click("stop")
        visitor.until(lambda: served.batcher.running == 0 and visitor.enabled("send"))
    partial = ANSWERS[FEVER][:4]
    assert visitor.texts() == [FEVER, partial]
    # The step that was held is the last one; another request has the model to itself at once.
    served.batcher.submit(GenerationRequest(asked(served, GREETING), Sampling(max_new_tokens=1))).result()
    assert served.gate.steps == 13 + 1 + 1
    visitor.ask(GREETING)
    assert served.prompts[-1] == asked(served, FEVER, partial, GREETING)


@needs_browser
def test_stop_while_waiting_gives_the_place_and_the_question_back(visitor, served):
    with served.gate.shut():
        request = GenerationRequest(asked(served, FEVER), Sampling(max_new_tokens=5))
        others = served.batcher.submit_many([request] * 2)
        visitor.until(lambda: served.batcher.running == 2)
        visitor.write(GREETING)
        visitor.click("send")
        visitor.until(lambda: served.batcher.waiting and visitor.texts() == [GREETING])
        visitor.click("stop")
        visitor.until(lambda: served.batcher.waiting == 0 and visitor.box() == GREETING)
    assert visitor.texts() == []
    assert [other.result().completion_tokens for other in others] == [5, 5]


@needs_browser
def test_retry_undo_and_clear(visitor, served):
    visitor.ask(GREETING)
    visitor.ask(FEVER)
    whole = visitor.texts()
    assert whole[:2] == [GREETING, ANSWERS[GREETING]]
    visitor.click("retry")
    visitor.until(lambda: len(served.prompts) == 3 and visitor.enabled("send"))
    assert visitor.texts() == whole
    assert served.prompts[2] == served.prompts[1]
    visitor.click("undo")
    visitor.until(lambda: visitor.texts() == whole[:2])
    assert visitor.box() == FEVER
    visitor.click("clear")
    visitor.until(lambda: visitor.texts() == [])
    visitor.element("#question textarea").clear()
    visitor.ask(GREETING)
    assert served.prompts[-1] == asked(served, GREETING)


@needs_browser
def test_clear_ends_a_running_answer(visitor, served):
    with served.gate.shut():
        visitor.write(FEVER + Keys.ENTER)
        served.gate.allow(13)
        visitor.until(lambda: len(visitor.texts()) == 2)
        visitor.click("clear")
        visitor.until(lambda: served.batcher.running == 0 and visitor.texts() == [])
        served.gate.allow(100)
        visitor.until(lambda: visitor.enabled("send"))
    assert visitor.texts() == []


@needs_browser
def test_settings_reach_the_model(visitor, served):
    visitor.write("x")
    visitor.click("open_settings")
    visitor.element("#system_prompt textarea").send_keys("你是小医")
    tokens = visitor.element("#max_new_tokens input[type=number]")
    tokens.send_keys(Keys.CONTROL + "a")
    tokens.send_keys("3" + Keys.TAB)
    temperature = visitor.element("#temperature input[type=number]")
    temperature.send_keys(Keys.CONTROL + "a")
    temperature.send_keys("1.5" + Keys.TAB)
    visitor.element("#seed textarea").send_keys("7" + Keys.TAB)
    visitor.click("send")
    visitor.until(lambda: visitor.notice() and visitor.enabled("send"))
    assert visitor.notice() == "The answer was cut off after 3 tokens."
    assert served.samplings[-1] == Sampling(3, 1.5, top_k=500, repetition_penalty=1.001, seed=7)
    messages = [{"role": "system", "content": "你是小医"}, {"role": "user", "content": "x"}]
    assert served.prompts == [served.batcher.engine.prompt_ids(messages)]


# --- errors ----------------------------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("question, told", [("hi <|im_end|>", "<|im_end|>"), ("x" * 300, "context of 256 tokens")])
def test_question_that_cannot_be_asked_is_given_back_with_the_reason(visitor, served, question, told):
    visitor.ask(GREETING)
    visitor.ask(question)
    assert told in visitor.notice()
    assert visitor.box() == question
    assert visitor.texts() == [GREETING, ANSWERS[GREETING]]
    visitor.element("#question textarea").clear()
    visitor.ask(FEVER)
    assert visitor.notice() == ""
    assert served.prompts[-1] == asked(served, GREETING, ANSWERS[GREETING], FEVER)


@needs_browser
def test_failing_model_and_full_queue_are_told(visitor, served):
    def fail(*_):
        # Once: a model that does not recover is given up.
        broken.remove()
        raise RuntimeError("the graphics card caught fire")

    broken = served.batcher.engine.model.register_forward_pre_hook(fail)
    visitor.ask(GREETING)
    assert visitor.notice() == "The model failed; the program's log says why."
    assert visitor.box() == GREETING
    with served.gate.shut():
        # Of another client, the last one would make room for the visitor.
        request = GenerationRequest(asked(served, FEVER), Sampling(max_new_tokens=2), client="127.0.0.1")
        first = served.batcher.submit(request)
        visitor.until(lambda: served.batcher.running)
        others = [served.batcher.submit(request) for _ in range(2)]
        visitor.click("send")
        visitor.until(lambda: "wait already" in visitor.notice())
        assert visitor.box() == GREETING
    assert {future.result().completion_tokens for future in (first, *others)} == {2}


def test_errors_of_the_engine_are_told_in_the_language_of_the_page():
    for error in (QueueFullError(9), BatcherClosedError("stopping"), ModelFailedError("failed"), TimeoutError()):
        assert re.search("[一-龥]", describe(error, "zh")) and not re.search("[一-龥]", describe(error, "en"))
    assert "9" in describe(QueueFullError(9), "zh")
    crowded = QueueFullError(9, crowding=True)
    assert describe(crowded, "en") != describe(QueueFullError(9), "en")


# --- text that is not what it seems ----------------------------------------------------------------------------------


@needs_browser
def test_html_is_text(visitor):
    visitor.ask("html")
    # Nothing of it is lost either.
    visitor.until(lambda: visitor.texts() == ["html", ANSWERS["html"].replace("`", "")])
    visitor.ask(SCRIPT)
    assert visitor.texts()[2] == SCRIPT
    visitor.ask("`<img src=x onerror=hacked()>`")
    selector = ".message script, .message [onerror]"
    assert visitor.js(f"return [window.hacked ?? null, document.querySelectorAll('{selector}').length]") == [None, 0]


@needs_browser
def test_nothing_is_loaded_from_other_hosts(visitor, browser, served):
    visitor.ask("image")
    visitor.until(lambda: "Done." in visitor.texts()[1])
    visitor.until(lambda: visitor.js("return [...document.images].every(image => image.complete)"))
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    wanted = {
        event["params"]["requestId"]: event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    }
    refused = {
        event["params"]["requestId"]
        for event in events
        if event["method"] == "Network.loadingFailed" and event["params"].get("blockedReason") == "csp"
    }
    local = (served.url, "data:", "blob:")
    assert len(wanted) > 5
    # Nothing but the image was even asked for, and that in vain.
    assert {url for url in wanted.values() if not url.startswith(local)} == {"http://images.invalid/x.png"}
    assert {wanted[name] for name in refused if name in wanted} == {"http://images.invalid/x.png"}


@needs_browser
def test_thoughts_are_folded_and_stay_in_the_conversation(visitor, served):
    visitor.ask("think")
    visitor.until(lambda: "Rest." in visitor.texts()[-1])
    # They are open while they grow.
    visitor.until(lambda: not any(mark in "".join(visitor.texts()) for mark in ("think>", "fever?")))
    visitor.element(".thought-group .title").click()
    visitor.until(lambda: "fever?" in visitor.js("return document.querySelector('.thought-group').innerText"))
    visitor.ask(GREETING)
    assert served.prompts[-1] == asked(served, "think", ANSWERS["think"], GREETING)


# --- several visitors ------------------------------------------------------------------------------------------------


@needs_browser
def test_visitors_do_not_see_each_other(visitor, browser, served):
    with served.gate.shut():
        visitor.write(FEVER)
        visitor.click("send")
        visitor.until(lambda: served.batcher.running)
        browser.switch_to.new_window("tab")
        other = Visitor(browser, served.url)
        assert other.texts() == []
        other.write(GREETING)
        other.click("send")
        visitor.until(lambda: served.batcher.running == 2)
        served.gate.allow(200)
        other.until(lambda: other.texts() == [GREETING, ANSWERS[GREETING]])
    browser.close()
    browser.switch_to.window(visitor.tab)
    visitor.until(lambda: visitor.texts() == [FEVER, ANSWERS[FEVER]])
    assert served.prompts == [asked(served, FEVER), asked(served, GREETING)]


@needs_browser
def test_visitor_who_leaves_frees_the_place(visitor, browser, served):
    with served.gate.shut():
        browser.switch_to.new_window("tab")
        other = Visitor(browser, served.url)
        other.write(FEVER)
        other.click("send")
        served.gate.allow(13)
        other.until(lambda: len(other.texts()) == 2)
        browser.close()
        browser.switch_to.window(visitor.tab)

        def one_step_on() -> bool:
            served.gate.allow(1)
            return served.batcher.running == 0

        visitor.until(one_step_on)
        assert served.gate.steps < len(ANSWERS[FEVER].encode())


@needs_browser
@pytest.mark.parametrize("accepted, language, send", [("en-US", "en", "Send"), ("fr,zh-CN,en", "zh", "发送")])
def test_page_is_in_the_language_of_the_browser(browser, served, accepted, language, send):
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": accepted})
    visitor = Visitor(browser, served.url)
    visitor.until(lambda: visitor.element("#send").text == send)
    visitor.until(lambda: visitor.js("return document.querySelector('.example') !== null"))
    shown = visitor.js("return document.body.innerText")
    assert any("\u4e00" <= char <= "\u9fff" for char in shown) == (language == "zh")
    # An example is asked as soon as it is chosen.
    visitor.element(".example").click()
    visitor.until(lambda: visitor.texts()[:1] == [EXAMPLES[language][0]] and visitor.enabled("send"))


@needs_browser
def test_flag_chooses_the_language_and_the_switch_reaches_the_template(browser, served, monkeypatch):
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": "en-US"})
    monkeypatch.setattr(gradio_demo, "thinking_default", lambda tokenizer: True)
    prompt_ids, switches = served.batcher.engine.prompt_ids, []

    def noted(*args):
        switches.append(args[-1])
        return prompt_ids(*args)

    monkeypatch.setattr(served.batcher.engine, "prompt_ids", noted)
    arguments = page_arguments("--port", "0", "--lang", "zh", "--max_new_tokens", "3")
    page = build_page(served.batcher, arguments)
    try:
        visitor = Visitor(browser, launch(page, arguments, None))
        visitor.until(lambda: visitor.element("#send").text == "发送")
        visitor.ask(GREETING)
        visitor.click("open_settings")
        visitor.element("#thinking input").click()
        visitor.ask(GREETING)
        assert visitor.notice() == "回答在 3 个 token 处被截断。"
        assert switches == [{"enable_thinking": True}, {"enable_thinking": False}]
        # No file for judged answers was named.
        assert not visitor.js("return document.querySelector('#chat [aria-label=Like]')")
    finally:
        page.close(verbose=False)


# --- what the page offers --------------------------------------------------------------------------------------------


@needs_browser
def test_what_is_typed_while_an_answer_comes_is_kept(visitor, served):
    with served.gate.shut():
        visitor.write(FEVER + Keys.ENTER)
        visitor.until(lambda: visitor.box() == "")
        visitor.write("next " + Keys.ENTER)
        visitor.until(lambda: served.batcher.running)
        visitor.write("question" + Keys.ENTER)
        served.gate.allow(200)
        visitor.until(lambda: visitor.texts() == [FEVER, ANSWERS[FEVER]] and visitor.enabled("send"))
    assert visitor.box() == "next question"
    # A question that is given back does not replace it.
    visitor.element("#question textarea").clear()
    with served.gate.shut():
        visitor.write("x" * 300 + Keys.ENTER)
        visitor.until(lambda: not visitor.box().startswith("x"))
        visitor.write("more")
        visitor.until(lambda: "context of 256 tokens" in visitor.notice())
    visitor.until(lambda: visitor.box().replace("\n", "") == "x" * 300 + "more")


@needs_browser
@pytest.mark.parametrize("width, height", [(390, 844), (1280, 800)])
def test_box_and_buttons_are_visible_without_scrolling(browser, served, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        visitor = Visitor(browser, served.url)
        places = """return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())
            .map(r => [r.left, r.top, r.right, r.bottom])"""
        for _ in range(2):
            for left, top, right, bottom in visitor.js(places, "#question textarea, #send, #retry, #export, #about p"):
                assert 0 <= left < right <= width and 0 <= top < bottom <= height
            assert visitor.js("return document.documentElement.scrollWidth") <= width
            assert not visitor.element("#temperature").is_displayed()
            visitor.ask(FEVER)
        visitor.click("open_settings")
        visitor.until(lambda: visitor.element("#temperature").is_displayed())
        visitor.click("close_settings")
        visitor.until(lambda: not visitor.element("#temperature").is_displayed())
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_an_answer_is_copied_as_the_model_wrote_it(visitor, browser):
    visitor.ask("html")
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    )
    visitor.element("#chat .message-buttons-left [aria-label^=Copy]").click()
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, done)"
    visitor.until(lambda: browser.execute_async_script(read) == ANSWERS["html"])


@needs_browser
def test_tools_are_called_and_their_results_sent_back(visitor, served, monkeypatch):
    # The model is not asked, and the prompt with tools is long.
    monkeypatch.setattr(served.batcher.engine, "context_length", 4096)
    visitor.click("open_settings")
    visitor.js("document.querySelector('#tools textarea').scrollIntoView()")
    visitor.element("#tools textarea").send_keys('[{"name": "find"')
    visitor.write("Where?")
    visitor.click("send")
    visitor.until(lambda: visitor.notice().startswith("Tools: the column `tools` is broken JSON"))
    assert visitor.box() == "Where?" and served.prompts == []
    visitor.element("#tools textarea").send_keys(', "parameters": {"type": "object", "properties": {}}}]')
    call = {"type": "function", "function": {"name": "find", "arguments": {"city": "Bern"}}}
    served.answers[:] = [
        Answer("", "stop", 1, 1, (call, call)),
        Answer("In Bern.", "stop", 1, 1),
    ]
    visitor.click("send")
    visitor.until(lambda: visitor.notice().startswith("The model calls find."))
    assert served.prompts[0] == served.batcher.engine.prompt_ids(
        [{"role": "user", "content": "Where?"}],
        read_tools('[{"name": "find", "parameters": {"type": "object", "properties": {}}}]'),
    )
    visitor.write("first" + Keys.ENTER)
    visitor.until(lambda: visitor.js("return document.querySelector('#chat').innerText").count("Tool result") == 1)
    assert len(served.prompts) == 1 and visitor.notice().startswith("The model calls find.")
    visitor.write("second" + Keys.ENTER)
    visitor.until(lambda: len(served.prompts) == 2 and visitor.enabled("send"))
    visitor.until(lambda: "In Bern." in visitor.texts()[-1] and visitor.notice() == "")
    visitor.js("URL.createObjectURL = blob => { blob.text().then(text => window.exported = text); return '#' }")
    visitor.click("export")
    visitor.until(lambda: visitor.js("return window.exported"))
    row = json.loads(visitor.js("return window.exported"))
    roles = ["human", "function_call", "observation", "observation", "gpt"]
    assert [turn["from"] for turn in row["conversations"]] == roles
    assert [turn["value"] for turn in row["conversations"]][2:] == ["first", "second", "In Bern."]


@needs_browser
def test_thumbs_are_recorded(visitor, served):
    visitor.ask("think")
    visitor.element("#chat [aria-label=Dislike]").click()
    visitor.until(lambda: visitor.notice() == "Recorded.")
    rows = [json.loads(line) for line in served.feedback.read_text(encoding="utf-8").splitlines()]
    asked_for, given = {"role": "user", "content": "think"}, {"role": "assistant", "content": ANSWERS["think"]}
    assert rows == [{"prompt": [asked_for], "completion": [given], "label": False}]


def test_thinking_can_be_switched_where_the_template_can(served):
    tokenizer = tiny_tokenizer()
    assert thinking_default(tokenizer) is None
    apply_template(tokenizer, "qwen3")
    assert thinking_default(tokenizer) is True
    engine = ChatEngine(served.batcher.engine.model, tokenizer)
    asked = [{"role": "user", "content": "?"}]
    thinking, not_thinking = (
        tokenizer.decode(engine.prompt_ids(asked, variables={"enable_thinking": each})) for each in (True, False)
    )
    assert not_thinking == thinking + "<think>\n\n</think>\n\n"


def test_thoughts_that_the_prompt_opens_are_shown_as_such():
    tokenizer = tiny_tokenizer()
    assert opened_thoughts(tokenizer, tokenizer("assistant\n<think>\n")["input_ids"]) == "<think>\n"
    assert opened_thoughts(tokenizer, tokenizer("<think>\n\n</think>\n\n")["input_ids"]) == ""


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_page_takes_no_files_and_offers_no_interface(served):
    with httpx.Client(base_url=served.url, timeout=60) as client:
        upload = client.post("gradio_api/upload", files={"files": ("a.txt", b"ab")})
        assert upload.status_code == 413
        described = client.get("gradio_api/info").json()
        assert (described["named_endpoints"], described["unnamed_endpoints"]) == ({}, {})
        assert client.post("gradio_api/run/_ask", json={"data": []}).status_code == 404
        # A web page that gives its own name this address is kept out.
        assert client.get("", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("monitoring").status_code in (403, 404)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other people in"),
        (["--share", "True"], "--share True lets other people in"),
        (["--auth", "nobody"], "user:password"),
        (["--auth", ":x"], "user:password"),
    ],
)
def test_open_page_is_refused(flags, said, monkeypatch):
    monkeypatch.delenv("MEDICALGPT_AUTH", raising=False)
    with pytest.raises(UserError, match=said):
        auth_from(page_arguments(*flags))


def test_password(monkeypatch):
    monkeypatch.delenv("MEDICALGPT_AUTH", raising=False)
    for flags in ([], ["--host", "localhost"], ["--host", "::1"]):
        assert auth_from(page_arguments(*flags)) is None
    assert auth_from(page_arguments("--host", "0.0.0.0", "--auth", "li:a:b")) == ("li", "a:b")
    monkeypatch.setenv("MEDICALGPT_AUTH", "li:secret")
    assert auth_from(page_arguments("--share", "True")) == ("li", "secret")


def test_port_that_is_taken(served):
    taken = served.url.strip("/").rpartition(":")[2]
    with pytest.raises(UserError, match=f"--host 127.0.0.1 --port {taken} cannot be listened on"):
        arguments = page_arguments("--port", taken)
        launch(build_page(served.batcher, arguments), arguments, None)


def test_program_asks_for_its_password(model):
    flags = ("--base_model", model, "--server_name", "0.0.0.0")
    with running_server("gradio_demo.py", *flags, env={"MEDICALGPT_AUTH": "li:secret"}, health="/") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            assert client.get("/config").status_code == 401
            assert client.post("/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
            assert client.post("/login", data={"username": "li", "password": "wrong"}).status_code == 400
            assert client.post("/login", data={"username": "li", "password": "secret"}).status_code == 200
            page = client.get("/")
            assert (page.status_code, client.get("/config").status_code) == (200, 200)
            assert "default-src 'self'" in page.headers["content-security-policy"]


def is_empty(visitor: Visitor) -> bool:
    return visitor.js("return document.querySelector('#image input[type=file]') !== null")


def attach(visitor: Visitor, path: str) -> None:
    visitor.until(lambda: is_empty(visitor))
    visitor.element("#image input[type=file]").send_keys(path)
    visitor.until(lambda: Path(path).stem in visitor.element("#image").text)


@pytest.mark.slow
@needs_browser
def test_an_image_is_attached(tmp_path, browser):
    trained = learn_colours(tmp_path / "trained")
    arguments = parse_args(
        DemoArguments,
        argv=["--model_name_or_path", str(trained), "--accept_images", "True", "--port", "0", "--max_new_tokens", "9"],
    )[0]
    batcher = make_batcher(ChatEngine.from_pretrained(str(trained), with_images=True))
    requests, submit = [], batcher.submit
    batcher.submit = lambda request: requests.append(request) or submit(request)
    uploads = Uploads(MAX_UPLOAD_BYTES)
    page = build_page(batcher, arguments, uploads)
    try:
        visitor = Visitor(browser, launch(page, arguments, None, uploads, MAX_IMAGE_BYTES))
        for number, colour in enumerate(COLOURS, start=1):
            visitor.click("clear")
            visitor.until(lambda: not visitor.texts())
            attach(visitor, save(tmp_path / f"{colour}.png", (18, 22), colour))
            visitor.ask("Colour?")
            said = ["🖼 18 × 22\n\nColour?", colour]
            assert visitor.texts() == said
            visitor.click("retry")
            # What is shown before the second answer begins is the same.
            visitor.until(lambda number=number: len(requests) == 2 * number and visitor.enabled("send"))
            assert visitor.texts() == said
        visitor.until(lambda: is_empty(visitor))
        visitor.click("clear")
        visitor.until(lambda: not visitor.texts())
        visitor.ask("Number 1?")
        assert visitor.texts() == ["Number 1?", "yes"]
        (tmp_path / "broken.png").write_text("no image")
        attach(visitor, str(tmp_path / "broken.png"))
        visitor.ask("Colour?")
        assert "not an image that can be read" in visitor.notice() and visitor.box() == "Colour?"
        # Gradio adds an empty file for each.
        assert not [path for path in uploads.folder.rglob("*") if path.is_file() and path.stat().st_size]
    finally:
        batcher.close(finish=False)
        page.close(verbose=False)
        uploads.close()
