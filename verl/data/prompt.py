# SPDX-License-Identifier: Apache-2.0
"""Writes a prompt as a model reads it: in its chat template, media expanded to their tokens by its processor."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from verl.data.conversation import PLACEHOLDERS, Message, with_content_parts, with_plain_content
from verl.data.video import VideoOutline
from verl.models.registry import family_of, media_token_ids

if TYPE_CHECKING:
    from transformers import ProcessorMixin


class PromptEncoder:
    """From the text of a prompt to token ids and model inputs, for one model.

    Args:
        tokenizer: of the model.
        processor: of the model; None for a model of text alone.
        model_config: of the model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        model_config: PretrainedConfig,
    ) -> None:
        self.tokenizer = tokenizer
        self.processor = processor
        self.family = family_of(model_config)
        self.media_token_ids = media_token_ids(model_config)
        # What a chat template writes for a medium may be another token than those it becomes: Gemma 3's begins it.
        self.placeholder_ids = {
            kind: tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
            for kind in PLACEHOLDERS
            if getattr(processor, f"{kind}_token", None) is not None
        }

    def chat_text(self, messages: Sequence[Message], kinds: Collection[str], by_processor: bool) -> str:
        """The conversation in the chat template, the assistant's turn opened.

        Args:
            messages: as `messages_of` gives them.
            kinds: of media that the row has; the placeholders of others are text.
            by_processor: whether the processor's template writes it, where there is one; otherwise the tokenizer's, if
                it has one.

        Raises:
            jinja2.TemplateError: the template refuses the messages, as some do a system turn.
        """
        by_processor = by_processor or self.tokenizer.chat_template is None
        if by_processor and self.processor is not None:
            given, template_owner = with_content_parts(messages, kinds), self.processor
        else:
            given, template_owner = with_plain_content(messages), self.tokenizer
        chat_text = template_owner.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
        return self._without_outer_marks(chat_text)

    @property
    def has_chat_template(self) -> bool:
        """Whether tokenizer or processor has one."""
        return any(getattr(owner, "chat_template", None) is not None for owner in (self.tokenizer, self.processor))

    def raw_ids(self, chat_text: str, num_images: int, num_videos: int) -> list[int]:
        """The prompt's tokens with one placeholder for each medium, and none for anything else.

        Raises:
            ValueError: there are more or fewer of them, or tokens that only a processor should write.
        """
        token_ids = self.tokenizer.encode(chat_text, add_special_tokens=self._adds_special_tokens(chat_text))
        expected = dict.fromkeys([*self.media_token_ids, *self.placeholder_ids.values()], 0)
        for kind, number in (("image", num_images), ("video", num_videos)):
            if kind in self.placeholder_ids:
                expected[self.placeholder_ids[kind]] = number
        found = {token_id: token_ids.count(token_id) for token_id in expected}
        if found != expected:
            names = ", ".join(
                f"{found[token_id]} of {self.tokenizer.convert_ids_to_tokens(token_id)}"
                for token_id in expected
                if found[token_id] != expected[token_id]
            )
            media = f"{num_images} images" + (f" and {num_videos} videos" if num_videos else "")
            raise ValueError(
                f"{media}, but {names} once it is in the chat template; the prompt must not spell these tokens "
                "out, and the template must write one for each image or video"
            )
        return token_ids

    def model_inputs(
        self, chat_text: str, image_sizes: Sequence[tuple[int, int]], videos: Sequence[VideoOutline]
    ) -> Mapping[str, torch.Tensor]:
        """What the processor makes of this prompt: `input_ids` (1, length), and the grids of its media.

        No pixel is needed or made: the processor works on tensors that have a shape and no content, so that a prompt
        is measured before its media are decoded by the very code that writes it.

        Args:
            image_sizes: (width, height) of each image once it is resized.

        Raises:
            ValueError: a medium has a shape that the processor refuses.
        """
        options: dict[str, Any] = {
            "add_special_tokens": self._adds_special_tokens(chat_text),
            "return_tensors": "pt",
        }
        if self.processor is None:
            return self.tokenizer([chat_text], **options)
        if image_sizes:
            options["images"] = [self._blank(*size) for size in image_sizes]
        if videos:
            options["videos"] = [_blank_frames(video) for video in videos]
            options["video_metadata"] = [video.metadata for video in videos]
            options["do_sample_frames"] = False
        return self.processor(text=[chat_text], **options)

    def length(
        self,
        chat_text: str,
        raw_ids: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
        videos: Sequence[VideoOutline],
    ) -> int:
        """How many tokens `model_inputs` gives. `raw_ids` are those of the chat text, and all there is to text."""
        if not image_sizes and not videos:
            return len(raw_ids)
        return self.model_inputs(chat_text, image_sizes, videos)["input_ids"].shape[1]

    def _adds_special_tokens(self, chat_text: str) -> bool:
        """Whether the tokenizer has to begin the sequence, which the chat templates of some families leave to it."""
        bos = self.tokenizer.bos_token
        return self.processor is not None and bos is not None and not chat_text.startswith(bos)

    def _without_outer_marks(self, chat_text: str) -> str:
        """With the bare placeholder of each video where the processor writes marks around each of its moments.

        Qwen3-VL was trained on these alone; transformers 5.19 leaves the template's pair standing around them.
        """
        if self.processor is None or not self.family.marks_each_frame:
            return chat_text
        processor = self.processor
        marked = f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"
        return chat_text.replace(marked, processor.video_token)

    def _blank(self, width: int, height: int) -> Image.Image | torch.Tensor:
        """An image of this size and of nothing else, in the form that the processor takes."""
        if self.family.copies_pixels:
            return Image.new("RGB", (width, height))
        return torch.empty(3, height, width, dtype=torch.uint8, device="meta")


def _blank_frames(video: VideoOutline) -> torch.Tensor:
    """(T, 3, H, W) without content."""
    width, height = video.frame_size
    return torch.empty(len(video.frame_indices), 3, height, width, dtype=torch.uint8, device="meta")
