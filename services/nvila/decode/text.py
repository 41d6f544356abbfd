"""From token ids to text, piece by piece: only whole characters are given out, nothing that may begin a stop string.

What has been given out after some ids depends only on those ids, not on how they came in steps. That is why a
generation can go on elsewhere: feed it the ids so far, throw the text away, continue.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cache

from nvila.errors import InvalidCheckpoint
from nvila.model.tokenizer import ChatTokenizer


class Vocabulary:
    """The bytes of every token of a byte-level BPE vocabulary; special tokens have none.

    Concatenated and decoded as UTF-8 (invalid bytes become U+FFFD), they are what the tokenizer itself decodes.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        backend = tokenizer.backend
        if type(backend.decoder).__name__ != "ByteLevel":
            raise InvalidCheckpoint(f"the tokenizer's decoder is {type(backend.decoder).__name__}, expected ByteLevel")
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """Empty for special tokens and for ids that no token stands for."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.token_of(token_id)
        if token is None or token_id in self._special:
            return b""
        table = _byte_of_character()
        try:
            return bytes(table[character] for character in token)
        except KeyError:  # an added token, stored as it reads
            return token.encode()


class TextStream:
    """The text of one answer as its ids come in.

    `add` and `finish` return the text that may be given out now. After `is_stopped` (a stop string came up) there is no
    more: the text ends before it.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary = vocabulary
        self._stop = tuple(text for text in stop if text)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.is_stopped = False

    def add(self, token_ids: Iterable[int]) -> str:
        # One by one: where a stop string is found must not depend on how many ids came together.
        return "".join(self._take(self._decoder.decode(self._vocabulary.bytes_of(i))) for i in token_ids)

    def finish(self) -> str:
        """What was held back; an incomplete character becomes U+FFFD."""
        text = self._take(self._decoder.decode(b"", final=True))
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _take(self, text: str) -> str:
        if self.is_stopped:
            return ""
        self._held += text
        at = min((found for stop in self._stop if (found := self._held.find(stop)) >= 0), default=-1)
        if at >= 0:
            self.is_stopped = True
            given, self._held = self._held[:at], ""
            return given
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters (openai/gpt-2 src/encoder.py, `bytes_to_unicode`), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
