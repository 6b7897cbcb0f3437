"""Words of a text in any script, for comparing texts: case, width and punctuation do not count, numbers do."""

import re
import unicodedata

UNSPACED = "぀-ヿ㐀-䶿一-鿿豈-﫿\U00020000-\U0003ffff"
NUMBER = r"\d+(?:[.,]\d+)*"
LETTERS = {True: "[a-z]+", False: rf"[{UNSPACED}]|[^\W\d_{UNSPACED}]+"}
SIGN = r"|[-+*/×÷^=<>−](?=\s*\d)"
# For ASCII text the simpler pattern gives the same words in two thirds of the time.
PATTERNS = {
    (ascii_only, operators): re.compile(f"{letters}|{NUMBER}{SIGN if operators else ''}")
    for ascii_only, letters in LETTERS.items()
    for operators in (False, True)
}


def normalised(text: str) -> str:
    """The text with compatibility forms unified (full-width digits, ligatures) and case folded."""
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def words(text: str, *, operators: bool = False) -> list[str]:
    """Words of a text: runs of letters, numbers (with their decimals), and single Chinese or Japanese characters.

    Args:
        text: any Unicode text; case, width and punctuation are dropped.
        operators: an arithmetic sign before a number counts as a word too, so that 3+4 and 3*4 differ.
    Returns:
        The words in order; for a text of punctuation alone its parts between blanks; [] for a blank text.
    """
    matches = PATTERNS[text.isascii(), operators].findall(normalised(text))
    return matches or text.split()
