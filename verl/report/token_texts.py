# SPDX-License-Identifier: Apache-2.0
"""The text of each token of a response. Their concatenation is the text of the response."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that decoders write for an incomplete character."""

MOST_TOKENS_OF_A_CHARACTER = 8
"""A character has at most four bytes, so bytes that stay incomplete for longer are no character."""


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """One text per token. If tokens share a character, the first has it and the others have an empty text.

    A token is decoded together with earlier ones, since some tokenizers drop the space at the beginning of a text.
    Special tokens are written out.
    """
    texts: list[str] = []
    context = start = 0  # decoding begins at `context`; tokens from `start` on have no text yet
    unfinished = ""
    for end in range(1, len(token_ids) + 1):
        text = _text_after(tokenizer, token_ids[context:end], start - context)
        if unfinished and text.startswith(unfinished) and not text.endswith(UNFINISHED):
            # The bytes are no character: they stay incomplete, and the last token has its own text.
            texts += _shared(unfinished, end - 1 - start)
            context, start = start, end - 1
            text = text.removeprefix(unfinished)
        unfinished = text if text.endswith(UNFINISHED) else ""
        if unfinished and end - start < MOST_TOKENS_OF_A_CHARACTER and end < len(token_ids):
            continue
        texts += _shared(text, end - start)
        context, start, unfinished = start, end, ""
    return texts


def _text_after(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], count: int) -> str:
    """The text of the tokens after the first `count`."""
    before = tokenizer.decode(token_ids[:count], skip_special_tokens=False)
    return tokenizer.decode(token_ids, skip_special_tokens=False).removeprefix(before)


def _shared(text: str, count: int) -> list[str]:
    if text == UNFINISHED * count:
        return list(text)
    return [text, *[""] * (count - 1)]
