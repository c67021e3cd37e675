"""The parts that several sections use: a titled section, a table that scrolls, a search box, a command to copy."""

from __future__ import annotations

from lowbit.report.markup import Html, tag


def section(identity: str, title: str, *content: str | None) -> Html:
    heading = tag("h2", title, id=f"{identity}-title")
    return tag("section", heading, *content, id=identity, aria_labelledby=f"{identity}-title")


def command_line(command: str) -> Html:
    copy = tag("button", "Copy", type="button", class_="copy scripted")
    return tag("div", tag("pre", tag("code", command), tabindex="0"), copy, class_="command")


def search_box(identity: str) -> Html:
    """A search box; all of them on the page share one text. Hidden until report.js is there to serve it."""
    box = tag(
        "input",
        id=identity,
        class_="find",
        type="search",
        placeholder="layers.3.mlp.down_proj",
        autocomplete="off",
        spellcheck="false",
    )
    label = tag("label", "Find tensor", for_=identity)
    return tag("div", label, box, tag("output", class_="found", for_=identity), class_="toolbar scripted")


def column_heads(*labels: str) -> Html:
    return tag("thead", tag("tr", *(tag("th", label, scope="col") for label in labels)))


def number_cell(text: str, value: float | None = None) -> Html:
    """A right-aligned cell; `value` is what it sorts by where its text is not the number."""
    return tag("td", text, class_="n", data_v=None if value is None else f"{value:g}")


def scrolling(table: Html, label: str, kind: str | None = None) -> Html:
    """Wide tables scroll in their own box, by keyboard too, so that the page never scrolls sideways."""
    return tag(
        "div", table, class_=f"scroll {kind}" if kind else "scroll", tabindex="0", role="region", aria_label=label
    )
