"""The check of the built site: what it finds, and what it says where it cannot look."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"

PAGE = """<!doctype html><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<body style="margin: 0"><div class="md-content"><article>{}</article></div>
<a class="md-footer__link" href="{}">on</a>"""


@pytest.fixture(scope="module")
def check_site() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_site", DOCS / "check_site.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finds_what_does_not_fit_and_what_is_missing(
    check_site: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not any(map(shutil.which, check_site.BROWSERS)):
        pytest.skip("there is no browser")
    line = "x" * 100
    body = f"""<pre style="overflow: auto"><code>{line}</code></pre>
        <img src="gone.png"><a href="gone.html"></a><a href="other.html#gone"></a>
        <a href="other.html#here"></a><div style="width: 500px">wide</div>"""
    (tmp_path / "index.html").write_text(PAGE.format(body, "other.html"))
    (tmp_path / "other.html").write_text(PAGE.format('<p id="here"></p>', "index.html"))
    assert check_site.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    for finding in (
        "index.html at 390 pixels: is 50",  # 500 or, zoomed out, 501 pixels wide
        "index.html at 390 pixels: is clipped: pre “xxx",
        "index.html at 1280 pixels: a picture does not load: file://",
        "gone.html, which is not a file of the site",
        "links to #gone of other.html",
        "the search for “gradscaler”, from disk: there is no search field",
    ):
        assert finding in printed
    assert "#here" not in printed
    assert "1280 pixels: is clipped" not in printed


@pytest.mark.parametrize(
    ("browsers", "message"),
    [((), "there is no browser to check the site in"), (("true",), "run make docs first")],
)
def test_says_why_it_cannot_look(
    browsers: tuple[str, ...],
    message: str,
    check_site: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(check_site, "BROWSERS", browsers)
    assert check_site.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
