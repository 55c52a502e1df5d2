# SPDX-License-Identifier: Apache-2.0
"""The content of a prompt: a text, or the messages of a chat, with `<image>` and `<video>` in place of media.

Every message is brought to one form, a list of parts: `{"type": "text", "text": ...}`, `{"type": "image"}`,
`{"type": "video"}`. In a text, `\\<image>` and `\\<video>` are escaped words; a part of type text has no placeholders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from verl.config import cut

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
"""The placeholder in a prompt for each kind of media."""

_KINDS = {placeholder: kind for kind, placeholder in PLACEHOLDERS.items()}
# One backslash escapes; two, as at the end of a LaTeX line, are text before a placeholder.
_MARK = re.compile(r"(?<!(?<!\\)\\)(<image>|<video>)")
_ESCAPED = re.compile(r"(?<!\\)\\(<image>|<video>)")
_STAND_IN = "\0{}\0"

Part = dict[str, str]
Message = dict[str, Any]
"""`role`, `content` (a list of parts), and further keys of the chat template."""


def messages_of(prompt: Any) -> list[Message]:
    """The messages of a prompt; a text becomes one user message.

    Args:
        prompt: a text, or a list of messages with `role` and `content`, which is a text or a list of parts. Null
            values count as missing keys; a message with `tool_calls` needs no content.

    Raises:
        ValueError: it is neither; it ends with an assistant message; a part has another type, or contains its medium.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": _parts_of_text(prompt)}]
    prompt = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(item, Mapping) for item in prompt):
        raise ValueError(f"the prompt is {cut(repr(prompt))}, neither a text nor a list of chat messages")
    messages = [_message(item) for item in prompt]
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt's last message is the assistant's; leave it out, the policy writes it")
    return messages


def count_placeholders(messages: Sequence[Message], kind: str) -> int:
    """Number of placeholders of a kind, `image` or `video`, in the messages."""
    return sum(part["type"] == kind for message in messages for part in message["content"])


def wrap_question(prompt: Any, messages: Sequence[Message], wrap: Callable[[str], str]) -> list[Message]:
    """The messages with the last user message wrapped in further text.

    Args:
        prompt: the original prompt, before `messages_of`.
        wrap: takes the question, returns the whole text; its own placeholders count if the question is a text.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    source = prompt if isinstance(prompt, str) else prompt[last]["content"]
    if isinstance(source, str):
        content = _parts_of_text(wrap(source))
    else:
        parts = messages[last]["content"]
        media = [part for part in parts if part["type"] != "text"]
        numbers = iter(range(len(media)))
        text = "".join(part["text"] if part["type"] == "text" else _STAND_IN.format(next(numbers)) for part in parts)
        pieces = re.split("\0(\\d+)\0", wrap(text))
        content = _merged(
            media[int(piece)] if index % 2 else {"type": "text", "text": piece} for index, piece in enumerate(pieces)
        )
    return [{**message, "content": content} if index == last else message for index, message in enumerate(messages)]


def as_text(messages: Sequence[Message]) -> str:
    """The conversation as text, for people and reward functions: a single message, or several with their roles."""
    plain = with_plain_content(messages)
    if len(plain) == 1:
        return plain[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in plain)


def with_plain_content(messages: Sequence[Message]) -> list[Message]:
    """Messages for templates that take texts: the content as text, with placeholders for media."""
    return [
        {
            **message,
            "content": "".join(part.get("text", PLACEHOLDERS.get(part["type"])) for part in message["content"]),
        }
        for message in messages
    ]


def with_content_parts(messages: Sequence[Message], kinds: Collection[str]) -> list[Message]:
    """Messages for templates that take parts.

    Args:
        kinds: the kinds of media in the row; placeholders of other kinds are text.
    """
    return [
        {
            **message,
            "content": _merged(
                part if part["type"] in ("text", *kinds) else {"type": "text", "text": PLACEHOLDERS[part["type"]]}
                for part in message["content"]
            ),
        }
        for message in messages
    ]


def _message(item: Mapping[str, Any]) -> Message:
    message = {key: value for key, value in item.items() if value is not None}
    if "tool_calls" in message:
        message.setdefault("content", "")
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"the chat message {cut(repr(dict(item)))} needs a role and a content")
    content = message["content"]
    content = content.tolist() if isinstance(content, np.ndarray) else content
    if isinstance(content, str):
        return {**message, "content": _parts_of_text(content)}
    if not isinstance(content, Sequence):
        raise ValueError(f"the content of a chat message is {cut(repr(content))}, neither a text nor a list of parts")
    return {**message, "content": _merged(map(_part, content))}


def _part(part: Any) -> Part:
    fields = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = fields.get("type")
    if kind == "text" and isinstance(fields.get("text"), str):
        return {"type": "text", "text": fields["text"]}
    if kind in PLACEHOLDERS and not any(value for key, value in fields.items() if key != "type"):
        return {"type": kind}
    if kind in PLACEHOLDERS:
        raise ValueError(
            f"the {kind} part of a chat message holds its {kind} ({cut(repr(part))}); put it into the row's column of "
            f'{kind}s, and {{"type": "{kind}"}} into the message'
        )
    raise ValueError(f"the part {cut(repr(part))} of a chat message is no text, image or video")


def _parts_of_text(text: str) -> list[Part]:
    pieces = _MARK.split(text)
    return _merged(
        {"type": _KINDS[piece]} if index % 2 else {"type": "text", "text": _ESCAPED.sub(r"\1", piece)}
        for index, piece in enumerate(pieces)
    )


def _merged(parts: Any) -> list[Part]:
    """Drops empty texts and joins neighbouring texts."""
    merged: list[Part] = []
    for part in parts:
        if part["type"] != "text":
            merged.append(part)
        elif part["text"] and merged and merged[-1]["type"] == "text":
            merged[-1] = {"type": "text", "text": merged[-1]["text"] + part["text"]}
        elif part["text"]:
            merged.append(part)
    return merged
