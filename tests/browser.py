"""A headless Chromium for tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Iterator

from selenium import webdriver

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1400,900",
)  # fmt: skip


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[webdriver.Chrome]:
    """A browser whose own files are below ``folder``; what pages say on their console is kept (``get_log``)."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in (*_FLAGS, f"--user-data-dir={folder / 'browser'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
