"""HTML and SVG from Python: what is not markup already is escaped."""

from html import escape

VOID = frozenset({"meta", "rect", "line"})
"""Elements that may have no content; rect and line have it for their <title>."""


class Markup(str):
    """Text that is HTML as it stands."""


def tag(name: str, *content: str, **attributes: str | float | None) -> Markup:
    """An element; plain str in `content` is escaped, as are the values of attributes.

    A trailing _ of an attribute's name is dropped (class_), other _ become - (aria_label);
    attributes that are None are left out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = join(*content)
    if name in VOID and not inner:
        return Markup(f"<{name}{given}/>")
    return Markup(f"<{name}{given}>{inner}</{name}>")


def join(*content: str) -> Markup:
    """The pieces one after the other, escaped where they are not markup."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in content))


def _short(value: str | float) -> str:
    """Two decimals are enough for coordinates."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
