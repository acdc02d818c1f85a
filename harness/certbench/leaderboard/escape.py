"""Text of strangers, made inert for the place it is shown in: Markdown, LaTeX, CSV or a terminal.

Names, sources and settings come from recipes, plugins and submitters, so anybody may have written them. HTML is escaped
by the template engine.
"""

from __future__ import annotations

import re

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "±": r"\ensuremath{\pm}",
    "Δ": r"\ensuremath{\Delta}",
    "∞": r"\ensuremath{\infty}",
    "–": "--",
    "≥": r"\ensuremath{\geq}",
    "≤": r"\ensuremath{\leq}",
}


def printable(text: str) -> str:
    """The text on one line, without control or invisible characters."""
    return "".join(c if c.isprintable() else " " for c in text)


def markdown(text: str) -> str:
    """The text on one line, with nothing in it that Markdown, a table or HTML would act on."""
    line = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", line)


def latex(text: str) -> str:
    """The text on one line, every character that LaTeX would act on spelled as a command that prints it."""
    return "".join(_LATEX.get(c, c) for c in printable(text))


def csv_cell(value: str | float | None) -> str:
    """One cell; text that a spreadsheet would take for a formula gets a leading apostrophe."""
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value)
    text = "".join(c if c.isprintable() or c == "\t" else " " for c in value)
    if text[:1] == "\t" or (text.lstrip()[:1] in tuple("=+-@") and not _NUMBER.fullmatch(text)):
        return f"'{text}"
    return text
