# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_token_texts.py
"""Texts of tokens read as the response does, and characters of several tokens stay whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from verl.report.token_texts import MOST_TOKENS_OF_A_CHARACTER, UNFINISHED, token_texts

TEXTS = ("3+9=12.", " 你好，世界！", "a 👍🏽 b", "naïve\n\n", "<think>I see</think>", "")


@pytest.fixture(scope="module")
def by_bytes() -> PreTrainedTokenizerFast:
    """Like Llama's: a space begins every word, and unknown characters fall apart into bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁a": 256, "▁b": 257, "▁": 258}
    core = Tokenizer(models.BPE(vocab, [("▁", letter) for letter in ()], byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


def bytes_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a byte-level tokenizer, a token for each byte."""
    letters = {byte: tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in range(256)}
    return [letters[byte] for byte in text.encode()]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_make_up_the_response(text: str, tokenizer, by_bytes) -> None:
    for one in (tokenizer, by_bytes):
        ids = one.encode(text, add_special_tokens=False)
        texts = token_texts(one, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == one.decode(ids, skip_special_tokens=False)
        assert UNFINISHED not in "".join(texts)


def test_the_first_of_the_tokens_that_share_a_character_has_it(tokenizer, by_bytes) -> None:
    for one in (tokenizer, by_bytes):
        ids = one.encode("好a", add_special_tokens=False)[-4:]
        assert token_texts(one, ids) == ["好", "", "", "a"]


def test_a_space_between_words_is_kept_and_special_tokens_are_written_out(tokenizer, by_bytes) -> None:
    assert token_texts(by_bytes, [256, 257]) == ["a", " b"]
    ids = [tokenizer.convert_tokens_to_ids("9"), tokenizer.eos_token_id]
    assert token_texts(tokenizer, ids) == ["9", tokenizer.eos_token]


def test_bytes_that_are_no_character_do_not_swallow_what_comes_after(tokenizer) -> None:
    first_byte = tokenizer.encode("好", add_special_tokens=False)[0]
    nine = tokenizer.convert_tokens_to_ids("9")
    assert token_texts(tokenizer, [first_byte, nine, nine]) == [UNFINISHED, "9", "9"]
    many = [first_byte] * (2 * MOST_TOKENS_OF_A_CHARACTER + 1)
    assert token_texts(tokenizer, [*many, nine])[-1] == "9"
