# SPDX-License-Identifier: Apache-2.0
"""What a prompt says: a text, or the messages of a chat, with `<image>` and `<video>` in the place of media.

Every message is brought to one form: its content is a text in which `<image>` and `<video>` stand for media, and
`\\<image>` and `\\<video>` for those very words.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from verl.config import cut

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
"""What stands in a prompt for a medium of each kind."""

_MARKS = re.compile(r"(?<!\\)(<image>|<video>)")
_ESCAPED = re.compile(r"\\(<image>|<video>)")

Message = dict[str, Any]
"""`role`, `content` (a text), and whatever else the chat template reads."""


def messages_of(prompt: Any) -> list[Message]:
    """The messages of a prompt; a text is one of the user.

    Args:
        prompt: a text, or a list of messages with `role` and `content`, which is a text or a list of parts:
            `{"type": "text", "text": ...}`, `{"type": "image"}`, `{"type": "video"}`. Keys that are null are none.

    Raises:
        ValueError: it is neither; it ends with an answer; or a part is of another type, or holds its medium itself.
    """
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(item, Mapping) for item in prompt):
        raise ValueError(f"the prompt is {cut(repr(prompt))}, neither a text nor a list of chat messages")
    messages = [_message(item) for item in prompt]
    if messages[-1]["role"] == "assistant":
        raise ValueError("the prompt's last message is the assistant's; leave it out, it is the policy's to write")
    return messages


def count_placeholders(messages: Sequence[Message], kind: str) -> int:
    """How many media of a kind, `image` or `video`, the messages have a place for."""
    return sum(_MARKS.findall(message["content"]).count(PLACEHOLDERS[kind]) for message in messages)


def replace_question(messages: Sequence[Message], text: str) -> list[Message]:
    """The messages with another text for the user's last one."""
    last = last_question(messages)
    return [{**message, "content": text} if index == last else message for index, message in enumerate(messages)]


def last_question(messages: Sequence[Message]) -> int:
    """Where the user's last message is, or the last of all."""
    return max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)


def as_text(messages: Sequence[Message]) -> str:
    """The conversation for people and reward functions: a single message's content, or several with their roles."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def with_plain_content(messages: Sequence[Message]) -> list[Message]:
    """For templates that take texts: the content as it reads, without backslashes before escaped words."""
    return [{**message, "content": _unescaped(message["content"])} for message in messages]


def with_content_parts(messages: Sequence[Message], kinds: Collection[str]) -> list[Message]:
    """For templates that take parts: the content split where a medium stands.

    Args:
        kinds: of media that the row has; the words for others are text.
    """
    return [{**message, "content": _parts(message["content"], kinds)} for message in messages]


def _message(item: Mapping[str, Any]) -> Message:
    message = {key: value for key, value in item.items() if value is not None}
    if not isinstance(message.get("role"), str) or "content" not in message:
        raise ValueError(f"the chat message {cut(repr(dict(item)))} needs a role and a content")
    content = message["content"]
    if not isinstance(content, str):
        if not isinstance(content, Sequence):
            raise ValueError(
                f"the content of a chat message is {cut(repr(content))}, neither a text nor a list of parts"
            )
        content = "".join(map(_text_of_part, content))
    return {**message, "content": content}


def _text_of_part(part: Any) -> str:
    given = {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else {}
    kind = given.get("type")
    if kind == "text" and isinstance(given.get("text"), str):
        return _MARKS.sub(r"\\\1", given["text"])
    if kind in PLACEHOLDERS and set(given) == {"type"}:
        return PLACEHOLDERS[kind]
    if kind in PLACEHOLDERS:
        raise ValueError(
            f"the {kind} part of a chat message holds its {kind} ({cut(repr(part))}); put it into the row's column of "
            f'{kind}s, and {{"type": "{kind}"}} into the message'
        )
    raise ValueError(f"the part {cut(repr(part))} of a chat message is no text, image or video")


def _parts(content: str, kinds: Collection[str]) -> list[dict[str, str]]:
    by_word = {PLACEHOLDERS[kind]: kind for kind in kinds}
    parts: list[dict[str, str]] = []
    for piece in _MARKS.split(content):
        if piece in by_word:
            parts.append({"type": by_word[piece]})
        elif piece and parts and parts[-1]["type"] == "text":
            parts[-1]["text"] += _unescaped(piece)
        elif piece:
            parts.append({"type": "text", "text": _unescaped(piece)})
    return parts


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(r"\1", text)
