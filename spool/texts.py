"""Texts that people read in a terminal."""


def shown(text: str) -> str:
    """Return ``text`` with everything escaped that a terminal might act on."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )
