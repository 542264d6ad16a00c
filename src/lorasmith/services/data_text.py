"""Characters that do not belong into a text: control and bidi characters, and text decoded with the wrong encoding."""

from __future__ import annotations

import re

# Tab, line feed and carriage return are text; the bidi controls turn text around so that a reader sees another one.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffe\uffff]")
PRINTABLE = bytes([*b"\t\n\r", *range(0x20, 0x7F)])
REPLACEMENT = "\ufffd"
# UTF-8 read as windows-1252: a lead byte (0xC3 → Ã) and continuation bytes (0x80-0xBF, of which 0x80-0x9F have own signs).
CONTINUATION = "[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
# All lead bytes first: a search for one set of characters is five times as fast as one for three alternatives.
MISREAD = re.compile(f"[Â-ô](?:(?<=[Â-ß]){CONTINUATION}|(?<=[à-ï]){CONTINUATION}{{2}}|(?<=[ð-ô]){CONTINUATION}{{3}})")


def find_control_character(text: str) -> str | None:
    if text.isascii() and not text.encode().translate(None, PRINTABLE):
        return None
    match = CONTROL.search(text)
    return f"U+{ord(match[0]):04X} at character {match.start() + 1}" if match else None


def without_control_characters(text: str) -> str:
    return CONTROL.sub("", text)


def find_mojibake(text: str) -> str | None:
    """Where UTF-8 was read as windows-1252 (`Ã©` for `é`), or where a character was lost before (U+FFFD)."""
    if text.isascii():
        return None
    position = text.find(REPLACEMENT)
    if position >= 0:
        return f"U+FFFD, a character that was lost, at character {position + 1}"
    for match in MISREAD.finditer(text):
        right = reread(match[0])
        if right != match[0]:
            return f"{match[0]!r} for {right!r} at character {match.start() + 1}"
    return None


def without_mojibake(text: str) -> str:
    """The text with each misread sequence decoded again; U+FFFD stays, what it was is lost."""
    return text if text.isascii() else MISREAD.sub(lambda match: reread(match[0]), text)


def reread(sequence: str) -> str:
    """The one character that the misread bytes encode, or the sequence itself where they encode none."""
    data = b"".join(bytes([ord(one)]) if ord(one) < 256 else one.encode("cp1252") for one in sequence)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return sequence
