"""The page in a headless Chromium, against a stand-in for the server that answers from a script."""

from __future__ import annotations

import base64
import itertools
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from .browsing import (
    ask,
    browsing,
    console,
    drive,
    fill,
    finished,
    is_idle,
    number_of,
    one,
    open_page,
    paste,
    pick,
    thumbnails,
    turns,
    type_of,
    wait,
)
from .live import Live
from .scripted_http import (
    DONE,
    MODEL,
    PREFIX,
    ROLE,
    WAIT_S,
    Reply,
    StandIn,
    answering,
    delta,
    event,
    standing_in,
    usage,
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def only_stand_in() -> Iterator[StandIn]:
    with standing_in() as state:
        yield state


@pytest.fixture
def stand_in(only_stand_in: StandIn) -> StandIn:
    only_stand_in.reset()
    return only_stand_in


@pytest.fixture
def page(driver: WebDriver, stand_in: StandIn) -> Iterator[WebDriver]:
    """A fresh page; a test that makes the console say something has to take it."""
    console(driver)
    open_page(driver, stand_in.url)
    yield driver
    assert console(driver) == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / name for name in ("red.png", "green.jpeg", "blue.webp", "gray.tiff")]
    for path, color in zip(paths, ("red", "green", "blue", "gray"), strict=True):
        Image.new("RGB", (40, 30), color).save(path)
    return paths


def part_of(path: Path) -> dict[str, Any]:
    """The part of a message that holds a picture."""
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{type_of(path)};base64,{data}"}}


# What is sent.


def test_a_conversation_is_sent_whole_with_the_pictures_of_every_turn(
    driver: WebDriver, stand_in: StandIn, pictures: list[Path]
) -> None:
    console(driver)
    stand_in.replies += [answering("Three", " colours."), answering("Red", ".")]
    seen = drive(driver, stand_in.url, pictures=pictures[:3], questions=["Which colours?", "And the first?"])
    assert [turn.answer for turn in seen] == ["Three colours.", "Red."]
    paste(driver, pictures[3:])
    stand_in.replies.append(answering("Gray."))
    ask(driver, "And this?")
    wait(driver, lambda: turns(driver)[-1].answer == "Gray." and is_idle(driver))
    first = {"role": "user", "content": [*map(part_of, pictures[:3]), {"type": "text", "text": "Which colours?"}]}
    third = {"role": "user", "content": [part_of(pictures[3]), {"type": "text", "text": "And this?"}]}
    messages = [
        first,
        {"role": "assistant", "content": "Three colours."},
        {"role": "user", "content": "And the first?"},
        {"role": "assistant", "content": "Red."},
        third,
    ]
    settings = {"model": MODEL, "max_tokens": 24, "temperature": 0}
    common = {**settings, "stream": True, "stream_options": {"include_usage": True}}
    assert stand_in.bodies == [{**common, "messages": messages[:count]} for count in (1, 3, 5)]


def test_pictures_are_pasted_and_removed_and_asked_about_without_a_word(
    page: WebDriver, stand_in: StandIn, pictures: list[Path]
) -> None:
    stand_in.replies.append(answering("Two."))
    paste(page, pictures[:2])
    pick(page, pictures[2:])
    assert thumbnails(page) == [path.name for path in pictures]
    one(page, f"[aria-label='Remove {pictures[1].name}']").click()
    assert page.switch_to.active_element.accessible_name == f"Remove {pictures[2].name}"
    page.switch_to.active_element.send_keys(Keys.SPACE)
    pick(page, pictures[1:2])
    left = [pictures[0], pictures[3], pictures[1]]
    assert thumbnails(page) == [path.name for path in left]
    one(page, "#send").click()
    assert finished(page).answer == "Two."
    assert thumbnails(page) == []
    assert stand_in.bodies[0]["messages"] == [{"role": "user", "content": [part_of(path) for path in left]}]


def test_nothing_is_sent_where_nothing_is_asked(page: WebDriver, stand_in: StandIn) -> None:
    ask(page, "  ")
    assert turns(page) == [] and stand_in.bodies == []


