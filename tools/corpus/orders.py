"""Written coffee orders: the slots that they name, and other orders of the same form."""

import re

import numpy as np

AMOUNTS = ("a little bit of", "a bit of", "a lot of", "lots of", "some")
MILKS = ("almond milk", "skim milk", "soy milk", "whole milk", "milk", "cream")
SUGARS = ("brown sugar", "sugar", "sweetener")
PLAIN_SHARE = 0.45
"""How often a varied milk or sugar has no amount."""
SLOTS = {  # alphabetical; longer values first, as the first that fits is taken
    "coffeeDrink": (
        *("iced coffee", "drip coffee", "house coffee", "iced mocha"),
        *("coffee", "mocha", "espresso", "americano", "cappuccino", "latte"),
    ),
    "milkAmount": (*(f"{a} {m}" for a in AMOUNTS for m in MILKS), *MILKS),
    "numberOfShots": ("single shot", "double shot", "triple shot"),
    "roast": ("light roast", "medium roast", "dark roast"),
    "size": (
        *("eight ounce", "twelve ounce", "sixteen ounce", "twenty ounce"),
        *("small", "medium(?! roast)", "large"),
    ),
    "sugarAmount": (*(f"{a} {s}" for a in AMOUNTS for s in SUGARS), *SUGARS),
}
FRAME = re.compile(r"(brew|can I get|can I have|may I have|I want|(get|give|make) me|I'd like)")
PHRASES = re.compile("|".join(rf"(?P<{k}>\b(?:{'|'.join(v)})\b)" for k, v in SLOTS.items()))
INTENT = "orderDrink"


def parse_order(sentence: str) -> dict[str, str]:
    """Returns the intent and the slots that an order names, keys sorted.

    Raises ValueError if it names no slot or one twice, or has words that belong to no slot.
    """
    found = [(match.lastgroup or "", match[0]) for match in PHRASES.finditer(sentence)]
    slots = {**dict(found), "intent": INTENT}
    rest = FRAME.sub("", PHRASES.sub("", sentence), count=1)
    if not found or len(slots) <= len(found) or set(rest.split()) - {"a", "with", "and"}:
        raise ValueError(f"no order: {sentence!r}; each slot once, and no other words")
    return dict(sorted(slots.items()))


def vary_order(sentence: str, rng: np.random.Generator) -> str:
    """Replaces the value of every slot of an order by one drawn at random."""
    return PHRASES.sub(lambda match: _draw(match.lastgroup or "", rng), sentence)


def _draw(slot: str, rng: np.random.Generator) -> str:
    values = SLOTS[slot]
    kinds = {"milkAmount": MILKS, "sugarAmount": SUGARS}
    if slot in kinds and rng.random() < PLAIN_SHARE:
        values = kinds[slot]
    return str(rng.choice(values)).removesuffix("(?! roast)")
