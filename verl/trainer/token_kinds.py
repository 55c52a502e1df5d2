# SPDX-License-Identifier: Apache-2.0
"""Classifies tokens as digits, words or markup, for metrics of where the weights go."""

from enum import IntEnum

import torch
from transformers import PreTrainedTokenizerBase


class TokenKind(IntEnum):
    """A token with a digit is a digit; otherwise one with a letter is a word; all others, and special or added tokens
    whatever their text, are markup."""

    DIGIT = 0
    WORD = 1
    MARKUP = 2
    """Punctuation, white space and special tokens."""


class TokenKinds:
    """The kinds of a tokenizer's tokens. Each id is decoded only once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = set(tokenizer.added_tokens_decoder)
        self._kinds: dict[int, TokenKind] = {}

    def classify(self, ids: torch.Tensor) -> torch.Tensor:
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
