"""One rule for lines of text, and for text of others on a terminal or in a log.

A line ends where `str.splitlines` and Unicode say so: at \\n, \\r, \\r\\n, vertical tab, form feed, the separators 1C
to 1E, NEL, U+2028 and U+2029. A reader that knew fewer ends would see text inside a line where another one, a model or
a terminal, sees a new line.
"""

import re
import unicodedata

# For use inside a character class of a regular expression.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
# The start and the end of a line, as patterns: `^` and `$` of `re.MULTILINE` know \n alone.
LINE_START = rf"(?:(?<![^{LINE_ENDS}]))"
LINE_END = rf"(?![^{LINE_ENDS}])"
# Other, Cc: controls; Cf: marks without a width, such as those that turn the direction; Cs: halves of a pair.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends; one for a text without any, also for ""."""
    return re.split(rf"\r\n|[{LINE_ENDS}]", text)


def one_line(text: str) -> str:
    """The text on one line: every run of white space becomes one blank."""
    return " ".join(text.split())


def printable(text: str, *, keep: str = "") -> str:
    """The text as a terminal or a log may show it: characters that control, reorder or hide text are escaped.

    Escapes are those of Python (`\\x1b`, `\\u202e`). A zero-width joiner, which emoji and several scripts need, stays.

    Args:
        keep: characters that stay, such as "\\n\\t" where several lines are meant.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(character, keep) for character in text)


def _escaped(character: str, keep: str) -> str:
    if character in keep or character in "\u200c\u200d" or unicodedata.category(character) not in _HIDDEN:
        return character
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
