# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_conversation.py
"""Prompts as texts and as chat messages, and words that only look like placeholders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from verl.data.conversation import (
    as_text,
    count_placeholders,
    messages_of,
    with_content_parts,
    with_plain_content,
    wrap_question,
)
from verl.data.dataset import RLHFDataset
from verl.utils.tokenizer import get_processor

pytestmark = pytest.mark.usefixtures("private_cache")

TEXT = {"type": "text", "text": "What is it?"}
IMAGE = {"type": "image"}


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase, tiny_model_path: str, tmp_path: Path) -> Callable:
    """`make(rows, **options)` is the dataset of such rows; `a.png` lies beside them."""
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")

    def build(rows: list[dict[str, Any]], **options: Any) -> RLHFDataset:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"answer": "1", **row}) + "\n" for row in rows))
        processor = get_processor(tiny_model_path)
        options = {"image_dir": str(tmp_path), "max_prompt_length": 128, **options}
        return RLHFDataset(str(path), tokenizer, processor, **options)

    return build


def chat_of(dataset: RLHFDataset, index: int) -> str:
    return dataset.tokenizer.decode(dataset[index]["raw_prompt_ids"])


def test_a_text_is_one_message_of_the_user() -> None:
    assert messages_of("a <image>") == messages_of([{"role": "user", "content": "a <image>", "name": None}])


def test_parts_and_the_text_that_they_spell_are_the_same_message() -> None:
    parts = messages_of([{"role": "user", "content": [IMAGE, TEXT, {"type": "video", "text": None}]}])
    assert parts == messages_of("<image>What is it?<video>")
    assert with_content_parts(parts, ["image", "video"])[0]["content"] == [IMAGE, TEXT, {"type": "video"}]


@pytest.mark.parametrize(
    ("text", "images", "plain"),
    [
        ("a <image> b", 1, "a <image> b"),
        (r"a \<image> b", 0, "a <image> b"),
        (r"\<image><image>", 1, "<image><image>"),
    ],
)
def test_a_backslash_makes_a_placeholder_a_word(text: str, images: int, plain: str) -> None:
    messages = messages_of(text)
    assert count_placeholders(messages, "image") == images
    assert with_plain_content(messages)[0]["content"] == plain
    (message,) = with_content_parts(messages, ["image"])
    assert sum(part["type"] == "image" for part in message["content"]) == images


def test_a_placeholder_in_a_text_part_is_a_word() -> None:
    messages = messages_of([{"role": "user", "content": [{"type": "text", "text": "the tag <image>"}, IMAGE]}])
    assert count_placeholders(messages, "image") == 1
    assert with_content_parts(messages, ["image"])[0]["content"] == [
        {"type": "text", "text": "the tag <image>"},
        IMAGE,
    ]


def test_two_backslashes_are_text_before_a_medium_and_parts_are_taken_as_they_are() -> None:
    (message,) = messages_of("x = 1 \\\\<image>")
    assert message["content"] == [{"type": "text", "text": "x = 1 \\\\"}, IMAGE]
    parts = [{"type": "text", "text": "C:\\"}, IMAGE, {"type": "text", "text": r"\<image> <ima"}]
    (message,) = messages_of([{"role": "user", "content": [*parts, {"type": "text", "text": "ge>"}]}])
    assert message["content"] == [*parts[:2], {"type": "text", "text": r"\<image> <image>"}]
    wrapped = wrap_question(
        [{"role": "user", "content": parts}], messages_of([{"role": "user", "content": parts}]), str.upper
    )
    assert wrapped[0]["content"] == [*parts[:2], {"type": "text", "text": r"\<IMAGE> <IMA"}]


def test_an_answer_that_only_calls_tools_and_parts_with_empty_fields_are_taken() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom"}]}
    asked = {"role": "user", "content": np.array([{"type": "image", "text": ""}, TEXT], dtype=object)}
    messages = messages_of(np.array([call, asked], dtype=object))
    assert messages[0]["content"] == [] and messages[1]["content"] == [IMAGE, TEXT]


def test_words_for_media_that_the_row_lacks_are_text() -> None:
    (message,) = with_content_parts(messages_of("<image> and <video>"), ["video"])
    assert message["content"] == [{"type": "text", "text": "<image> and "}, {"type": "video"}]


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        (None, "the prompt is None, neither a text nor a list of chat messages"),
        ([], "neither a text nor a list"),
        (["hello"], "neither a text nor a list"),
        ([{"role": "user"}], "needs a role and a content"),
        ([{"role": "user", "content": 3}], "neither a text nor a list of parts"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last message is the assistant's"),
        (
            [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}],
            "put it into the row's column of images",
        ),
        ([{"role": "user", "content": [{"type": "audio"}]}], "is no text, image or video"),
    ],
)
def test_what_is_no_prompt_is_refused_with_what_would_be_one(prompt: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        messages_of(prompt)
    assert len(str(caught.value)) < 500


# ---- in a dataset ----


def test_chat_messages_are_written_as_their_template_has_them(make: Callable) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": [IMAGE, TEXT]},
    ]
    dataset = make([{"prompt": chat, "images": ["a.png"]}, {"prompt": "<image>What is it?", "images": ["a.png"]}])
    turns = chat_of(dataset, 0).split("<|im_start|>")
    assert [turn.partition("\n")[0] for turn in turns[1:]] == ["system", "user", "assistant", "user", "assistant"]
    assert "Be brief.<|im_end|>" in turns[1]
    assert turns[4] in chat_of(dataset, 1)  # the last turn reads as a prompt of text does
    assert dataset[0]["prompt_text"] == "system: Be brief.\nuser: Hello\nassistant: Hi\nuser: <image>What is it?"
    assert len(dataset[0]["multi_modal_data"]["images"]) == 1


def test_a_chat_of_one_message_is_the_prompt_of_its_text(make: Callable) -> None:
    one, other = (
        make([{"prompt": [{"role": "user", "content": "<image>Q"}], "images": ["a.png"]}]),
        make([{"prompt": "<image>Q", "images": ["a.png"]}]),
    )
    assert one[0]["raw_prompt_ids"] == other[0]["raw_prompt_ids"]
    assert one[0]["prompt_text"] == other[0]["prompt_text"] == as_text(messages_of("<image>Q"))


def test_a_format_prompt_wraps_the_users_last_message(make: Callable, tmp_path: Path) -> None:
    (tmp_path / "f.jinja").write_text("{{ content }} Think first.")
    turns = (("system", "S"), ("user", "First"), ("assistant", "A"), ("user", "Q"))
    dataset = make(
        [{"prompt": [{"role": role, "content": content} for role, content in turns]}],
        format_prompt=str(tmp_path / "f.jinja"),
    )
    assert "Q Think first.<|im_end|>" in chat_of(dataset, 0)
    assert "S<|im_end|>" in chat_of(dataset, 0) and "First<|im_end|>" in chat_of(dataset, 0)


def test_placeholders_are_words_in_rows_without_that_medium_and_one_warning_says_so(
    make: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"prompt": "<image>", "images": ["a.png"]},
        {"prompt": "what does <image> mean?", "images": []},
        {"prompt": "and <image>?", "images": None},
        {"prompt": r"<image> \<image>", "images": ["a.png"]},
    ]
    dataset = make(rows)
    assert "what does <image> mean?<|im_end|>" in chat_of(dataset, 1)
    assert dataset[1]["multi_modal_data"] is None
    assert chat_of(dataset, 3).count("<image>") == 1
    assert caplog.text.count("<image> is read as text in 2 rows without images; the first is row 1") == 1


def test_a_template_that_refuses_a_message_names_the_row(make: Callable, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    rows = [{"prompt": [{"role": "user", "content": "Q"}]}, {"prompt": chat}]
    dataset = make(rows, filter_overlong_prompts=False)
    template = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    try:
        with pytest.raises(ValueError, match="row 1 of .*: TemplateError: no system role"):
            dataset[1]
    finally:
        tokenizer.chat_template = template


def test_a_tokenizer_without_chat_template_is_refused_with_the_remedy(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Q", "answer": "1"}) + "\n")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ValueError, match="has no chat template.* data.override_chat_template"):
            RLHFDataset(str(tmp_path / "rows.jsonl"), tokenizer, None)
    finally:
        tokenizer.chat_template = template
