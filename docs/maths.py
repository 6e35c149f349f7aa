r"""Typesets the formulas of pages and docstrings as MathML, which browsers draw by themselves.

A formula stands between two `$$` and is written in the small part of LaTeX that is listed here.
Nothing is fetched, neither when the site is built nor when it is read.
"""

from __future__ import annotations

import html
import re
from typing import Any

SYMBOLS = {
    r"\nabla": "<mo>∇</mo>",
    r"\lambda": "<mi>λ</mi>",
    r"\alpha": "<mi>α</mi>",
    r"\varepsilon": "<mi>ε</mi>",
    r"\min": '<mo movablelimits="false">min</mo>',
    r"\cdot": "<mo>·</mo>",
    r"\,": '<mspace width="0.2em"/>',
    r"\;": '<mspace width="0.3em"/>',
    r"\qquad": '<mspace width="2em"/>',
    r"\lVert": '<mo form="prefix" stretchy="false">‖</mo>',
    r"\rVert": '<mo form="postfix" stretchy="false">‖</mo>',
    "'": "<mo>′</mo>",
    "-": "<mo>−</mo>",
}
SIZES = {r"\bigl": 1.2, r"\bigr": 1.2, r"\Bigl": 1.8, r"\Bigr": 1.8}  # em
TOKEN = re.compile(r"\\[A-Za-z]+|\\[,;]|\d+|\S")


def mathml(latex: str) -> str:
    r"""One displayed formula as MathML.

    Args:
        latex: Source, of the commands in `SYMBOLS` and `SIZES`, `\tfrac` and `_`.

    Raises:
        ValueError: There is another command, or a brace is missing.
    """
    tokens = TOKEN.findall(latex)
    tokens.reverse()
    return f'<math display="block">{_row(tokens, last="")}</math>'


def _row(tokens: list[str], last: str) -> str:
    parts: list[str] = []
    while tokens and tokens[-1] != last:
        atom = _atom(tokens)
        if tokens and tokens[-1] == "_":
            tokens.pop()
            atom = f"<msub>{atom}{_atom(tokens)}</msub>"
        parts.append(atom)
    if last and not tokens:
        raise ValueError(f"a {last} is missing")
    if last:
        tokens.pop()
    return f"<mrow>{''.join(parts)}</mrow>"


def _atom(tokens: list[str]) -> str:
    token = tokens.pop()
    if token == "{":
        return _row(tokens, last="}")
    if token == r"\tfrac":
        return f"<mfrac>{_atom(tokens)}{_atom(tokens)}</mfrac>"
    if token in SIZES:
        size = f"{SIZES[token]}em"
        return f'<mo minsize="{size}" maxsize="{size}">{tokens.pop()}</mo>'
    if token in SYMBOLS:
        return SYMBOLS[token]
    if token.startswith("\\"):
        raise ValueError(f"{token} is not among the commands of docs/maths.py")
    if token in "()[]":
        return f'<mo stretchy="false">{token}</mo>'
    if token.isalpha():
        return f"<mi>{token}</mi>"
    return f"<mn>{token}</mn>" if token.isdigit() else f"<mo>{html.escape(token)}</mo>"


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with the HTML of each page."""
    return re.sub(
        r'<div class="arithmatex">\\\[(.*?)\\\]</div>',
        lambda match: mathml(html.unescape(match[1])),
        content,
        flags=re.DOTALL,
    )
