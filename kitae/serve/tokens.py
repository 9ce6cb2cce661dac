"""Single tokens as clients see them: the bytes each stands for, and a text for it."""

from __future__ import annotations

import re
from typing import Any

from kitae.data.tokens import TAGS

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Bytes and text of token ids; `tokenizer` is a fast Hugging Face tokenizer, Any because transformers is untyped."""

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._core = tokenizer.backend_tokenizer
        self._added = {i: str(token) for i, token in self._core.get_added_tokens_decoder().items()}
        is_byte_level = "ByteLevel" in repr(self._core.decoder)
        self._bytes = {char: value for value, char in bytes_to_unicode().items()} if is_byte_level else None
        self.ids = frozenset(self._core.get_vocab().values())
        self.added = frozenset(self._added.values())
        """The texts of the added tokens."""
        self.control_ids = frozenset(
            i for i, text in self._added.items() if text not in TAGS and not text.isspace()
        )
        """Ids of the tokens that never become text."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def bytes(self, token: int) -> bytes:
        """What the token adds to a text in UTF-8; it may be a part of a character."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._core.id_to_token(token)
        if piece is None:  # a row of the model's head that the tokenizer does not use
            return b""
        if self._bytes is not None and all(char in self._bytes for char in piece):
            return bytes(self._bytes[char] for char in piece)
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return str(piece).replace("\u2581", " ").encode()

    def text(self, token: int) -> str:
        """The token as text; a part of a character as OpenAI writes it, bytes:\\xe2\\x80."""
        raw = self.bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