@pytest.mark.parametrize(
    ("filled", "expected"),
    [
        ({}, {"max_tokens": 512, "temperature": 0}),
        ({"max_tokens": "7", "temperature": "0.75", "seed": "42"}, {"max_tokens": 7, "temperature": 0.75, "seed": 42}),
        ({"max_tokens": "", "temperature": ""}, {}),
    ],
)
def test_settings_are_sent_as_they_are_filled_in(
    page: WebDriver, stand_in: StandIn, filled: dict[str, str], expected: dict[str, float]
) -> None:
    stand_in.replies.append(answering("Yes."))
    for name, value in filled.items():
        fill(page, name, value)
    ask(page, "Well?")
    finished(page)
    body = stand_in.bodies[0]
    assert {name: body[name] for name in body.keys() & {"max_tokens", "temperature", "seed"}} == expected


@pytest.mark.parametrize(("name", "value"), [("max_tokens", "4097"), ("max_tokens", "0"), ("temperature", "-1")])
def test_a_setting_out_of_its_range_is_not_sent(page: WebDriver, stand_in: StandIn, name: str, value: str) -> None:
    fill(page, name, value)
    ask(page, "Well?")
    assert page.switch_to.active_element.get_attribute("id") == name
    assert turns(page) == [] and stand_in.bodies == []
    assert one(page, "#question").get_property("value") == "Well?"


def test_files_that_are_no_pictures_or_too_large_are_refused_with_a_word(page: WebDriver, tmp_path: Path) -> None:
    for name in ("drawing.svg", "empty.png"):
        (tmp_path / name).write_bytes(b"<svg/>" if name.endswith("svg") else b"")
    with (tmp_path / "large.png").open("wb") as file:
        file.truncate((32 << 20) + 1)
    Image.new("L", (3, 3)).save(tmp_path / "good.png")
    pick(page, [tmp_path / name for name in ("drawing.svg", "good.png", "large.png", "empty.png")])
    assert thumbnails(page) == ["good.png"]
    assert one(page, "#notice").text == (
        "drawing.svg is not a PNG, JPEG, WebP, GIF, BMP or TIFF picture. large.png is larger than 32 MiB. "
        "empty.png is empty."
    )


def test_below_a_prefix_and_behind_a_password_the_page_finds_its_server(driver: WebDriver, stand_in: StandIn) -> None:
    console(driver)
    stand_in.key = "secret"
    stand_in.replies.append(answering("Here."))
    open_page(driver, stand_in.url.replace("://", "://me:secret@") + PREFIX)
    ask(driver, "Where?")
    assert finished(driver).answer == "Here."
    assert set(stand_in.paths) == {
        f"{PREFIX}/", f"{PREFIX}/page.js", f"{PREFIX}/page.css", f"{PREFIX}/v1/models", f"{PREFIX}/v1/chat/completions"
    }  # fmt: skip
    assert console(driver) == []


# What is shown.


def test_an_answer_grows_as_it_comes_and_is_read_out_once_it_is_whole(page: WebDriver, stand_in: StandIn) -> None:
    gates = [threading.Event(), threading.Event()]
    stand_in.replies.append(
        Reply([ROLE, gates[0], delta("One"), gates[1], delta(" two"), delta("", finish="stop"), usage(), DONE])
    )
    ask(page, "Count.")
    wait(page, lambda: len(turns(page)) == 1)
    assert (turns(page)[0].answer, turns(page)[0].stats, is_idle(page)) == ("", {}, False)
    gates[0].set()
    wait(page, lambda: turns(page)[0].answer == "One")
    assert set(turns(page)[0].stats) == {"first"} and not is_idle(page)
    assert one(page, "#log").get_attribute("aria-live") == "polite"
    assert one(page, ".reply").get_attribute("aria-busy") == "true"
    gates[1].set()
    assert finished(page).answer == "One two"
    assert one(page, ".reply").get_attribute("aria-busy") == "false"
    assert one(page, "#model").text == page.title == MODEL
    assert one(page, "#limits").text == "up to 4,096 tokens"


