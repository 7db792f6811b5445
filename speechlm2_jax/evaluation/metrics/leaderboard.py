"""The English text normaliser of the Open ASR Leaderboard, so that scores compare with its own.

It is Whisper's English normaliser with changes: rules, not sentences. Source of the rules: the
repository huggingface/open_asr_leaderboard, `normalizer/` at commit d1e99b2 (Apache-2.0).
"""

import re
from itertools import groupby

from whisper_normalizer.basic import remove_symbols_and_diacritics
from whisper_normalizer.english import EnglishTextNormalizer

FILLERS = "hmm mm mhm mmm uh um ah aha ahh ahm eh ehehe em hm huh hum mhum uhm umm uhuh".split()
"""Words that count for nothing."""
KEPT = ("kinda", "sorta", "dunno", "cause")
"""Words that Whisper's normaliser writes out and the leaderboard's leaves."""
OF_IS = "it he she what that who here there how when where why this".split()
"""After these words 's means "is"; after others it is a possessive, and stays an s."""
JOINED = {
    "et cetera": "etc",
    "al right": "alright",
    "all right": "alright",
    "how ever": "however",
    "wi fi": "wifi",
    "hi fi": "hifi",
    "lo fi": "lofi",
    "sci fi": "scifi",
    "e mail": "email",
    "e book": "ebook",
    "e commerce": "ecommerce",
    "x ray": "xray",
    "t shirt": "tshirt",
    "a m": "am",
    "p m": "pm",
    "o k": "okay",
}
"""Compounds that are written as one word."""
SPELLINGS = {
    "ok": "okay",
    "kay": "okay",
    "etcetera": "etc",
    "archaeology": "archeology",
    "archaeological": "archeological",
    "cancellation": "cancelation",
    "cancellations": "cancelations",
    "flyer": "flier",
    "mm": "hmm",
    "pummelled": "pummeled",
    "pummelling": "pummeling",
    "snowploughs": "snowplows",
    "travelogue": "travelog",
    "travelogues": "travelogs",
}
"""Spellings that differ from Whisper's table."""
_NAMES = """
aaron: aron
alfonso: alphonso
alison: allison alyson
allen: alan allan
anne: ann
anthony: antony
arthur: artur
brett: bret
brian: bryan
bridget: bridgette
caitlin: kaitlin kaitlyn katelyn
carl: karl
carol: carole carrol carroll
catherine: catharine katherine kathryn
cathy: kathy
charlie: charley charly
chris: kris
christina: kristina
christopher: cristopher kristopher
colin: collin
deborah: devorah
dennis: denis
dominic: dominick
douglas: douglass
dylan: dillon
eric: erick erik
fatima: fatimah
frederick: frederik fredrick
gail: gayle
gary: garry
greg: gregg
henry: henri
ivonne: yvonne
jackie: jacky
jamie: jaime
jason: jayson
jeff: geoff
jeffrey: geoffrey jeffery
joanne: joane joann
john: jon
jonathan: johnathan jonathon
joseph: josef
karen: caren caryn karin
kelly: kelley kelli kellye
kevin: kevan
kristin: kristen
laurie: lori
lawrence: laurence
lee: leigh
leslie: lesley
lily: lilly
linda: lynda
lindsay: lindsey linsey
louis: lewis
lucas: lukas
lynn: lynne
mark: marc
martin: martyn
matthew: mathew
mcarthur: macarthur
mccarthy: macarthy maccarthy
mccartney: macartney
mcdonald: macdonald
mcgowan: macgowan
mcintosh: macintosh
mcintyre: macintyre
mckay: mackay
mckenzie: mackenzie
mclean: maclean
mcleod: macleod
mcmillan: macmillan
mcnamara: macnamara
megan: meghan
michael: micheal
michelle: michele
miriam: myriam
mohammed: mahomet mohamad mohamed mohammad mouhamad mouhamed muhamad muhammad muhammed
molly: mollie
natalie: nathalie
neil: neal
nicholas: nicolas
nicole: nikole
patrick: patrik
peter: pieter
philip: phillip
rachel: rachael
rajiv: rajeev
rebecca: rebekah
rob: robb
robin: robyn
roger: rodger
ronda: rhonda
russell: russel
sally: sallie
sarah: sara
sean: shaun shawn
shane: shayne
sherry: cheri sheri sherrie
simon: symon
stacy: stacey stacie
steven: stephen
stuart: stewart
susanne: suzanne
teresa: theresa
terry: terri
thomas: tomas
toby: tobey
tony: toni
tracy: tracey tracie
veronica: veronika
victor: viktor
victoria: viktoria
walter: walther
yousef: yusef yusuf
zach: zak
zachary: zachery zackary
"""
NAMES = {
    variant: name
    for name, variants in (line.split(": ") for line in _NAMES.strip().splitlines())
    for variant in variants.split()
}
"""Variants of first names and surnames -> the one that is written."""
ALONE_WORDS = ("a", "i")
"""Letters that are words too: two letters are not joined if one of them is such."""


class LeaderboardNormalizer:
    """Writes an English text as the Open ASR Leaderboard does before it counts errors."""

    def __init__(self) -> None:
        whisper = EnglishTextNormalizer()
        self._numbers = whisper.standardize_numbers
        own = SPELLINGS.keys() | SPELLINGS.values()
        spellings = whisper.standardize_spellings.mapping
        self._spellings = {k: v for k, v in spellings.items() if k not in own} | SPELLINGS
        self._fillers = re.compile(rf"\b({'|'.join(FILLERS)})\b")
        is_form = rf"\b({'|'.join(OF_IS)})'s\b"
        self._replaced = [
            (re.compile(is_form), r"\1 is") if pattern == r"'s\b" else (re.compile(pattern), text)
            for pattern, text in whisper.replacers.items()
            if pattern not in {rf"\b{word}\b" for word in KEPT}
        ]
        self._joined = [
            (re.compile(r"\b" + words.replace(" ", r"\s+") + r"\b"), word)
            for words, word in JOINED.items()
        ]

    def __call__(self, text: str) -> str:
        """The normalised text: lower case, words apart by one space each."""
        text = text.lower()
        text = re.sub(r"[<\[][^>\]]*[>\]]", "", text)  # notes in brackets
        text = re.sub(r"\(([^)]+?)\)", "", text)  # and in parentheses
        text = self._fillers.sub("", text)
        text = re.sub(r"\s+'", "'", text)
        for pattern, replacement in self._replaced:
            text = pattern.sub(replacement, text)
        text = re.sub(r"(\d),(\d)", r"\1\2", text)
        text = re.sub(r"\.([^0-9]|$)", r" \1", text)  # points that belong to no number
        text = remove_symbols_and_diacritics(text, keep=".%$¢€£")
        for pattern, word in self._joined:
            text = pattern.sub(word, text)
        words = self._numbers(text).split()
        words = [self._spellings.get(word, word) for word in words]
        text = " ".join(_join_letters([NAMES.get(word, word) for word in words]))
        text = re.sub(r"[.$¢€£]([^0-9])", r" \1", text)  # symbols without their number
        text = re.sub(r"([^0-9])%", r"\1 ", text)
        return " ".join(text.split())


def _join_letters(words: list[str]) -> list[str]:
    """Joins letters and digits that stand alone side by side (`u s a`, `5 g`) to one word each."""
    joined: list[str] = []
    for is_run, group in groupby(words, lambda word: len(word) == 1 and word.isalnum()):
        run = list(group)
        enough = 3 if any(word in ALONE_WORDS for word in run) else 2
        joined += ["".join(run)] if is_run and len(run) >= enough else run
    return joined
