# SPDX-License-Identifier: Apache-2.0
"""Tokenizers that declare their tokens as those of Llama 3, Phi 3, DeepSeek-R1-Distill, Qwen3 and Gemma 3 do.

Every byte is a token of its own. Of the special tokens transformers names only the ends of sequence and the padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LOOP = "{% for m in messages %}TURN{% endfor %}{% if add_generation_prompt %}OPENING{% endif %}"


@dataclass(frozen=True)
class Layout:
    """What a tokenizer is made of."""

    bos: str | None
    eos: str
    special: tuple[str, ...]
    """Tokens added with `special=True`, that no other list has."""
    added: tuple[str, ...]
    """Tokens added without it."""
    turn: str
    """How the chat template writes `m.role` and `m.content`."""
    opening: str
    """How it opens an answer."""

    def build(self, opening: str | None = None, turn: str | None = None) -> PreTrainedTokenizerFast:
        """The tokenizer with its chat template, or with another opening or turn in it."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_tokens([AddedToken(token, special=True, normalized=False) for token in self.special])
        core.add_tokens([AddedToken(token, special=False, normalized=False) for token in self.added])
        loop = LOOP.replace("TURN", turn or self.turn).replace("OPENING", opening or self.opening)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token=self.bos,
            eos_token=self.eos,
            pad_token=self.eos,
            chat_template=(self.bos or "") + loop,
        )
        assert set(tokenizer.all_special_tokens) == {self.bos, self.eos} - {None}
        return tokenizer


LLAMA_3 = Layout(
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    added=(),
    turn="<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>",
    opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
)
PHI_3 = Layout(
    bos="<s>",
    eos="<|endoftext|>",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    added=(),
    turn="{{ '<|' + m.role + '|>' }}\n{{ m.content }}<|end|>\n",
    opening="<|assistant|>\n",
)
BAR = "\N{FULLWIDTH VERTICAL LINE}"
DEEPSEEK_USER, DEEPSEEK_ASSISTANT = f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
DEEPSEEK_BEGIN, DEEPSEEK_END = (f"<{BAR}{end}\u2581of\u2581sentence{BAR}>" for end in ("begin", "end"))
DEEPSEEK = Layout(
    bos=DEEPSEEK_BEGIN,
    eos=DEEPSEEK_END,
    special=(),
    added=(DEEPSEEK_USER, DEEPSEEK_ASSISTANT, "<think>", "</think>"),
    turn="{% if m.role == 'system' %}{{ m.content }}"
    f"{{% elif m.role == 'user' %}}{DEEPSEEK_USER}{{{{ m.content }}}}"
    f"{{% else %}}{DEEPSEEK_ASSISTANT}{{{{ m.content }}}}{DEEPSEEK_END}{{% endif %}}",
    opening=f"{DEEPSEEK_ASSISTANT}<think>\n",
)
QWEN3 = Layout(
    bos=None,
    eos="<|im_end|>",
    special=("<|im_start|>", "<|box_start|>", "<|box_end|>"),
    added=("<think>", "</think>"),
    turn="<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
    opening="<|im_start|>assistant\n<think>\n",
)
GEMMA_3 = Layout(
    bos="<bos>",
    eos="<eos>",
    special=("<start_of_turn>", "<end_of_turn>"),
    added=("<unused0>",),
    turn="<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n",
    opening="<start_of_turn>model\n",
)
