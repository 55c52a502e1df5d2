# SPDX-License-Identifier: Apache-2.0
"""Encodes prompts for a model: chat template, tokenizer, and the processor, which expands media placeholders."""

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
    """Turns prompts into token ids and model inputs, for one model.

    Args:
        tokenizer: the model's tokenizer.
        processor: the model's processor; None for a text-only model.
        model_config: the model's config.
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
        # The token that a chat template writes for an image may differ from its placeholder tokens, as in Gemma 3.
        self.placeholder_ids = {
            kind: tokenizer.convert_tokens_to_ids(getattr(processor, f"{kind}_token"))
            for kind in PLACEHOLDERS
            if getattr(processor, f"{kind}_token", None) is not None
        }

    def chat_text(self, messages: Sequence[Message], kinds: Collection[str], by_processor: bool) -> str:
        """The conversation in the chat template, with the assistant's turn opened.

        Args:
            messages: from `messages_of`.
            kinds: the kinds of media in the row; placeholders of other kinds are text.
            by_processor: whether to prefer the processor's template over the tokenizer's; the other one is the
                fallback.

        Raises:
            jinja2.TemplateError: the template refuses the messages; some refuse a system turn.
        """
        by_processor = by_processor or self.tokenizer.chat_template is None
        if by_processor and self.processor is not None:
            formatted, template_owner = with_content_parts(messages, kinds), self.processor
        else:
            formatted, template_owner = with_plain_content(messages), self.tokenizer
        chat_text = template_owner.apply_chat_template(formatted, add_generation_prompt=True, tokenize=False)
        return self._without_outer_marks(chat_text)

    @property
    def has_chat_template(self) -> bool:
        """Whether tokenizer or processor has one."""
        return any(getattr(owner, "chat_template", None) is not None for owner in (self.tokenizer, self.processor))

    def raw_ids(self, chat_text: str, num_images: int, num_videos: int) -> list[int]:
        """The prompt's tokens with exactly one placeholder for each image or video.

        Raises:
            ValueError: the number of placeholders differs, or the text has tokens that only a processor may write.
        """
        token_ids = self.tokenizer.encode(chat_text, add_special_tokens=self._adds_special_tokens(chat_text))
        expected = dict.fromkeys([*self.media_token_ids, *self.placeholder_ids.values()], 0)
        for kind, number in (("image", num_images), ("video", num_videos)):
            if kind in self.placeholder_ids:
                expected[self.placeholder_ids[kind]] = number
        counts = {token_id: token_ids.count(token_id) for token_id in expected}
        if counts != expected:
            names = ", ".join(
                f"{counts[token_id]} of {self.tokenizer.convert_ids_to_tokens(token_id)}"
                for token_id in expected
                if counts[token_id] != expected[token_id]
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
        """The processor's outputs for this prompt: `input_ids` (1, length), and the grids of its media.

        No pixels are needed: the processor works on tensors with a shape but no content. So the same code measures a
        prompt before its media are decoded, and encodes it.

        Args:
            image_sizes: (width, height) of each resized image.

        Raises:
            ValueError: the processor refuses the shape of an image or video.
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
        """Number of tokens of `model_inputs`. For a text-only prompt this is the length of `raw_ids`."""
        if not image_sizes and not videos:
            return len(raw_ids)
        return self.model_inputs(chat_text, image_sizes, videos)["input_ids"].shape[1]

    def _adds_special_tokens(self, chat_text: str) -> bool:
        """Whether the tokenizer must add the begin-of-sequence token, because the chat template does not."""
        bos = self.tokenizer.bos_token
        return self.processor is not None and bos is not None and not chat_text.startswith(bos)

    def _without_outer_marks(self, chat_text: str) -> str:
        """Removes the template's vision marks around a video if the processor writes marks around each of its frames.

        Qwen3-VL was trained only on the inner marks; transformers 5.19 keeps the template's pair around them.
        """
        if self.processor is None or not self.family.marks_each_frame:
            return chat_text
        processor = self.processor
        marked = f"{processor.vision_start_token}{processor.video_token}{processor.vision_end_token}"
        return chat_text.replace(marked, processor.video_token)

    def _blank(self, width: int, height: int) -> Image.Image | torch.Tensor:
        """An image with this size and no content, in the form that the processor takes."""
        if self.family.copies_pixels:
            return Image.new("RGB", (width, height))
        return torch.empty(3, height, width, dtype=torch.uint8, device="meta")


def _blank_frames(video: VideoOutline) -> torch.Tensor:
    """(T, 3, H, W) without content."""
    width, height = video.frame_size
    return torch.empty(len(video.frame_indices), 3, height, width, dtype=torch.uint8, device="meta")
