"""Typesets the formulas of pages and docstrings as MathML, which browsers draw by themselves.

A formula stands between two `$$`. Nothing is fetched, neither when the site is built nor when it is
read.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert


def mathml(latex: str) -> str:
    """One displayed formula."""
    formula = convert(latex, display="block")
    # A prime stands high in its own right; as a superscript it is too small to be seen.
    return re.sub(r"<msup>(<mi>\w</mi>)<mi>(&#x02032;)</mi></msup>", r"\1<mo>\2</mo>", formula)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with the HTML of each page."""
    return re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda match: mathml(html.unescape(match[1])),
        content,
        flags=re.DOTALL,
    )
