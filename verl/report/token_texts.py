# SPDX-License-Identifier: Apache-2.0
"""The text of each token of a response, so that their concatenation reads as the response does."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How decoders write bytes that are no whole character yet."""

MOST_TOKENS_OF_A_CHARACTER = 8
"""A character has at most four bytes, and an emoji of several is one for each; what stays unfinished for longer is
none."""


def token_texts(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> list[str]:
    """As many texts as tokens. Where tokens share a character, the first has it and the others have an empty text.

    A token is decoded with those before it, since some tokenizers leave out the space that a text begins with. Special
    tokens are written out.
    """
    texts: list[str] = []
    context = start = 0  # tokens from `context` on are decoded with; those from `start` on have no text yet
    unfinished = ""
    for end in range(1, len(token_ids) + 1):
        text = _text_after(tokenizer, token_ids[context:end], start - context)
        if unfinished and text.startswith(unfinished) and not text.endswith(UNFINISHED):
            # What was unfinished stays so: its bytes are no character, and the last token has a text of its own.
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
    """Of the tokens after the first `count`."""
    before = tokenizer.decode(token_ids[:count], skip_special_tokens=False)
    return tokenizer.decode(token_ids, skip_special_tokens=False).removeprefix(before)


def _shared(text: str, count: int) -> list[str]:
    if text == UNFINISHED * count:
        return list(text)
    return [text, *[""] * (count - 1)]