def test_times_and_tokens_are_those_of_the_server(page: WebDriver, stand_in: StandIn) -> None:
    waits_s = (0.6, 0.2)
    body = [ROLE, waits_s[0], delta("a"), waits_s[1], delta("b", finish="length"), usage(completion=2), DONE]
    stand_in.replies.append(Reply(body))
    ask(page, "How fast?")
    turn = finished(page)
    assert turn.note == "Cut off: these were the most tokens allowed."
    exact = {"tokens": "2", "prompt": "1,205", "cached": "1,152"}
    assert {key: turn.stats[key] for key in exact} == exact
    # Loose, for the machine may be busy; still far from what other formulas give (10, 2.5 and 1.25 tokens/s).
    assert 600 <= number_of(turn.stats["first"]) < 2000
    assert number_of(turn.stats["speed"]) == pytest.approx(1 / waits_s[1], rel=0.45)
    assert sum(waits_s) <= number_of(turn.stats["total"]) + 0.01 < 3


def test_an_answer_of_one_token_has_no_speed(page: WebDriver, stand_in: StandIn) -> None:
    stand_in.replies.append(Reply([ROLE, delta("Yes", finish="stop"), usage(completion=1, cached=0), DONE]))
    ask(page, "Well?")
    stats = finished(page).stats
    assert (stats["tokens"], stats["speed"], stats["cached"]) == ("1", "–", "0")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_stream_that_is_split_anywhere_is_read_alike(page: WebDriver, stand_in: StandIn, newline: str) -> None:
    page.execute_script("""
        const whole = window.fetch;
        const split = (chunk, control) => chunk.forEach((byte) => control.enqueue(Uint8Array.of(byte)));
        window.fetch = async (...given) => {
            const { body, status } = await whole(...given);
            return new Response(body.pipeThrough(new TransformStream({ transform: split })), { status });
        };
    """)
    texts = ["Grüße", ", 世界 ", "👩‍🔬", "\n\ndata: x\r", "."]
    noise = f": a comment{newline}event: x{newline}id:{newline}".encode()
    chunks = [event({"choices": [{"delta": {"content": text}, "finish_reason": None}]}, newline) for text in texts]
    chunks[1] = chunks[1].replace(b', "finish_reason"', f',{newline}data: "finish_reason"'.encode())
    stand_in.replies.append(Reply([noise, *chunks, f"data:[DONE]{newline}{newline}x".encode()]))
    ask(page, "Wer da?")
    turn = finished(page)
    assert (turn.answer, turn.note) == ("".join(texts), "")


def test_the_end_of_an_answer_stays_in_sight_until_the_person_scrolls_up(
    page: WebDriver, stand_in: StandIn, pictures: list[Path]
) -> None:
    gates = [threading.Event(), threading.Event()]
    lines = "\n".join(["a line"] * 60)
    parts = [ROLE, delta(lines), gates[0], delta(lines), gates[1], delta(lines, finish="stop"), usage(), DONE]
    stand_in.replies.append(Reply(parts))

    def below() -> float:
        rest: float = page.execute_script("const log = arguments[0]; return log.scrollHeight - log.scrollTop - "
                                          "log.clientHeight", one(page, "#log"))  # fmt: skip
        return rest

    pick(page, pictures)
    ask(page, "Line by line.")
    for number in (1, 2):
        wait(page, lambda number=number: turns(page)[-1].answer == lines * number)
        wait(page, lambda: below() < 2)
        if number == 1:
            gates[0].set()
    page.execute_script("arguments[0].scrollTop = 40", one(page, "#log"))
    wait(page, lambda: below() > 1000)
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    gates[1].set()
    assert finished(page).answer == lines * 3
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert one(page, "#log").get_property("scrollTop") == 40


def test_markup_stays_text(page: WebDriver, stand_in: StandIn, tmp_path: Path) -> None:
    markup = "<script>document.title = 'gone'</script><img src=x onerror=\"document.title = 'gone'\">"
    path = tmp_path / "<img src=x>.png"
    Image.new("L", (3, 3)).save(path)
    pick(page, [path])
    stand_in.replies.append(answering(markup[:5], markup[5:]))
    ask(page, markup)
    turn = finished(page)
    assert (turn.question, turn.answer, turn.pictures) == (markup, markup, [path.name])
    assert one(page, ".answer").text == markup
    assert page.find_elements(By.CSS_SELECTOR, "#log script, #log [onerror], h1 b") == []
    assert page.title == MODEL


def test_a_violation_of_the_policy_would_be_seen_in_the_console(page: WebDriver) -> None:
    page.execute_script("document.body.append(document.createElement('script'))")
    page.execute_script("document.querySelector('body > script').textContent = 'document.title = 1'")
    (message,) = console(page)
    assert "Content Security Policy" in message and page.title == MODEL


