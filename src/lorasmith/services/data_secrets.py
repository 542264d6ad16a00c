"""Keys, tokens and personal data in a text, by pattern and, where there is one, by check digits.

A finding shows what kind it is and where, never the secret itself. Quantifiers are bounded, so that a text costs time in
proportion to its length.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import AnyStr, NamedTuple

# What is left of a text without its most frequent characters, a tenth of it: what is not there is not in the text.
KEPT = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_-:/='\"fghkxz"
DROPPED = bytes(byte for byte in range(256) if byte not in KEPT)
LONGEST_BEFORE = 32  # characters


def skeleton(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass").translate(None, DROPPED)


class Secret(NamedTuple):
    """Of a text with such a secret one of `traces` is in the skeleton, and one of `markers` in the text itself.

    `before` is what stands in front of `pattern`, where that begins with a character and so is found far sooner.
    """

    kind: str
    traces: frozenset[bytes]
    markers: tuple[str, ...]
    pattern: re.Pattern[str]
    before: re.Pattern[str] | None = None

    def search(self, text: str) -> re.Match[str] | None:
        if self.before is None:
            return self.pattern.search(text)
        for match in self.pattern.finditer(text):
            begin = match.start()
            if found := self.before.search(text, max(0, begin - LONGEST_BEFORE), begin):
                return found
        return None


def holds_one(text: AnyStr, ones: Iterable[AnyStr]) -> bool:
    for one in ones:  # noqa: SIM110 - `any` of a generator takes three times as long
        if one in text:
            return True
    return False


SECRETS = [
    *(
        Secret(kind, frozenset(map(skeleton, markers)), markers, re.compile(pattern))
        for kind, markers, pattern in (
            ("a private key", ("PRIVATE KEY",), r"-----BEGIN (?:[A-Z]{2,10} ){0,2}PRIVATE KEY"),
            ("an AWS access key", ("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
            (
                "a GitHub token",
                ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
                r"\bgh[pousr]_[A-Za-z0-9]{36,255}\b|\bgithub_pat_[A-Za-z0-9_]{40,255}",
            ),
            ("an Anthropic key", ("sk-ant-",), r"\bsk-ant-[A-Za-z0-9_-]{20,200}"),
            ("an OpenAI key", ("sk-",), r"\bsk-(?:proj-|svcacct-)?(?=[A-Za-z_-]{0,199}\d)[A-Za-z0-9_-]{32,200}"),
            ("a Hugging Face token", ("hf_",), r"\bhf_[A-Za-z0-9]{30,60}\b"),
            ("a Google API key", ("AIza",), r"\bAIza[0-9A-Za-z_-]{35}"),
            ("a Slack token", ("xox",), r"\bxox[abeoprs]-[0-9A-Za-z-]{10,200}"),
            ("a Stripe key", ("_live_",), r"\b[rs]k_live_[0-9A-Za-z]{16,200}"),
            ("a GitLab token", ("glpat-",), r"\bglpat-[0-9A-Za-z_-]{20,60}"),
            (
                "a JSON web token",
                ("eyJ",),
                r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,2000}",
            ),
        )
    ),
    Secret(
        "a password",
        frozenset(map(skeleton, (":'", ':"', "='", '="'))),
        ("assw", "ASSW", "api", "API", "Api", "ecret", "ECRET"),
        re.compile(r"[:=](?=\s{0,3}[\"'][^\s\"']{8,100}[\"'])"),
        re.compile(r"(?i:\b(?:password|passwd|api_?key|secret_?key)\b)[\"']?\s{0,3}\Z"),
    ),
    Secret(
        "a password in an address",
        frozenset({b"://"}),
        ("://",),
        re.compile(r"://[^\s/:@]{1,60}:[^\s/:@]{3,60}@[\w.-]{3,100}"),
        re.compile(r"(?<![a-z0-9+.-])[a-z][a-z0-9+.-]{1,20}\Z"),
    ),
]

AT_DOMAIN = r"@(?:[A-Za-z0-9-]{1,63}\.){1,5}[A-Za-z]{2,24}\b"
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}" + AT_DOMAIN)
EMAIL_END = re.compile(AT_DOMAIN)  # begins with a character, so that a search of it is a hundred times as fast
EXAMPLE_DOMAIN = re.compile(r"@(?:[\w-]{1,63}\.){0,3}(?:example\.(?:com|org|net)|example|test|invalid|localhost)$")
CARD = re.compile(r"(?<![\w.-])[2-6](?:[ -]?\d){12,18}(?![\w-])")  # first digits in use, ISO/IEC 7812
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"  # +49 30 1234567
    r"|\(\d{3}\)[ ]?\d{3}-\d{4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"  # (555) 010-9999
)
US_SOCIAL = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
MANY_DIGITS = re.compile(r"\d(?:[ .()-]{0,2}\d){8}")  # all of the above have nine in a row
MANY_ASCII_DIGITS = re.compile(rb"[0-9](?:[ .()-]{0,2}[0-9]){8}")
LOWER_CASE = b"abcdefghijklmnopqrstuvwxyz"
PHONE_DIGITS = range(9, 16)  # E.164 allows 15


def find_secrets(text: str) -> str | None:
    """`a GitHub token at character 12`, or None."""
    bones = skeleton(text)
    for secret in SECRETS:
        if holds_one(bones, secret.traces) and holds_one(text, secret.markers) and (match := secret.search(text)):
            return f"{secret.kind} at character {match.start() + 1}"
    return None


def find_personal_data(text: str) -> str | None:
    """`an e-mail address at character 3`, or None. Addresses below example domains are not personal."""
    if EMAIL_END.search(text):
        for match in EMAIL.finditer(text):
            if not EXAMPLE_DOMAIN.search(match[0].lower()):
                return f"an e-mail address at character {match.start() + 1}"
    if not has_many_digits(text):
        return None
    for match in CARD.finditer(text):
        if card_groups(match[0]) and luhn_holds(digits_of(match[0])):
            return f"a payment card number at character {match.start() + 1}"
    for match in IBAN.finditer(text):
        if iban_holds(match[0].replace(" ", "")):
            return f"an IBAN at character {match.start() + 1}"
    for match in US_SOCIAL.finditer(text):
        return f"a US social security number at character {match.start() + 1}"
    for match in PHONE.finditer(text):
        if len(digits_of(match[0])) in PHONE_DIGITS:
            return f"a phone number at character {match.start() + 1}"
    return None


def has_many_digits(text: str) -> bool:
    """Whether nine stand in a row. What is found in a text without its letters may be apart in the text."""
    if text.isascii() and not MANY_ASCII_DIGITS.search(text.encode().translate(None, LOWER_CASE)):
        return False
    return MANY_DIGITS.search(text) is not None


def digits_of(text: str) -> str:
    return re.sub(r"\D", "", text)


def card_groups(number: str) -> bool:
    """Whether digits stand together as on a card: all in one, or in three groups and more of at most six."""
    groups = re.split(r"[ -]", number)
    return len(groups) == 1 or (len(groups) > 2 and max(map(len, groups)) <= 6)


def luhn_holds(digits: str) -> bool:
    """Check digit of ISO/IEC 7812-1, annex B; all zeros hold too and are no card."""
    if not digits.isascii() or not digits.strip("0") or not 13 <= len(digits) <= 19:
        return False
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def iban_holds(iban: str) -> bool:
    """ISO 13616: the country and check digits moved behind, letters as 10 to 35, the number modulo 97 is 1."""
    if not 15 <= len(iban) <= 34:
        return False
    return int("".join(str(int(sign, 36)) for sign in iban[4:] + iban[:4])) % 97 == 1
