"""Looks at every page of the built site in a browser, on a laptop's screen and on a phone's.

    python docs/check_site.py site                  # after make docs; make check-site does both
    python docs/check_site.py site --screenshots build/site

Opens the pages from disk, with no server, in Debian's Chromium. Fails, naming page and place, where

* a page is wider than the screen, or code or a formula is clipped or has to be scrolled,
* on the laptop a table or picture is wider than its place,
* a link leads to a file or a heading that is not there, or a picture does not load,
* anything is fetched over the network, or a script fails,
* a page lacks its previous or next link, or the search finds nothing.

Needs nothing but the browser: its protocol is spoken over a pipe. Exits with 1 where there are
findings, and with 2 where the check could not be made.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

WIDTHS = {1280: 900, 390: 844}  # of the screens, with their heights
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT = 60.0  # seconds for any one answer of the browser

MEASURE = """(() => {
  const place = element => element.tagName.toLowerCase() + " “" +
    (element.innerText || element.src || "").trim().replace(/\\s+/g, " ").slice(0, 60) + "”"
  const shown = [...document.querySelectorAll("details")]
  shown.forEach(details => details.open = true)  // code in boxes is read as well
  const wider = (selector, slack) => [...document.querySelectorAll(selector)]
    .filter(element => element.scrollWidth > element.clientWidth + slack).map(place)
  const article = document.querySelector("article").getBoundingClientRect()
  return {
    page: document.documentElement.scrollWidth,
    code: wider(".md-content pre, .md-content pre > code, .md-content math", 1),
    tables: wider(".md-typeset__scrollwrap", 1).concat(
      [...document.querySelectorAll("article img, article svg")]
        .filter(image => image.getBoundingClientRect().right > article.right + 1).map(place)),
    pictures: [...document.images].filter(image => !image.naturalWidth).map(image => image.src),
    links: [...document.querySelectorAll("a[href]")].map(link => link.href),
    anchors: [...document.querySelectorAll("[id], a[name]")].map(e => e.id || e.name),
    neighbours: [...document.querySelectorAll(".md-footer__link")].map(link => link.href),
  }
})()"""

SEARCH = """(async () => {
  const field = document.querySelector("input.md-search__input")
  if (!field) return "there is no search field"
  document.querySelector("label[for=__search]").click()
  field.focus()
  const words = %s
  for (let tenths = 0; tenths < 150; tenths++) {
    field.value = words
    field.dispatchEvent(new KeyboardEvent("keyup", {bubbles: true}))
    await new Promise(resolve => setTimeout(resolve, 100))
    const found = [...document.querySelectorAll(".md-search-result__link")].map(e => e.href)
    if (found.length) return found
  }
  return "it finds nothing"
})()"""


class Browser:
    """Chromium with one page, spoken to in the DevTools protocol over a pipe."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Moved above what they are to become, so that neither overwrites the other.
        inherited = os.dup2(theirs_in, 103), os.dup2(theirs_out, 104)
        for end in (theirs_in, theirs_out):
            os.close(end)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--remote-debugging-pipe", "--force-prefers-reduced-motion", "--hide-scrollbars"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}"]
        command = 'exec 3<&"$0" 4>&"$1"; shift; exec "$@"'  # the descriptors that it speaks over
        self._process = subprocess.Popen(
            ["bash", "-c", command, *map(str, inherited), program, *flags, "about:blank"],
            pass_fds=inherited,
            stderr=subprocess.DEVNULL,
        )
        for end in inherited:
            os.close(end)
        self._in, self._out = ours_in, ours_out
        self._left = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(target for target in targets if target["type"] == "page")
        self._session = self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def close(self) -> None:
        """Ends the browser."""
        self._process.terminate()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        for answer in self._messages():
            if answer.get("id") != self._number:
                self.events.append(answer)
            elif "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']['message']}")
            else:
                return answer["result"]
        raise AssertionError("_messages ends by raising only")

    def open(self, address: str) -> None:
        """Opens a page and waits until everything on it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=address)
        if any(e.get("method") == "Page.loadEventFired" for e in self.events):
            return
        for event in self._messages():
            self.events.append(event)
            if event.get("method") == "Page.loadEventFired":
                return

    def evaluate(self, script: str) -> Any:
        """The value of an expression on the page, awaited."""
        done = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"]))
        return done["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """Makes the screen one of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )

    def screenshot(self, file: Path) -> None:
        """Writes the page, down to its end, as a PNG."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(base64.b64decode(data))

    def faults(self) -> Iterator[str]:
        """What failed to load, was fetched over the network, or was raised by a script."""
        for event in self.events:
            method, given = event.get("method", ""), event.get("params", {})
            if method == "Network.requestWillBeSent":
                address = given["request"]["url"]
                if urlsplit(address).scheme not in {"file", "data", "blob", "about"}:
                    yield f"fetches {address}"
            elif method == "Runtime.exceptionThrown":
                yield f"a script fails: {given['exceptionDetails']['text']}"
            elif method == "Log.entryAdded" and given["entry"]["level"] == "error":
                yield f"{given['entry']['text']} {given['entry'].get('url', '')}"

    def _messages(self) -> Iterator[dict[str, Any]]:
        while True:
            whole, end, rest = self._left.partition(b"\0")
            if end:
                self._left = rest
                yield json.loads(whole)
                continue
            ready, _, _ = select.select([self._in], [], [], TIMEOUT)
            more = os.read(self._in, 1 << 20) if ready else b""
            if not more:
                raise RuntimeError(f"the browser gave no answer in {TIMEOUT:g} s, or ended")
            self._left += more


def pages_of(site: Path) -> list[Path]:
    """The pages that a reader is led to; the page for missing pages has absolute links."""
    return sorted(page for page in site.rglob("*.html") if page.name != "404.html")


def layout_faults(seen: dict[str, Any], width: int) -> Iterator[str]:
    """What does not fit on the screen."""
    if seen["page"] > width:
        yield f"is {seen['page']} pixels wide"
    yield from (f"is clipped: {place}" for place in seen["code"])
    if width > 600:
        yield from (f"is wider than its place: {place}" for place in seen["tables"])
    yield from (f"a picture does not load: {picture}" for picture in seen["pictures"])


def link_faults(site: Path, seen: dict[Path, dict[str, Any]]) -> Iterator[tuple[Path, str]]:
    """Links to files and headings that are not there, and pages without a neighbour."""
    for page, found in seen.items():
        for link in sorted(set(found["links"])):
            address, anchor = urldefrag(link)
            if urlsplit(address).scheme != "file":
                continue
            target = Path(unquote(urlsplit(address).path))
            if not target.is_file() or not target.is_relative_to(site):
                yield page, f"links to {target}, which is not a file of the site"
            elif anchor and target in seen and unquote(anchor) not in seen[target]["anchors"]:
                yield page, f"links to #{unquote(anchor)} of {target.name}, which has no such place"
        if not found["neighbours"]:
            yield page, "has neither a previous nor a next page"
    ends = [page for page, found in seen.items() if len(set(found["neighbours"])) == 1]
    if len(ends) != 2:  # the first and the last page have one each
        yield site, f"{len(ends)} pages have one neighbour, expected the first and the last"


def check(site: Path, browser: Browser, screenshots: Path | None) -> list[str]:
    """All findings, each with its page."""
    found: list[str] = []
    seen: dict[Path, dict[str, Any]] = {}
    for page in pages_of(site):
        for width, height in WIDTHS.items():
            browser.resize(width, height)
            browser.open(page.as_uri())
            seen[page] = browser.evaluate(MEASURE)
            faults = [*layout_faults(seen[page], width), *browser.faults()]
            found += [f"{page.relative_to(site)} at {width} pixels: {fault}" for fault in faults]
            if screenshots is not None:
                name = "-".join(page.relative_to(site).with_suffix("").parts)
                browser.screenshot(screenshots / f"{name}-{width}.png")
    found += [f"{page.relative_to(site)}: {fault}" for page, fault in link_faults(site, seen)]

    for words, target in {"gradscaler": "amp.html", "harmful_loss_drop": "method.html"}.items():
        browser.open((site / "index.html").as_uri())
        result = browser.evaluate(SEARCH % json.dumps(words))
        if isinstance(result, str) or not any(target in address for address in result):
            found.append(f"the search for “{words}”, from disk: {result}, expected {target}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Checks a built site; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("site", type=Path, help="folder of the built site")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of each page")
    args = parser.parse_args(argv)
    program = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if program is None:
        print(
            f"error: there is no browser to check the site in (tried {', '.join(BROWSERS)}); on "
            "Debian: apt-get install chromium",
            file=sys.stderr,
        )
        return 2
    site = args.site.resolve()
    if not (site / "index.html").is_file():
        print(f"error: {site} holds no index.html; run make docs first", file=sys.stderr)
        return 2
    begun = time.monotonic()
    # Chromium's helpers write to the profile for a moment after it has ended.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        try:
            browser = Browser(program, Path(profile))
            try:
                found = check(site, browser, args.screenshots)
            finally:
                browser.close()
        except (OSError, RuntimeError) as error:
            print(f"error: the check could not be made: {error}", file=sys.stderr)
            return 2
    for finding in found:
        print(finding)
    number, seconds = len(pages_of(site)), time.monotonic() - begun
    widths = " and ".join(map(str, WIDTHS))
    print(f"{number} pages at {widths} pixels in {seconds:.0f} s: {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