# What goes wrong.


def test_stop_ends_the_request_and_keeps_what_has_been_said(page: WebDriver, stand_in: StandIn) -> None:
    endless = itertools.chain([ROLE], itertools.chain.from_iterable(itertools.repeat((delta("on "), 0.02), 500)))
    stand_in.replies += [Reply(endless), answering("Because.")]
    ask(page, "Go on.")
    wait(page, lambda: bool(turns(page)) and turns(page)[0].answer.startswith("on on"))
    assert not stand_in.left.is_set()
    one(page, "#stop").click()
    turn = finished(page)
    assert stand_in.left.wait(WAIT_S)
    assert turn.note == "Stopped." and set(turn.stats) == {"first", "total"}
    assert page.switch_to.active_element.get_attribute("id") == "question"
    ask(page, "Why?")
    wait(page, lambda: len(turns(page)) == 2 and is_idle(page))
    assert [message["content"] for message in stand_in.bodies[1]["messages"]] == ["Go on.", turn.answer, "Why?"]


def test_stop_before_the_first_word_gives_the_question_back(
    page: WebDriver, stand_in: StandIn, pictures: list[Path]
) -> None:
    waiting = itertools.chain.from_iterable(itertools.repeat((b": wait\n\n", 0.02), 500))
    stand_in.replies.append(Reply(waiting))
    pick(page, pictures[:1])
    ask(page, "Go on.")
    wait(page, lambda: len(stand_in.bodies) == 1)
    pick(page, pictures[1:2])
    one(page, "#question").send_keys("Or not.")
    one(page, "#stop").click()
    assert finished(page).note == "Stopped."
    assert one(page, "#question").get_property("value") == "Go on.\nOr not."
    assert thumbnails(page) == [path.name for path in pictures[:2]]
    assert stand_in.left.wait(WAIT_S)


