# SPDX-License-Identifier: Apache-2.0
"""What kind of text a token is, for metrics that tell where weights lie."""

from enum import IntEnum

import torch
from transformers import PreTrainedTokenizerBase


class TokenKind(IntEnum):
    """Digits win over letters, and letters over the rest. Special and added tokens are markup whatever they spell."""

    DIGIT = 0
    WORD = 1
    MARKUP = 2
    """Punctuation, white space and special tokens."""


class TokenKinds:
    """Kinds of a tokenizer's tokens; each id is decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.added_tokens_decoder)
        self._kinds: dict[int, TokenKind] = {}

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64 `TokenKind`, from (tokens,) ids."""
        unique, places = ids.unique(return_inverse=True)
        return torch.tensor([self._kind(token_id) for token_id in unique.tolist()], dtype=torch.int64)[places]

    def _kind(self, token_id: int) -> TokenKind:
        if token_id not in self._kinds:
            self._kinds[token_id] = self._decoded_kind(token_id)
        return self._kinds[token_id]

    def _decoded_kind(self, token_id: int) -> TokenKind:
        if token_id in self._added:
            return TokenKind.MARKUP
        text = self._tokenizer.decode([token_id])
        if any(character.isdigit() for character in text):
            return TokenKind.DIGIT
        return TokenKind.WORD if any(character.isalpha() for character in text) else TokenKind.MARKUP
