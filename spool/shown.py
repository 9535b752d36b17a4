r"""How a text from the network is shown in a view, in SQL: so that no terminal obeys it.

A terminal in UTF-8 mode takes U+0080 to U+009F for controls (C1: U+009B is what ESC [ is), and one
in 8-bit mode takes each byte from 80 to 9F for one, wherever it stands: "Û" is C3 9B. SQLite checks
no encoding, and its functions read a text that is no UTF-8 in a way of their own (C2 9B 80 is one
harmless character to GLOB). So:

- Printable ASCII is shown as it is, with tab, line feed and carriage return as \t, \n, \r.
- A character whose bytes include one from 80 to 9F is shown as JSON would escape it, \uXXXX; a
  payload stays the JSON that it was. That includes every control of direction.
- Anything else is shown as it is, if all of it is UTF-8.
- What is no UTF-8, has another control character, or is long and not ASCII, is shown in hex: X'…'.

Whether a character is UTF-8 is told by writing it again: only then has char(unicode(c)) the bytes
of c. An overlong, truncated or too long sequence, a surrogate, and a byte that stands alone differ.
"""

import re

WALKED_MAX_BYTES = 16_384
WALKED_MAX_EXTRA_BYTES = 1_024
"""A text that is not all ASCII is gone through from one such character to the next, where it is not
longer than the first, and where they have not more bytes behind their first ones than the second:
a flood of garbage must not keep a person waiting."""

_SHOWN = r"""CASE
        -- Most texts, and cheap. (length() of a text ends at a NUL, so that the two differ.)
        WHEN typeof(<column>) = 'text' AND length(<column>) = length(CAST(<column> AS BLOB))
            AND <column> NOT GLOB '*[^ -~]*'
        THEN <column>
        WHEN instr(CAST(<column> AS BLOB), x'00') THEN quote(CAST(<column> AS BLOB))
        -- As many characters as bytes, and none of these: printable ASCII. A byte of a sequence
        -- that stands alone counts as one character, and is among these.
        WHEN length(CAST(CAST(<column> AS BLOB) AS TEXT)) = length(CAST(<column> AS BLOB))
            AND NOT <lines> GLOB
            '*[' || char(1) || '-' || char(31) || char(127) || '-' || char(191, 65533) || ']*'
        THEN <lines>
        WHEN length(CAST(<column> AS BLOB)) > <bytes>
            OR length(CAST(<column> AS BLOB))
                - length(CAST(CAST(<column> AS BLOB) AS TEXT)) > <extra>
        THEN quote(CAST(<column> AS BLOB))
        ELSE coalesce((
            -- rest begins with what is not printable ASCII, or is empty
            WITH RECURSIVE walk (rest, text) AS (
                SELECT ltrim(<lines>, <ascii>),
                    substr(<lines>, 1, length(<lines>) - length(ltrim(<lines>, <ascii>)))
                UNION ALL
                SELECT ltrim(substr(rest, 2), <ascii>), text || CASE
                    WHEN substr(hex(substr(rest, 1, 1)), 3, 1) NOT IN ('8', '9')
                        AND substr(hex(substr(rest, 1, 1)), 5, 1) NOT IN ('8', '9')
                        AND substr(hex(substr(rest, 1, 1)), 7, 1) NOT IN ('8', '9')
                    THEN substr(rest, 1, 1)
                    WHEN unicode(rest) < 65536 THEN printf('\u%04x', unicode(rest))
                    ELSE printf('\u%04x', 55232 + unicode(rest) / 1024)
                        || printf('\u%04x', 56320 + unicode(rest) % 1024)
                END || substr(rest, 2, length(rest) - 1 - length(ltrim(substr(rest, 2), <ascii>)))
                FROM walk
                WHERE unicode(rest) >= 160
                    AND CAST(char(unicode(rest)) AS BLOB) = CAST(substr(rest, 1, 1) AS BLOB)
            )
            SELECT text FROM walk WHERE rest = ''
        ), quote(CAST(<column> AS BLOB)))
    END"""

_LINES = (
    r"replace(replace(replace(CAST(CAST(<column> AS BLOB) AS TEXT), char(9), '\t'), "
    r"char(10), '\n'), char(13), '\r')"
)

_ASCII = "'" + "".join(sorted(map(chr, range(32, 127)), key=str.isupper)).replace("'", "''") + "'"

_PLACE = re.compile(r"shown\(([a-z_.]+)\)")


def with_shown_texts(script: str) -> str:
    """Return the SQL ``script`` with each ``shown(column)`` spelled out.

    SQL has no functions of its own in SQLite, and one of ours would be missing in the shell.
    """
    parts = {
        "<lines>": _LINES,
        "<ascii>": _ASCII,
        "<bytes>": str(WALKED_MAX_BYTES),
        "<extra>": str(WALKED_MAX_EXTRA_BYTES),
    }
    shown = _SHOWN
    for name, part in parts.items():
        shown = shown.replace(name, part)
    return _PLACE.sub(lambda place: shown.replace("<column>", place[1]), script)