LOST = "The connection was lost before the answer ended."
FULL = {"error": {"message": "too many requests: 300 wait already", "type": "rate_limit_error", "code": None}}
FAILURES = {
    "refused": (Reply([json.dumps(FULL).encode()], 429, "application/json"), "429: " + FULL["error"]["message"], ""),
    "no JSON": (Reply([b"<h1>Bad</h1>"], 502, "text/html"), "502: Bad Gateway", ""),
    "in the stream": (
        Reply([ROLE, delta("Half"), event({"error": {"message": "the engine has ended"}}), DONE]),
        "the engine has ended",
        "Half",
    ),
    "cut off": (Reply([ROLE, delta("Half")]), LOST, "Half"),
    "cut off too early": (Reply([ROLE], length=9999), LOST, ""),
    "no events": (Reply([b"data: {]\n\n"]), "The answer cannot be read: ", ""),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_shown_and_the_question_stays_for_another_try(
    page: WebDriver, stand_in: StandIn, pictures: list[Path], name: str
) -> None:
    reply, note, answer = FAILURES[name]
    stand_in.replies += [reply, answering("Red.")]
    pick(page, pictures[:1])
    ask(page, "Which colour?")
    turn = finished(page)
    assert turn.note.startswith(note) and turn.answer == answer
    assert one(page, ".note").get_attribute("role") == "alert" and one(page, ".note").is_displayed()
    logged = console(page)
    # The browser's own words for a status or a connection that is none of success, and nothing else.
    assert all("/v1/chat/completions" in message and "Failed to load" in message for message in logged)
    assert len(logged) == (0 if reply.status == 200 and reply.length is None else 1)
    assert one(page, "#question").get_property("value") == "Which colour?"
    assert thumbnails(page) == [pictures[0].name]
    one(page, "#send").click()
    wait(page, lambda: turns(page)[-1].answer == "Red." and is_idle(page))
    assert len(turns(page)) == 1
    assert stand_in.bodies[1] == stand_in.bodies[0]
    assert len(stand_in.bodies[1]["messages"]) == 1


def test_a_server_that_is_not_ready_is_asked_for_its_model_again(driver: WebDriver, stand_in: StandIn) -> None:
    stand_in.models_status = 503
    stand_in.replies.append(answering("Now."))
    open_page(driver, stand_in.url)
    assert one(driver, "#limits").text == "503: loading still"
    ask(driver, "Now?")
    assert finished(driver).note == "503: loading still" and stand_in.bodies == []
    stand_in.models_status = 200
    one(driver, "#send").click()
    wait(driver, lambda: turns(driver)[-1].answer == "Now.")
    assert one(driver, "#model").text == MODEL and stand_in.bodies[0]["model"] == MODEL


def test_a_server_that_is_gone_is_said_to_be(driver: WebDriver) -> None:
    with standing_in() as gone:
        open_page(driver, gone.url)
    ask(driver, "Anyone?")
    turn = finished(driver)
    assert turn.note == "The server cannot be reached." and turn.question == "Anyone?"


def test_a_new_conversation_forgets_the_old_one_and_what_is_being_answered(
    page: WebDriver, stand_in: StandIn, pictures: list[Path]
) -> None:
    endless = itertools.chain.from_iterable(itertools.repeat((delta("on "), 0.02), 500))
    stand_in.replies += [answering("Red."), Reply(endless), answering("Green.")]
    pick(page, pictures[:1])
    ask(page, "Which colour?")
    finished(page)
    ask(page, "Go on.")
    wait(page, lambda: turns(page)[-1].answer.startswith("on on"))
    one(page, "#new").click()
    assert stand_in.left.wait(WAIT_S)
    assert turns(page) == [] and is_idle(page) and one(page, "#welcome").is_displayed()
    assert one(page, "#question").get_property("value") == ""
    ask(page, "And now?")
    assert finished(page).answer == "Green."
    assert stand_in.bodies[2]["messages"] == [{"role": "user", "content": "And now?"}]


# How it looks.


def test_every_control_has_a_name_and_is_reached_by_keyboard(page: WebDriver) -> None:
    names = []
    page.execute_script("document.activeElement.blur()")
    for _ in range(8):
        ActionChains(page).send_keys(Keys.TAB).perform()
        names.append(page.switch_to.active_element.accessible_name)
    assert names == [
        "New conversation", "Conversation", "Question", "Add pictures", "Max tokens", "Temperature", "Seed", "Send"
    ]  # fmt: skip


CONTRAST = """
    const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].reduce((sum, part, i) => {
        const share = part / 255;
        const linear = share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
        return sum + [0.2126, 0.7152, 0.0722][i] * linear;
    }, 0);
    const ground = (element) => {
        const color = numbers(getComputedStyle(element).backgroundColor);
        return color[3] === 0 ? ground(element.parentElement) : color;
    };
    return Object.fromEntries(arguments[0].map((selector) => {
        const element = document.querySelector(selector);
        const pair = [light(numbers(getComputedStyle(element).color)), light(ground(element))].sort((a, b) => b - a);
        return [selector, (pair[0] + 0.05) / (pair[1] + 0.05)];
    }));
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_words_are_readable_and_nothing_is_cut_off(
    page: WebDriver, stand_in: StandIn, pictures: list[Path], scheme: str, width: int
) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    screen = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        stand_in.replies += [answering("x" * 300), Reply([b"{}"], 500, "application/json")]
        pick(page, pictures)
        ask(page, "y" * 100)
        finished(page)
        pick(page, pictures)
        ask(page, "Again?")
        wait(page, lambda: turns(page)[-1].note != "")
        console(page)
        assert page.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
        log = one(page, "#log")
        assert log.get_property("scrollWidth") == log.get_property("clientWidth")
        assert one(page, "#send").is_displayed() and one(page, "#send").rect["y"] < 700
        selectors = ["h1", "#limits", "#new", ".asked", ".answer", ".failed .note", "dt", "dd", ".field", "#send"]
        contrasts = page.execute_script(CONTRAST, selectors)
        assert min(contrasts.values()) >= 4.5, contrasts
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_server_itself_answers_the_page(driver: WebDriver, live: Live, pictures: list[Path]) -> None:
    shown = drive(driver, live.url, pictures=pictures[:2], questions=["What is it?", "And now?"], max_tokens=8)
    assert [turn.question for turn in shown] == ["What is it?", "And now?"]
    assert len(shown[0].pictures) == 2 and not shown[1].pictures
    assert all(turn.answer for turn in shown) and [turn.stats["tokens"] for turn in shown] == ["8", "8"]
