"""Chromium as the tests of the report drive it; needs Selenium."""

import base64
import json
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

__all__ = ("SIZES", "By", "Keys", "Page", "Select", "WebDriverWait", "start")
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


class Page:
    """A page in the browser; errors and requests are collected."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, file, size="desktop", scheme="light"):
        width, height = SIZES[size]
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.get(file.as_uri())
        return self

    def script(self, text, *arguments):
        return self.driver.execute_script(text, *arguments)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).get_attribute("textContent")

    def see(self, element):
        self.script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        return element

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self):
        logged = (json.loads(entry["message"]) for entry in self.driver.get_log("performance"))
        sent = [each["message"] for each in logged]
        return [
            each["params"]["request"]["url"]
            for each in sent
            if each["method"] == "Network.requestWillBeSent"
        ]

    def picture(self, file, section=None):
        """Write what is seen, from the top of a section on, as a WebP file."""
        if section is not None:
            self.script(
                "scrollTo({top: document.getElementById(arguments[0]).offsetTop - 60, "
                "behavior: 'instant'})",
                section,
            )
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "webp", "quality": 82}
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(taken["data"]))


def start():
    """Return a driver of a headless Chromium; None where it is not installed."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        return None
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                 "--hide-scrollbars", "--window-size=1280,900"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))
