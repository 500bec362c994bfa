"""A headless Chromium, and what a person does with the page in it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

CHROMIUM = Path("/usr/bin/chromium")
CHROMEDRIVER = Path("/usr/bin/chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,800",
)  # fmt: skip
WAIT_S = 30.0


@contextmanager
def browsing(profile: Path) -> Iterator[WebDriver]:
    """A browser of its own. profile: an empty folder. Skips the test where there is none installed."""
    for program in (CHROMIUM, CHROMEDRIVER):
        if not os.access(program, os.X_OK):
            pytest.skip(f"{program} is not installed, scripts/install_chromium.sh does it: the page is not tested")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")  # nothing is downloaded: both programs are given
        browser = webdriver.Chrome(options=options, service=Service(executable_path=str(CHROMEDRIVER)))
    try:
        yield browser
    finally:
        browser.quit()


@dataclass(frozen=True)
class Shown:
    """A turn as the page shows it. pictures: the names of its pictures. stats: texts by their key."""

    question: str
    pictures: list[str]
    answer: str
    note: str
    stats: dict[str, str]


def drive(
    driver: WebDriver,
    base_url: str,
    *,
    pictures: Sequence[Path],
    questions: Sequence[str],
    max_tokens: int = 24,
    timeout_s: float = 60.0,
) -> list[Shown]:
    """One conversation with any server, as a person has it: drops the first picture, picks the others, asks one
    question after the other. Returns the turns, having checked that all went well and that the console is empty."""
    open_page(driver, base_url)
    drop(driver, pictures[:1])
    pick(driver, pictures[1:])
    fill(driver, "max_tokens", str(max_tokens))
    for number, question in enumerate(questions, start=1):
        ask(driver, question)
        wait(driver, lambda number=number: len(turns(driver)) == number and is_idle(driver), timeout_s=timeout_s)
    seen = turns(driver)
    assert [turn.question for turn in seen] == list(questions)
    assert [turn.pictures for turn in seen] == [[path.name for path in pictures], *[[] for _ in questions[1:]]]
    for turn in seen:
        assert turn.note in ("", "Cut off: these were the most tokens allowed.")
        assert set(turn.stats) == {"first", "tokens", "speed", "prompt", "cached", "total"}
        assert 1 <= int(turn.stats["tokens"]) <= max_tokens
        assert number_of(turn.stats["first"]) / 1000 <= number_of(turn.stats["total"]) + 0.01
    assert console(driver) == []
    return seen


def open_page(driver: WebDriver, url: str) -> None:
    driver.get(url.rstrip("/") + "/")
    wait(driver, lambda: one(driver, "#limits").text != "looking for the model …")


def ask(driver: WebDriver, question: str) -> None:
    one(driver, "#question").send_keys(question, Keys.CONTROL, Keys.ENTER)


def fill(driver: WebDriver, name: str, value: str) -> None:
    box = one(driver, f"#{name}")
    box.clear()
    box.send_keys(value)


def pick(driver: WebDriver, paths: Sequence[Path]) -> None:
    if paths:
        one(driver, "#files").send_keys("\n".join(str(path) for path in paths))


def drop(driver: WebDriver, paths: Sequence[Path]) -> None:
    give(driver, "new DragEvent('drop', {dataTransfer: held, bubbles: true, cancelable: true})", paths)


def paste(driver: WebDriver, paths: Sequence[Path]) -> None:
    give(driver, "new ClipboardEvent('paste', {clipboardData: held, bubbles: true, cancelable: true})", paths)


def give(driver: WebDriver, made: str, paths: Sequence[Path]) -> None:
    """Fires an event that holds files over the question's box; no one else may act on it."""
    script = f"""
        const held = new DataTransfer();
        for (const [name, type, data] of arguments[0]) {{
            const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
            held.items.add(new File([bytes], name, {{type}}));
        }}
        return document.getElementById("question").dispatchEvent({made});
    """
    given = [(path.name, type_of(path), base64.b64encode(path.read_bytes()).decode()) for path in paths]
    assert driver.execute_script(script, given) is False


def type_of(path: Path) -> str:
    return "image/" + path.suffix.removeprefix(".").replace("jpg", "jpeg")


def one(driver: WebDriver, selector: str) -> WebElement:
    return driver.find_element(By.CSS_SELECTOR, selector)


def wait(driver: WebDriver, until: Callable[[], bool], *, timeout_s: float = WAIT_S) -> None:
    ignored = [StaleElementReferenceException]
    WebDriverWait(driver, timeout_s, poll_frequency=0.02, ignored_exceptions=ignored).until(lambda _: until())


def is_idle(driver: WebDriver) -> bool:
    return one(driver, "#send").is_displayed() and not one(driver, "#stop").is_displayed()


def turns(driver: WebDriver) -> list[Shown]:
    script = """
        const texts = (turn, selector) => [...turn.querySelectorAll(selector)].map((found) => found.textContent);
        return [...document.querySelectorAll(".turn")].map((turn) => ({
            question: texts(turn, ".asked")[0],
            pictures: [...turn.querySelectorAll(".shots img")].map((image) => image.alt),
            answer: texts(turn, ".answer")[0],
            note: texts(turn, ".note")[0],
            stats: Object.fromEntries([...turn.querySelectorAll("dd")].map((dd) => [dd.dataset.stat, dd.textContent])),
        }));
    """
    return [Shown(**turn) for turn in driver.execute_script(script)]


def thumbnails(driver: WebDriver) -> list[str]:
    """Names of the pictures to be sent."""
    return [image.get_attribute("alt") for image in driver.find_elements(By.CSS_SELECTOR, "#pictures img")]


def finished(driver: WebDriver) -> Shown:
    """The last turn, once it has ended."""
    wait(driver, lambda: bool(turns(driver)) and is_idle(driver))
    return turns(driver)[-1]


def number_of(text: str) -> float:
    return float(text.split()[0].replace(",", ""))


def console(driver: WebDriver) -> list[str]:
    """What the browser has logged since the last call: errors, and violations of the policy."""
    return [f"{entry['level']} {entry['message']}" for entry in driver.get_log("browser")]  # type: ignore[no-untyped-call]
