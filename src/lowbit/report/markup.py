"""HTML that is escaped by construction: text is `str` and gets escaped, markup is `Html` and does not.

Everything in a report is somebody else's text, tensor names included. There is one way from it into the page, through
`tag` or `escape`; characters that do not print (control characters, text-direction overrides, lone surrogates) are
shown as their escape, so that a name looks like what it is.
"""

from __future__ import annotations

from html import escape as escape_html

EMPTY = frozenset({"input", "use", "line", "path", "polyline"})  # void in HTML, or childless in SVG
# str.isprintable() is false for every space but the ASCII one; these two are the page's own, between number and unit.
SPACES = frozenset("\u00a0\u202f")


class Html(str):
    """Markup, already escaped."""

    __slots__ = ()


def escape(text: str) -> Html:
    """Text for an element or a quoted attribute."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() or c in SPACES else f"\\u{ord(c):04x}" for c in text)
    return Html(escape_html(text))


def tag(element: str, *children: str | None, **attributes: str | int | bool | None) -> Html:
    """`<element attributes>children</element>`.

    children    Html as it is, str escaped, None left out
    attributes  `class_` is class and `data_tensor` is data-tensor; None and False are left out, True is bare
    """
    written = "".join(_attribute(name, value) for name, value in attributes.items())
    if element in EMPTY:
        return Html(f"<{element}{written}/>")
    return Html(f"<{element}{written}>{join(*children)}</{element}>")


def join(*children: str | None) -> Html:
    """The children one after the other: Html as it is, str escaped, None left out."""
    return Html("".join(c if isinstance(c, Html) else escape(c) for c in children if c is not None))


def breakable(name: str) -> Html:
    """A dotted name that may wrap after its dots; the text stays the same."""
    return Html(escape(name).replace(".", ".<wbr/>"))


def _attribute(name: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{value if isinstance(value, Html) else escape(str(value))}"'
