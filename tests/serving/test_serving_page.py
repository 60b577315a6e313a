"""The page at /, in a real browser."""

from __future__ import annotations

import pytest
from browser import browser
from log_helpers import world
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait
from serving_helpers import FAST, serving

from dnr_recbole import Reranker


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    Reranker("PRM", **{**FAST, "epochs": 3}).fit(world(300)).save(folder / "one")
    Reranker("MiDNN", **FAST).fit(world(300)).save(folder / "two")
    with browser(folder) as driver, serving(folder / "one", folder / "two") as running:
        driver.get(running.url)
        wait(driver, lambda d: shown(d))
        yield driver


def wait(driver, condition):
    return WebDriverWait(driver, 30).until(condition)


def shown(driver):
    """Rows of the reranked list as texts: place, item, score, move, and three ranks."""
    return driver.execute_script(  # at once: the list may be drawn anew at any time
        "return [...document.querySelectorAll('#ranked tr')].map(row => [...row.cells].map(cell => cell.textContent))"
    )


def test_the_lists_stand_side_by_side(page):
    incoming = page.find_elements(By.CSS_SELECTOR, "#incoming tr")
    assert len(incoming) == 8 and len(shown(page)) == 6
    scores = [float(field.get_attribute("value")) for field in page.find_elements(By.CSS_SELECTOR, "#incoming input")]
    assert scores == sorted(scores, reverse=True)
    assert page.find_elements(By.CSS_SELECTOR, "#history li")
    assert "clicked items among the 6 shown" in page.find_element(By.ID, "status").text
    assert all(len(row) == 7 for row in shown(page))
    errors = [one["message"] for one in page.get_log("browser") if one["level"] == "SEVERE"]
    assert not [message for message in errors if "favicon" not in message]


def test_another_score_moves_the_item(page):
    Select(page.find_element(By.ID, "k")).select_by_visible_text("all")
    wait(page, lambda d: len(shown(d)) == 8)
    last = page.find_elements(By.CSS_SELECTOR, "#incoming tr")[-1]
    item = last.find_elements(By.TAG_NAME, "td")[1].text.split()[0]
    before = next(row for row in shown(page) if row[1].split()[0] == item)
    field = last.find_element(By.TAG_NAME, "input")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("0.999")
    wait(page, lambda d: next(row for row in shown(d) if row[1].split()[0] == item) != before)
    after = next(row for row in shown(page) if row[1].split()[0] == item)
    assert float(after[2]) > float(before[2]) and int(after[0]) <= int(before[0])
    assert "changed" in last.get_attribute("class")
    page.find_element(By.ID, "reset").click()
    wait(page, lambda d: next(row for row in shown(d) if row[1].split()[0] == item) == before)


def test_models_and_requests_are_chosen_with_the_keyboard(page):
    first = shown(page)
    page.find_element(By.ID, "model").send_keys(Keys.ARROW_DOWN)
    wait(page, lambda d: "Model two" in d.find_element(By.ID, "version").text)
    assert shown(page) != first
    second = shown(page)
    page.find_element(By.ID, "request").send_keys(Keys.ARROW_DOWN)
    wait(page, lambda d: shown(d) and shown(d) != second)


def test_everything_has_a_name_for_those_who_do_not_see_it(page):
    unnamed = page.execute_script(
        "return [...document.querySelectorAll('input, select, button')].filter(e => !e.labels?.length "
        "&& !e.getAttribute('aria-label') && !e.textContent.trim()).length"
    )
    assert unnamed == 0
    assert page.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"
    assert page.find_element(By.ID, "status").get_attribute("aria-live") == "polite"
    order = []
    page.find_element(By.TAG_NAME, "body").click()
    for _ in range(6):
        page.switch_to.active_element.send_keys(Keys.TAB)
        order.append(page.switch_to.active_element.get_attribute("id"))
    assert [name for name in order if name] == sorted(
        [name for name in order if name], key=["token", "model", "request", "k", "reset", "history"].index
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(page, scheme, tmp_path):
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colour = "return getComputedStyle(document.body).{}"
    back, ink = (page.execute_script(colour.format(name)) for name in ("backgroundColor", "color"))
    light = lambda text: sum(map(int, text[text.index("(") + 1 : -1].split(",")[:3]))  # noqa: E731
    assert (light(back) > light(ink)) == (scheme == "light")
    assert page.get_screenshot_as_file(str(tmp_path / f"{scheme}.png"))
