# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a tokenizer are special."""

from __future__ import annotations

from typing import Any


def ids_of_special_tokens(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens by their text: the named ones, the extra ones, and those added with `special=True`.

    In transformers 5 `all_special_tokens` has only the first two. The marks of Llama 3's and Phi 3's turns are of the
    third kind. Other added tokens, such as Qwen3's `<think>`, are not special.

    Args:
        tokenizer: of transformers, or any object with `all_special_ids`, `all_special_tokens` or
            `added_tokens_decoder`, of which each may be missing. Ids without texts stand under their numbers.
    """
    ids = getattr(tokenizer, "all_special_ids", ())
    tokens = getattr(tokenizer, "all_special_tokens", map(str, ids))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return dict(zip(tokens, ids, strict=True)) | {
        token.content: token_id for token_id, token in added.items() if token.special
    }
