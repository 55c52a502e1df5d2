# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_tokenizer.py
"""Tokenizer and processor come ready for generation, and a machine that cannot load one says what to do."""

import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2_5_VLProcessor

from tests.tiny import CORPUS, build_tokenizer
from tests.tokenizer_layouts import DEEPSEEK, DEEPSEEK_ASSISTANT, GEMMA_3, LLAMA_3, PHI_3, QWEN3, Layout
from verl.utils.tokenizer import (
    check_torchvision,
    eos_token_ids_of,
    get_processor,
    get_tokenizer,
    prefilled_text,
    text_decoder,
    warn_of_other_turn_ends,
)

TEMPLATE = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def text_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a model of text alone, as far as config and tokenizer go."""
    folder = tmp_path_factory.mktemp("text_model")
    build_tokenizer(CORPUS).save_pretrained(folder)
    LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    return str(folder)


def test_padding_goes_to_the_left_in_tokenizer_and_processor(tiny_model_path: str) -> None:
    for tokenizer in (get_tokenizer(tiny_model_path), get_processor(tiny_model_path).tokenizer):
        batch = tokenizer(["a", "a b c d"], padding=True)
        assert batch["attention_mask"][0][0] == 0
        assert batch["attention_mask"][0][-1] == 1


def test_a_padding_token_is_borrowed_from_the_end_of_sequence(tiny_model_path: str) -> None:
    tokenizer = get_tokenizer(tiny_model_path, pad_token=None)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_a_gemma_chat_ends_with_its_turn_and_any_other_with_its_own_token(text_model_path: str) -> None:
    gemma = dict(bos_token="<bos>", eos_token="<eos>", extra_special_tokens={"end_of_turn": "<end_of_turn>"})
    tokenizer = get_tokenizer(text_model_path, **gemma)
    assert tokenizer.eos_token == "<end_of_turn>"
    assert tokenizer.decode(tokenizer.eos_token_id) == "<end_of_turn>"
    assert get_tokenizer(text_model_path, **{**gemma, "bos_token": "<s>"}).eos_token == "<eos>"


def test_a_vision_language_model_has_its_own_processor_class(tiny_model_path: str) -> None:
    assert isinstance(get_processor(tiny_model_path), Qwen2_5_VLProcessor)


def test_a_text_model_has_no_processor(text_model_path: str) -> None:
    assert get_processor(text_model_path) is None


def test_an_overriding_template_comes_from_a_file_or_as_text(tiny_model_path: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    for override in (str(tmp_path / "chat.jinja"), TEMPLATE):
        for owner in (get_tokenizer(tiny_model_path, override), get_processor(tiny_model_path, override)):
            assert owner.apply_chat_template(MESSAGES, tokenize=False) == "[user]hi"


ATTACK = "{% for base in ''.__class__.__mro__ %}{{ base.__subclasses__() }}{% endfor %}"


@pytest.mark.parametrize("load", [get_tokenizer, get_processor])
def test_a_chat_template_that_reaches_into_python_is_refused_with_file_and_key(
    load: Callable[..., Any], tiny_model_path: str, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(ATTACK)
    with pytest.raises(
        ValueError, match=rf"^data.override_chat_template={path} accesses .*'__class__' of 'str' object"
    ):
        load(tiny_model_path, str(path))
    shutil.copytree(tiny_model_path, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(ATTACK)
    with pytest.raises(ValueError, match=f"^the chat template of {tmp_path}/model accesses more than its messages"):
        load(str(tmp_path / "model"))


def test_a_template_file_that_is_not_there_is_named(tiny_model_path: str) -> None:
    with pytest.raises(ValueError, match=r"override_chat_template=/no/chat\.jinja is not a file"):
        get_tokenizer(tiny_model_path, "/no/chat.jinja")


def test_a_torchvision_that_cannot_load_names_the_script_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package on the path fails with the words of the real wheel beside a CPU-only torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(RuntimeError, match=r"torchvision::nms does not exist.*scripts/mend_torchvision\.py"):
        check_torchvision()


@pytest.mark.parametrize("cleans_up", [False, True])
def test_a_text_decoder_decodes_as_its_tokenizer_does(tiny_model_path: str, cleans_up: bool) -> None:
    """Special tokens and bytes that are no whole character included, also once it has travelled; a tokenizer that
    cleans up spaces is its own decoder."""
    tokenizer = get_tokenizer(tiny_model_path, clean_up_tokenization_spaces=cleans_up)
    decoder = pickle.loads(pickle.dumps(text_decoder(tokenizer)))
    assert (type(decoder) is type(tokenizer)) is cleans_up
    draw = random.Random(0)
    rows = [draw.choices(range(len(tokenizer)), k=20) for _ in range(50)]
    rows += [[token] for token in range(len(tokenizer))] + [tokenizer.all_special_ids, []]
    for ids in rows:
        for skips in (True, False):
            assert decoder.decode(ids, skip_special_tokens=skips) == tokenizer.decode(ids, skip_special_tokens=skips)


# ---- where responses end ----


def test_both_the_generation_configs_and_the_tokenizers_end_token_end_a_response(tiny_model_path: str) -> None:
    tokenizer = get_tokenizer(tiny_model_path)
    own = tokenizer.eos_token_id
    for named, expected in ((None, [own]), (7, [7, own]), ([7, own], [7, own]), ([8, 7], [8, 7, own])):
        assert eos_token_ids_of(SimpleNamespace(eos_token_id=named), tokenizer) == expected
    tokenizer.eos_token = None
    assert eos_token_ids_of(SimpleNamespace(eos_token_id=7), tokenizer) == [7]


@pytest.mark.parametrize(
    ("turn_end", "eos", "is_told"),
    [("<|im_end|>", "<|im_end|>", False), ("<|im_end|>", "<|endoftext|>", True), ("", "<|endoftext|>", False)],
)
def test_a_template_whose_turn_ends_in_no_end_token_is_told(
    turn_end: str, eos: str, is_told: bool, tiny_model_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = get_tokenizer(tiny_model_path)
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}TURN{% endfor %}"
    tokenizer.chat_template = tokenizer.chat_template.replace("TURN", turn_end)
    warn_of_other_turn_ends(tokenizer, [tokenizer.convert_tokens_to_ids(eos)])
    messages = [record.getMessage() for record in caplog.records]
    assert bool(messages) == is_told
    if is_told:
        assert messages[0].startswith(
            "the chat template ends the assistant's turn with '<|im_end|>', which does not end"
        )
        assert "responses end with '<|endoftext|>'" in messages[0]


# ---- what a template has written of the answer ----


@pytest.mark.parametrize(
    ("opening", "prefix"),
    [
        ("<|im_start|>assistant\n", ""),
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<|im_start|><think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
        ("<|im_start|>", ""),
        ("[/INST]", ""),
    ],
)
def test_the_prefix_is_what_the_template_writes_of_the_answer(opening: str, prefix: str, tiny_model_path: str) -> None:
    for owner in (get_tokenizer(tiny_model_path), get_processor(tiny_model_path)):
        turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        owner.chat_template = turns + "{% if add_generation_prompt %}" + opening + "{% endif %}"
        assert prefilled_text(owner) == prefix
    assert prefilled_text(SimpleNamespace(chat_template=None)) == ""


@pytest.mark.parametrize(
    ("layout", "prefix"),
    [(LLAMA_3, ""), (PHI_3, ""), (DEEPSEEK, "<think>\n"), (QWEN3, "<think>\n"), (GEMMA_3, "")],
    ids=["Llama 3", "Phi 3", "DeepSeek-R1-Distill", "Qwen3", "Gemma 3"],
)
def test_the_prefix_begins_behind_the_mark_of_the_turn_however_a_tokenizer_declares_it(
    layout: Layout, prefix: str
) -> None:
    """Named, added as special or just added, as DeepSeek's marks and both families' `<think>` are."""
    assert prefilled_text(layout.build()) == prefix


@pytest.mark.parametrize(
    ("layout", "opening", "prefix"),
    [
        (LLAMA_3, "<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n", "<think>\n"),
        (PHI_3, "<|assistant|>\n<answer>", "<answer>"),
        (DEEPSEEK, DEEPSEEK_ASSISTANT, ""),
        (QWEN3, "<|im_start|><think>\n", "<think>\n"),
    ],
)
def test_the_prefix_behind_a_mark_is_whatever_tags_follow_it(layout: Layout, opening: str, prefix: str) -> None:
    assert prefilled_text(layout.build(opening)) == prefix


def test_tags_that_earlier_answers_begin_with_too_are_no_marks_of_a_turn() -> None:
    """A template without thoughts may write empty ones before each answer."""
    mark = f"{DEEPSEEK_ASSISTANT}<think></think>"
    turn = f"{{% if m.role == 'assistant' %}}{mark}{{% endif %}}{{{{ m.content }}}}"
    assert prefilled_text(DEEPSEEK.build(mark, turn)) == "<think></think>"


def test_a_tag_in_bars_that_only_opens_the_answer_is_no_mark_of_a_turn() -> None:
    opening = f"{DEEPSEEK_ASSISTANT}<|begin_of_thought|>\n"
    assert prefilled_text(DEEPSEEK.build(opening)) == "<|begin_of_thought|>\n"
