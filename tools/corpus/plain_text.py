"""Prose as the bundled models write it: lower-case words of a to z and the apostrophe."""

import re
import unicodedata

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
ABBREVIATIONS = {
    "Mr.": "mister",
    "Mrs.": "missus",
    "Dr.": "doctor",
    "St.": "saint",
    "Rev.": "reverend",
    "Hon.": "honorable",
    "Capt.": "captain",
    "Col.": "colonel",
    "Gen.": "general",
    "Lt.": "lieutenant",
    "Sgt.": "sergeant",
    "Jr.": "junior",
    "Esq.": "esquire",
    "Ltd.": "limited",
    "etc.": "et cetera",
    "&": " and ",
    "%": " percent",
}
"""Those of LJ Speech that mean one thing only."""
YEARS = range(1100, 2000)
_ABBREVIATION = re.compile(
    "|".join((r"\b" if short[0].isalpha() else "") + re.escape(short) for short in ABBREVIATIONS)
)
_NUMBER = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+|\d+)(?:\.(\d+))?(st|nd|rd|th)?(?![\w])")
_PUNCTUATION = re.compile(r"[\s.,;:!?\"()\[\]\-\u2010-\u2015\u201c\u201d/]+")


def spell_number(number: int) -> str:
    """A whole number from 0 to 999,999,999,999 in words, without "and"."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f" {ONES[ones]}" if ones else "")
    size, name = next(scale for scale in SCALES if number >= scale[0])
    count, rest = divmod(number, size)
    return f"{spell_number(count)} {name}" + (f" {spell_number(rest)}" if rest else "")


def spell_year(year: int) -> str:
    """A year in pairs: 1865 is "eighteen sixty five", 1805 "eighteen oh five"."""
    century, rest = divmod(year, 100)
    if rest == 0:
        return f"{spell_number(century)} hundred"
    return f"{spell_number(century)} {'oh ' if rest < 10 else ''}{spell_number(rest)}"


def spell_ordinal(number: int) -> str:
    """The place of a number: 21 is "twenty first"."""
    *words, last = spell_number(number).split()
    if last not in ORDINALS:
        last = last.removesuffix("y") + ("ieth" if last.endswith("y") else "th")
    return " ".join([*words, ORDINALS.get(last, last)])


def plain_text(text: str) -> str:
    """A text in lower case, numbers and abbreviations spelt out, without accents and punctuation.

    Four digits from 1100 to 1999 are read as a year. Raises ValueError for what has a sign that
    nobody knows how to read, such as a currency.
    """
    text = unicodedata.normalize("NFKD", text.replace("\u2019", "'"))
    text = "".join(char for char in text if not unicodedata.combining(char))
    text = _ABBREVIATION.sub(lambda match: f"{ABBREVIATIONS[match[0]]} ", text)
    text = _PUNCTUATION.sub(" ", _NUMBER.sub(_spell_match, text)).lower()
    words = [word.strip("'") for word in text.split()]
    unread = sorted(set("".join(words)) - set("abcdefghijklmnopqrstuvwxyz'"))
    if unread:
        raise ValueError(f"signs that are not read: {' '.join(unread)}")
    return " ".join(word for word in words if word)


def _spell_match(match: re.Match[str]) -> str:
    """A number of a text in words."""
    digits, decimals, ending = match.groups()
    number = int(digits.replace(",", ""))
    if number >= 10**12:
        return match[0]
    if ending:
        return spell_ordinal(number)
    if decimals:
        return f"{spell_number(number)} point {' '.join(ONES[int(d)] for d in decimals)}"
    is_year = len(digits) == 4 and number in YEARS
    return spell_year(number) if is_year else spell_number(number)
