"""gradio_demo.py in a real browser: streaming, stop, turns, errors, hostile text, several visitors; who is let in."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from gradio_demo import EXAMPLES, MAX_IMAGE_BYTES, MAX_UPLOAD_BYTES, DemoArguments, build_page
from medicalgpt.errors import UserError
from medicalgpt.parser import parse_args
from medicalgpt.serving.batchers import make_batcher
from medicalgpt.serving.chat import ChatEngine
from medicalgpt.serving.generation import GenerationRequest, Sampling
from medicalgpt.serving.page import launch
from medicalgpt.serving.uploads import Uploads
from medicalgpt.serving.web import auth_from
from tests.gate import Gate
from tests.pictures import COLOURS, learn_colours, save
from tests.servers import running_server
from tests.tiny import make_tiny

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
def served(model) -> Iterator[SimpleNamespace]:
    """The page on a model that knows ANSWERS by heart, with the gate before it, and what it was asked."""
    batcher = make_batcher(ChatEngine.from_pretrained(model), max_batch_size=2, max_waiting=1)
    gate, prompts, samplings, submit = Gate(batcher.engine.model), [], [], batcher.submit

    def noted(request):
        prompts.append(request.prompt_ids)
        samplings.append(request.sampling)
        return submit(request)

    batcher.submit = noted
    arguments = page_arguments(
        "--port", "0", "--max_new_tokens", "100", "--top_k", "500", "--repetition_penalty", "1.001"
    )
    page = build_page(batcher, arguments)
    url = launch(page, arguments, None)
    yield SimpleNamespace(url=url, batcher=batcher, gate=gate, prompts=prompts, samplings=samplings)
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
        return self.js("return document.querySelector('#notice textarea')?.value ?? ''")

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
    # The conversation has an icon of its own that empties it.
    visitor.element("button[aria-label='Clear']").click()
    visitor.until(lambda: visitor.texts() == [] and not visitor.enabled("retry"))
    visitor.ask(FEVER)
    assert served.prompts[-1] == asked(served, FEVER)


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
    assert visitor.notice() == "The answer was cut after 3 tokens."
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
@pytest.mark.parametrize("language, send", [("en-US", "Send"), ("zh-CN", "发送")])
def test_labels_are_in_the_language_of_the_browser(browser, served, language, send):
    agent = browser.execute_script("return navigator.userAgent")
    browser.execute_cdp_cmd("Emulation.setUserAgentOverride", {"userAgent": agent, "acceptLanguage": language})
    visitor = Visitor(browser, served.url)
    assert visitor.element("#send").text == send
    # An example is asked as soon as it is chosen.
    visitor.element(".example").click()
    visitor.until(lambda: visitor.texts()[:1] == [EXAMPLES[0]] and visitor.enabled("send"))


# --- who is let in ---------------------------------------------------------------------------------------------------


def test_page_takes_no_files_and_offers_no_interface(served):
    with httpx.Client(base_url=served.url) as client:
        upload = client.post("gradio_api/upload", files={"files": ("a.txt", b"ab")})
        assert upload.status_code == 413
        described = client.get("gradio_api/info").json()
        assert (described["named_endpoints"], described["unnamed_endpoints"]) == ({}, {})
        assert client.post("gradio_api/run/ask", json={"data": []}).status_code == 404
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
        with httpx.Client(base_url=server.url) as client:
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
    uploads = Uploads(MAX_UPLOAD_BYTES)
    page = build_page(batcher, arguments, uploads)
    try:
        visitor = Visitor(browser, launch(page, arguments, None, uploads, MAX_IMAGE_BYTES))
        for colour in COLOURS:
            visitor.click("clear")
            visitor.until(lambda: not visitor.texts())
            attach(visitor, save(tmp_path / f"{colour}.png", (18, 22), colour))
            visitor.ask("Colour?")
            said = ["🖼 18 × 22\n\nColour?", colour]
            assert visitor.texts() == said
            visitor.click("retry")
            visitor.until(lambda said=said: visitor.texts() == said and visitor.enabled("send"))
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
