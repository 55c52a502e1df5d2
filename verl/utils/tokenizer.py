# SPDX-License-Identifier: Apache-2.0
"""Loads a model's tokenizer and processor for training: padding on the left, an optional other chat template."""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.exceptions import SecurityError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TokenizersBackend

from verl.config import cut
from verl.utils.remote_code import refused_remote_code
from verl.utils.special_tokens import ids_of_special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import ProcessorMixin

logger = logging.getLogger(__name__)

QUESTION = {"role": "user", "content": "question"}
ANSWER = {"role": "assistant", "content": "ANSWER"}

TAG_IN_BARS = re.compile("<[|\N{FULLWIDTH VERTICAL LINE}][^<>]*>")
"""How chat templates write the marks of turns, `<|user|>`; the fullwidth bar is DeepSeek's."""


def check_torchvision() -> None:
    """Import torchvision, which transformers needs for image processors.

    Raises:
        RuntimeError: it is missing, or its binary does not load with this torch. The wheel on PyPI is linked against
            CUDA and fails with a CPU-only torch, though image resizing does not need the binary.
    """
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise RuntimeError(f"{error}; `{sys.executable} -m pip install torchvision` installs it") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise RuntimeError(
            f"torchvision cannot load beside this torch ({error}). `{sys.executable} scripts/mend_torchvision.py` in "
            "the repository's root makes it importable, once for this environment"
        ) from error


def get_tokenizer(
    path: str, override_chat_template: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer for generation: padding on the left, with a padding token.

    Args:
        path: folder or hub id of the model.
        override_chat_template: a jinja file that replaces the model's chat template, or the template itself.
        trust_remote_code: run Python code that comes with the model.
        kwargs: passed on to `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: `override_chat_template` is neither a file nor a template, the chat template accesses Python
            internals, or the model needs its own code.
        OSError: transformers finds no tokenizer at `path`.
    """
    with refused_remote_code(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    if tokenizer.bos_token == "<bos>" and tokenizer.eos_token == "<eos>":
        tokenizer.eos_token = "<end_of_turn>"  # Gemma's chats never end with the <eos> that its tokenizer declares
    tokenizer = _prepared(tokenizer, override_chat_template)
    _require_safe_template(tokenizer, path, override_chat_template)
    return tokenizer


def get_processor(
    path: str, override_chat_template: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> ProcessorMixin | None:
    """Load the processor (tokenizer and image processor in one) of a model; None for a text-only model.

    Arguments and errors as in `get_tokenizer`; RuntimeError if torchvision cannot be imported.
    """
    check_torchvision()
    from transformers import AutoProcessor, ProcessorMixin  # this import already needs torchvision

    with refused_remote_code(path):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code, **kwargs)
    if not isinstance(processor, ProcessorMixin):
        return None
    _prepared(processor.tokenizer, override_chat_template)
    if override_chat_template is not None:
        processor.chat_template = processor.tokenizer.chat_template
    _require_safe_template(processor, path, override_chat_template)
    return processor


def _prepared(tokenizer: PreTrainedTokenizerBase, override_chat_template: str | None) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if override_chat_template is not None:
        tokenizer.chat_template = _chat_template(override_chat_template)
    return tokenizer


def _chat_template(file_or_template: str) -> str:
    if "{{" in file_or_template or "{%" in file_or_template:
        return file_or_template
    if not os.path.isfile(file_or_template):
        raise ValueError(f"data.override_chat_template={file_or_template} is not a file; give a jinja chat template")
    with open(file_or_template, encoding="utf-8") as file:
        return file.read()


def _require_safe_template(
    owner: PreTrainedTokenizerBase | ProcessorMixin, path: str, override_chat_template: str | None
) -> None:
    """Raise for a template that transformers' sandbox refuses, so that no row is blamed for it."""
    try:
        if owner.chat_template is not None:
            owner.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    except SecurityError as error:
        override = cut(override_chat_template or "")
        source = f"data.override_chat_template={override}" if override else f"the chat template of {path}"
        raise ValueError(f"{source} accesses more than its messages: {error}") from None
    except (TypeError, jinja2.TemplateError):  # a template that wants its contents in another form
        return


def eos_token_ids_of(generation_config: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: what the model's generation config names, and the tokenizer's own end token.

    Checkpoints of base models name only end-of-text, while chats end their turns with another token; without it a
    response would run past its turn.
    """
    named = generation_config.eos_token_id
    named = [] if named is None else [named] if isinstance(named, int) else list(named)
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return list(dict.fromkeys([*named, *own]))


def warn_of_other_turn_ends(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Sequence[int]) -> None:
    """Warn once if the chat template ends the assistant's turn with a special token that does not end responses."""
    end = _turn_end(tokenizer)
    if end is not None and end not in eos_token_ids:
        logger.warning(
            "the chat template ends the assistant's turn with %r, which does not end a response; responses end with "
            "%s. Set eos_token in tokenizer_config.json, or eos_token_id in generation_config.json",
            tokenizer.decode([end]),
            " or ".join(repr(tokenizer.decode([token_id])) for token_id in eos_token_ids) or "nothing",
        )


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token after an assistant's answer, as the chat template writes it; None without one."""
    after = _chat_text(tokenizer, [QUESTION, ANSWER]).rpartition(ANSWER["content"])[2]
    if not after:
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer.encode(after, add_special_tokens=False)
    return next((token_id for token_id in ids if token_id in special), None)


def prefilled_text(owner: PreTrainedTokenizerBase | ProcessorMixin) -> str:
    """The beginning of the answer that the chat template writes, such as `<think>` and a line break; usually empty.

    These are the tags at the end of the generation prompt that follow the last mark of a turn. Marks are the special
    tokens, and tags in bars that stand before an earlier answer too: DeepSeek's are added tokens that are not special,
    as Qwen3's `<think>` is, so that only their form and their place tell them apart.
    """
    closed, opened = (_chat_text(owner, [QUESTION], add_generation_prompt=is_open) for is_open in (False, True))
    tags = re.search(r"(?:<[^<>]*>\s*)+$", opened.removeprefix(closed))
    kept = "" if tags is None else tags.group()
    answered = _chat_text(owner, [QUESTION, ANSWER])
    before_answer = answered.rpartition(ANSWER["content"])[0].rpartition(QUESTION["content"])[2]
    marks = {*ids_of_special_tokens(getattr(owner, "tokenizer", owner)), *TAG_IN_BARS.findall(before_answer)}
    for mark in sorted(marks, key=len, reverse=True):
        kept = kept.rpartition(mark)[2]
    return kept.lstrip()


def _chat_text(
    owner: PreTrainedTokenizerBase | ProcessorMixin,
    messages: list[dict[str, str]],
    add_generation_prompt: bool = False,
) -> str:
    """What the chat template writes; empty without a template, or with one that wants its contents in another form."""
    if owner.chat_template is None:
        return ""
    try:
        return owner.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    except (TypeError, jinja2.TemplateError):
        return ""


def text_decoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | PreTrainedTokenizerBase:
    """A decoder like the tokenizer; if possible its core of the library `tokenizers`, which needs no transformers.

    The core's `decode` leaves special tokens out by default, so callers must pass `skip_special_tokens`.
    """
    decodes_as_core = (
        isinstance(tokenizer, TokenizersBackend)
        and type(tokenizer).decode is PreTrainedTokenizerBase.decode
        and type(tokenizer)._decode is TokenizersBackend._decode
        and not tokenizer.clean_up_tokenization_spaces
    )
    return tokenizer.backend_tokenizer if decodes_as_core else tokenizer
