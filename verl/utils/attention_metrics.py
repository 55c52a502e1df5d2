# SPDX-License-Identifier: Apache-2.0
"""Measures what attention says: which keys are text and which are images, the mass on each, and VGR.

VGR (Vision-Text Gain Ratio) of a generated token is the attention per text token of the prompt over the attention per
image token, while that token is generated. It is the MDI of "When Language Overrules" (arXiv 2508.10552) per token.

Shapes: N samples, P prompt columns, R response columns (the last R of S = P + R), H heads, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Any

import torch

from verl.utils.response_span import response_columns
from verl.utils.special_tokens import ids_of_special_tokens

logger = logging.getLogger(__name__)


class KeyKind(IntEnum):
    """What a token is to the queries of its response."""

    PADDING = 0
    SINK = 1
    """The first real token: it takes attention that means nothing."""
    TEXT = 2
    """The instruction."""
    VISION = 3
    """Placeholders of images and videos."""
    PROMPT = 4
    """Other prompt tokens: special ones, and the system turn."""
    RESPONSE = 5


QWEN_TOKENS = {
    "im_start": "<|im_start|>",
    "im_end": "<|im_end|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image_pad": "<|image_pad|>",
    "video_pad": "<|video_pad|>",
}
PLACEHOLDERS = {"image_pad", "video_pad"}

TURN_MARKS = (
    ("im_start", "im_end", False),  # ChatML: Qwen, InternVL
    ("<|start_header_id|>", "<|eot_id|>", False),  # Llama 3
    ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", True),  # Mistral
    ("<|system|>", "<|user|>", True),  # GLM, Phi
)
"""Special tokens between which turns stand, and whether the first of them says by itself that its is a system turn;
otherwise the role's word follows it."""


# ---- which token is what ----


def get_qwen_special_token_ids(processor: Any) -> dict[str, int]:
    """Ids of `bos`, `eos`, `pad`, `im_start`, `im_end`, `vision_start`, `vision_end`, `image_pad` and `video_pad`.

    Only those that the tokenizer has. Of the processor (or tokenizer) nothing is used but `tokenizer`, of which the
    attributes `bos_token_id`, `eos_token_id`, `pad_token_id` and the method `convert_tokens_to_ids`.
    """
    tokenizer = _tokenizer_of(processor)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    ids |= {name: _known_id(tokenizer, token) for name, token in QWEN_TOKENS.items()}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def get_system_role_ids(processor: Any) -> tuple[int, ...]:
    """Ids of the word `system` as it stands after the mark that begins a turn; empty where the tokenizer cannot tell.

    Turns are those of `TURN_MARKS`. Templates without marks of their own (Gemma's, LLaVA 1.5's) have no system turn
    that could be told from the instruction: its words count as text.
    """
    tokenizer = _tokenizer_of(processor)
    whole = _known_id(tokenizer, "system")
    if whole is not None:
        return (whole,)
    encode = getattr(tokenizer, "encode", None)
    return tuple(encode("system", add_special_tokens=False)) if callable(encode) else ()


def vision_token_ids(model_config: Any) -> tuple[int, ...]:
    """Ids of the placeholders of images and videos, from a Hugging Face model config of any family.

    Reads `image_token_id`, `video_token_id` and the older names `image_token_index`, `video_token_index`; empty for
    text models.
    """
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    values = [getattr(model_config, name, None) for name in names]
    return tuple(dict.fromkeys(value for value in values if isinstance(value, int) and value >= 0))


def extract_vision_token_spans_qwen(processor: Any, input_ids: torch.Tensor | Sequence[int]) -> list[tuple[int, int]]:
    """Where the images and videos of one row are: (start, end) from `<|vision_start|>` to one past `<|vision_end|>`.

    A span of which truncation took one end is left out, with a warning.

    Args:
        input_ids: (S,) ids.
    """
    ids = get_qwen_special_token_ids(processor)
    if "vision_start" not in ids or "vision_end" not in ids:
        return []
    spans: list[tuple[int, int]] = []
    cut: list[int] = []
    start: int | None = None
    for position, token_id in enumerate(torch.as_tensor(input_ids).tolist()):
        if token_id == ids["vision_start"]:
            if start is not None:
                cut.append(start)
            start = position
        elif token_id == ids["vision_end"]:
            if start is None:
                cut.append(position)
            else:
                spans.append((start, position + 1))
            start = None
    if start is not None:
        cut.append(start)
    if cut:
        logger.warning("vision spans cut off by truncation are left out, those with their only end at tokens %s", cut)
    return spans


def build_modality_masks(
    input_ids: torch.Tensor,
    vision_spans: Iterable[tuple[int, int]],
    special_token_ids: Mapping[str, int] | Iterable[int],
    system_role_ids: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of one prompt are instruction and which are vision: two boolean masks (P,).

    Vision is inside the spans, their first and last token excluded. Instruction is what is neither vision nor a
    special token nor part of the first turn, if that turn's role is `system`.

    Args:
        input_ids: (P,) ids.
        vision_spans: as `extract_vision_token_spans_qwen` returns them.
        special_token_ids: ids by name, of which those of `TURN_MARKS` mark turns; without names no turn is known.
        system_role_ids: as `get_system_role_ids` returns them. Without them the system turn counts as text, and one
            warning says so if turns are known; an empty tuple says that no turn is a system turn.
    """
    is_vision = torch.zeros_like(input_ids, dtype=torch.bool)  # (P,)
    for start, end in vision_spans:
        is_vision[start + 1 : end - 1] = True
    in_prompt = torch.ones_like(is_vision)
    is_system = _system_turn(input_ids[None], in_prompt[None], _turn_marks(special_token_ids), system_role_ids)[0]
    is_special = _is_any(input_ids, _ids_of(special_token_ids))
    return ~(is_vision | is_special | is_system), is_vision


def classify_keys(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_length: int,
    vision_token_ids: Iterable[int],
    special_token_ids: Mapping[str, int] | Iterable[int],
    system_role_ids: Sequence[int] | None = None,
) -> torch.Tensor:
    """The `KeyKind` of every token: (N, S) int8.

    The sink is the first real token of a row, whatever it is and whichever side the padding is on. A first turn whose
    role is `system` counts as PROMPT, a first user turn as TEXT.

    Args:
        input_ids, attention_mask: (N, S), padded; the last `response_length` columns are the responses.
        vision_token_ids: placeholders of images and videos, as `vision_token_ids` returns them.
        special_token_ids: ids by name, of which those of `TURN_MARKS` mark turns; without names no turn is known.
        system_role_ids: as `get_system_role_ids` returns them. Without them the system turn counts as text, and one
            warning says so if turns are known; an empty tuple says that no turn is a system turn.
    """
    return _kinds(
        input_ids,
        attention_mask,
        response_length,
        _is_any(input_ids, vision_token_ids),
        _ids_of(special_token_ids),
        _turn_marks(special_token_ids),
        system_role_ids,
    )


@dataclass(frozen=True)
class KeyVocabulary:
    """Which token ids tell the kinds of keys apart, for one model and its tokenizer."""

    vision_token_ids: tuple[int, ...]
    special_token_ids: Mapping[str, int]
    system_role_ids: tuple[int, ...]

    @classmethod
    def of(cls, model_config: Any, processor: Any) -> KeyVocabulary:
        """For a Hugging Face model config and its processor, or tokenizer where the model has no other inputs."""
        return cls(vision_token_ids(model_config), _special_ids(processor), get_system_role_ids(processor))

    def classify(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_length: int) -> torch.Tensor:
        """`classify_keys` with these ids: (N, S) int8."""
        return classify_keys(
            input_ids,
            attention_mask,
            response_length,
            self.vision_token_ids,
            self.special_token_ids,
            self.system_role_ids,
        )


def count_keys(key_kinds: torch.Tensor) -> torch.Tensor:
    """How many text and how many vision keys each row of (N, S) kinds has: (N, 2) int64."""
    return torch.stack([(key_kinds == kind).sum(dim=1) for kind in (KeyKind.TEXT, KeyKind.VISION)], dim=1)


# ---- from masses to VGR ----


def vgr_epsilon(attention_keys: torch.Tensor) -> torch.Tensor:
    """What keeps VGR finite, (N, 1) float32: a millionth of the density of attention even over text and vision keys.

    An absolute constant would not be small beside the density of one image token among 16,000.

    Args:
        attention_keys: (N, 2) number of text and vision keys.
    """
    return 1e-6 / attention_keys.sum(dim=1, keepdim=True).clamp(min=1).float()


def vgr_from_mass(attention_mass: torch.Tensor, attention_keys: torch.Tensor) -> torch.Tensor:
    """VGR of every response token: (N, R) float32, the text's attention density over the images' plus epsilon.

    The same quotient of a whole response is the MDI of "When Language Overrules" (arXiv 2508.10552). Our deltas:

    1. Every response token has its own.
    2. Masses are shares of the prompt without its first token, the attention sink. Special tokens and the system turn
       are no text.
    3. The epsilon, 1e-6 over the number of text and vision keys. Other keys of the prompt are not among
       `attention_keys`: counted too, they would make it smaller still.

    NaN where it is undefined: rows without text keys or without vision keys, tokens without any mass on either, and
    masses that are not finite.

    Args:
        attention_mass: (N, R, 2) attention on the text keys and on the vision keys.
        attention_keys: (N, 2) how many of each there are.
    """
    mass, keys = attention_mass.double(), attention_keys.to(attention_mass.device).double()
    density = mass / keys[:, None, :]  # (N, R, 2)
    vgr = density[..., 0] / (density[..., 1] + vgr_epsilon(keys))  # (N, R)
    is_defined = (keys > 0).all(dim=1, keepdim=True) & mass.isfinite().all(dim=2) & (mass.sum(dim=2) > 0)
    return vgr.masked_fill(~is_defined, torch.nan).float()


def attention_metrics_from_mass(
    attention_mass: torch.Tensor, attention_keys: torch.Tensor, response_mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What each sample's response attended to: (N,) float32 by name, means over the response tokens.

    `text_mass`, `vision_mass`: share of the attention to the prompt. `text_density`, `vision_density`: mass per key.
    `text_share`, `vision_share`: mass over that of both modalities. `aei_text`, `aei_vision`: attention efficiency, a
    modality's share of the mass over its share of the keys (AEI of arXiv 2508.10552). `vgr`. Tokens for which a
    figure is undefined are left out of its mean; NaN where it is undefined for all.

    Args:
        attention_mass: (N, R, 2) attention on the text keys and on the vision keys.
        attention_keys: (N, 2) how many of each there are.
        response_mask: (N, R), 1 on response tokens.
    """
    mass, keys = attention_mass.float(), attention_keys.to(attention_mass.device).float()
    share = mass / mass.sum(dim=2, keepdim=True)  # (N, R, 2)
    key_share = keys / keys.sum(dim=1, keepdim=True)  # (N, 2)
    of_tokens = {
        "mass": mass,
        "density": mass / keys[:, None, :],
        "share": share,
        "aei": share / key_share[:, None, :],
    }
    metrics: dict[str, torch.Tensor] = {}
    for name, values in of_tokens.items():
        for modality, of_modality in zip(("text", "vision"), values.unbind(dim=2), strict=True):
            full_name = f"aei_{modality}" if name == "aei" else f"{modality}_{name}"
            metrics[full_name] = _mean_of_defined(of_modality, response_mask)
    metrics["vgr"] = _mean_of_defined(vgr_from_mass(attention_mass, attention_keys), response_mask)
    return metrics


# ---- from the attentions of generate ----


def compute_attention_metrics_for_batch(
    outputs_attentions: Sequence[Sequence[torch.Tensor | None]] | None,
    input_ids: torch.Tensor,
    sequences: torch.Tensor,
    processor: Any,
    last_k_layers: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
) -> dict[str, list[float]]:
    """`attention_metrics_from_mass` of Hugging Face `generate(output_attentions=True)`: a list of N floats by name.

    Args:
        outputs_attentions: as `mass_from_attentions` takes them. Layers that attend through a window, as Gemma 3's
            sliding ones, have to be None or left out. None or empty gives an empty dict.
        input_ids: (N, P) prompts, left-padded.
        sequences: (N, P + R) what `generate` returned.
        processor: of a Qwen-VL model, or any that names its `image_token_id`.
        last_k_layers: as in `mass_from_attentions`, which see for what is raised.
        eos_token_id: as in `classify_generated`.
    """
    if not outputs_attentions:
        return {}
    key_kinds, response_mask = classify_generated(input_ids, sequences, processor, eos_token_id=eos_token_id)
    mass = mass_from_attentions(outputs_attentions, key_kinds, response_mask.shape[1], last_k_layers)
    metrics = attention_metrics_from_mass(mass, count_keys(key_kinds), response_mask)
    return {name: values.tolist() for name, values in metrics.items()}


def classify_generated(
    input_ids: torch.Tensor,
    sequences: torch.Tensor,
    processor: Any,
    exclude_special: bool = True,
    eos_token_id: int | Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Kinds (N, S) int8 and response mask (N, R) int64 of what Hugging Face `generate` returned, on the CPU.

    Padding is the run of pad tokens that a prompt begins with. A response ends with its first end-of-sequence token,
    or before the run of pad tokens that its row ends with. Vision keys are those inside Qwen's vision spans, and those
    with the processor's `image_token_id` or `video_token_id` if it has them.

    Args:
        input_ids: (N, P). sequences: (N, P + R), beginning with `input_ids`.
        exclude_special: False counts special tokens of the prompt, other than placeholders, as text.
        eos_token_id: what `generate` stopped at, `model.generation_config.eos_token_id`: Qwen's has two, of which one
            is the padding. None takes the tokenizer's only one.

    Raises:
        ValueError: `sequences` do not begin with `input_ids`.
    """
    input_ids, sequences = input_ids.cpu(), sequences.cpu()
    prompt_length = input_ids.shape[1]
    if not torch.equal(sequences[:, :prompt_length], input_ids):
        raise ValueError(
            f"sequences {tuple(sequences.shape)} do not begin with input_ids {tuple(input_ids.shape)}, row by row; "
            "give the whole of what generate returned, and with num_return_sequences=n each prompt n times"
        )
    special = _special_ids(processor)
    pad = special.get("pad", -1)
    prompt_mask = 1 - (input_ids == pad).long().cumprod(dim=1)  # (N, P)
    eos = special.get("eos", ()) if eos_token_id is None else eos_token_id
    eos_token_ids = [eos] if isinstance(eos, int) else eos
    response_mask = _generated_mask(sequences[:, prompt_length:], eos_token_ids, pad)  # (N, R)
    is_vision = _is_any(sequences, vision_token_ids(processor))  # (N, S)
    for row, ids in enumerate(input_ids):
        for start, end in extract_vision_token_spans_qwen(processor, ids):
            is_vision[row, start + 1 : end - 1] = True
    never_text = special.values() if exclude_special else [special[name] for name in PLACEHOLDERS & special.keys()]
    key_kinds = _kinds(
        sequences,
        torch.cat([prompt_mask, response_mask], dim=1),
        response_mask.shape[1],
        is_vision,
        never_text,
        _turn_marks(special),
        get_system_role_ids(processor),
    )
    return key_kinds, response_mask


def mass_from_attentions(
    outputs_attentions: Sequence[Sequence[torch.Tensor | None]],
    key_kinds: torch.Tensor,
    response_length: int,
    last_k_layers: int | None = None,
) -> torch.Tensor:
    """Attention of each response token on text and vision keys, from the maps of Hugging Face `generate`.

    Per layer: the mean over heads, divided by its sum over the prompt keys without the sink; then the mean over
    layers. Step s predicts response token s: its query is the last one of the step, of the whole prompt at step 0.

    Args:
        outputs_attentions: steps x layers x (N, H, queries, keys). Layers may be None; those of the first step decide.
            Those that attend through a window have to be None, or left out, and then `last_k_layers` does not count
            them: training measures full attention alone. A window is noticed only where it makes maps narrower.
        key_kinds: (N, S) of left-padded prompts and right-padded responses.
        response_length: R.
        last_k_layers: use this many of the last layers. None, or more than there are, uses each one that is there.

    Returns:
        (N, R, 2) float32 on the CPU, zero where there is no response token.

    Raises:
        ValueError: one of the chosen layers is None, none is there, a response has more tokens than there are steps,
            or a layer's map is narrower than the sequence.
    """
    kinds = key_kinds.cpu()
    prompt_length = response_columns(kinds.shape[1], response_length).start
    is_response = kinds[:, prompt_length:] == KeyKind.RESPONSE  # (N, R)
    num_steps = int((is_response * torch.arange(1, response_length + 1)).amax()) if response_length else 0
    if num_steps > len(outputs_attentions):
        raise ValueError(
            f"outputs_attentions has {len(outputs_attentions)} steps for responses of up to {num_steps} tokens; it "
            "needs one for every new token, as generate(output_attentions=True) returns them"
        )
    layers = _chosen_layers(outputs_attentions[0], last_k_layers) if num_steps else []
    prompt_kinds = kinds[:, :prompt_length]
    members = [
        torch.isin(prompt_kinds, torch.tensor(of_sum, dtype=torch.int8)).float()
        for of_sum in ([KeyKind.TEXT], [KeyKind.VISION], [KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT])
    ]  # each (N, P)
    mass = torch.zeros(len(kinds), response_length, 2)
    for step, by_layer in enumerate(outputs_attentions[:num_steps]):
        for layer in layers:
            heads_mean = _attention_to_prompt(by_layer[layer], step, layer, prompt_length)  # (N, P)
            text, vision, prompt = ((heads_mean * member).sum(dim=1) for member in members)  # each (N,)
            normaliser = prompt.clamp(min=torch.finfo(torch.float32).tiny)
            mass[:, step] += torch.stack([text, vision], dim=1) / normaliser[:, None] / len(layers)
    return mass.masked_fill(~is_response[..., None], 0)


def _chosen_layers(by_layer: Sequence[torch.Tensor | None], last_k_layers: int | None) -> list[int]:
    if last_k_layers is not None and last_k_layers < 1:
        raise ValueError(f"last_k_layers={last_k_layers} is no number of layers; give 1 or more, or None for all")
    present = [layer for layer, attention in enumerate(by_layer) if attention is not None]
    if last_k_layers is None or last_k_layers > len(by_layer):
        chosen = present
    else:
        chosen = list(range(len(by_layer)))[-last_k_layers:]
    missing = sorted(set(chosen) - set(present))
    if missing or not chosen:
        raise ValueError(
            f"outputs_attentions has layers {present} of {len(by_layer)}, but last_k_layers={last_k_layers} needs "
            f"{missing or 'at least one'}; keep the attentions of those layers or lower last_k_layers"
        )
    return chosen


def _attention_to_prompt(attention: torch.Tensor | None, step: int, layer: int, prompt_length: int) -> torch.Tensor:
    """(N, P) float32 on the CPU: the mean over heads of what the step's last query gives each prompt column."""
    if attention is None:
        raise ValueError(f"outputs_attentions has layer {layer} at the first step, but not at step {step}")
    if attention.shape[-1] < prompt_length + step:
        raise ValueError(
            f"layer {layer} sees {attention.shape[-1]} keys at step {step}, not the {prompt_length + step} before it: "
            "it attends through a sliding window; give None in the place of such layers"
        )
    return attention[:, :, -1, :prompt_length].float().mean(dim=1).cpu()


def _generated_mask(responses: torch.Tensor, eos_token_ids: Sequence[int], pad: int) -> torch.Tensor:
    """(N, R) int64: 1 up to and including the first end of sequence, 0 on the run of `pad` at the end; -1 is none."""
    is_eos = _is_any(responses, eos_token_ids).long()
    ended_before = is_eos.cumsum(dim=1) - is_eos > 0
    is_trailing_pad = (responses == pad).flip(1).long().cumprod(dim=1).flip(1).bool() & (is_eos == 0)
    return (~(ended_before | is_trailing_pad)).long()


# ---- parts ----


def _kinds(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_length: int,
    is_vision: torch.Tensor,
    special_ids: Iterable[int],
    turn_marks: TurnMarks | None,
    system_role_ids: Sequence[int] | None,
) -> torch.Tensor:
    """(N, S) int8; later lines overrule earlier ones."""
    is_real = attention_mask.bool()
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    in_prompt = is_real & (columns < response_columns(input_ids.shape[1], response_length).start)  # (N, S)
    is_first = columns == is_real.int().argmax(dim=1, keepdim=True)  # (N, S)
    kinds = torch.full(input_ids.shape, KeyKind.TEXT, dtype=torch.int8, device=input_ids.device)
    kinds[_is_any(input_ids, special_ids)] = KeyKind.PROMPT
    kinds[_system_turn(input_ids, in_prompt, turn_marks, system_role_ids)] = KeyKind.PROMPT
    kinds[is_vision] = KeyKind.VISION
    kinds[is_first] = KeyKind.SINK
    kinds[~in_prompt] = KeyKind.RESPONSE
    kinds[~is_real] = KeyKind.PADDING
    return kinds


def _system_turn(
    input_ids: torch.Tensor,
    in_prompt: torch.Tensor,
    turn_marks: TurnMarks | None,
    system_role_ids: Sequence[int] | None,
) -> torch.Tensor:
    """(N, S) bool: the first turn, from its mark to the one that ends it, in rows where its role is `system`."""
    if turn_marks is None:
        return torch.zeros_like(in_prompt)
    if turn_marks.is_system:
        system_role_ids = (turn_marks.begin,)
    elif system_role_ids is None:
        _warn_that_system_turns_count_as_text()
    if not system_role_ids:
        return torch.zeros_like(in_prompt)
    begins, ends = ((input_ids == mark) & in_prompt for mark in (turn_marks.begin, turn_marks.end))  # (N, S)
    first = begins.int().argmax(dim=1, keepdim=True)  # (N, 1)
    role = torch.tensor(system_role_ids, device=input_ids.device)
    role_begins = first if turn_marks.is_system else first + 1
    role_columns = role_begins + torch.arange(len(role), device=input_ids.device)
    role_columns = role_columns.clamp(max=input_ids.shape[1] - 1)
    is_system = begins.any(dim=1) & (input_ids.gather(1, role_columns) == role).all(dim=1)  # (N,)
    is_after_begin = torch.arange(input_ids.shape[1], device=input_ids.device) >= first  # (N, S)
    ends = (ends & is_after_begin).int()
    is_over = ends.cumsum(dim=1) - ends > 0
    return is_after_begin & ~is_over & in_prompt & is_system[:, None]


@cache
def _warn_that_system_turns_count_as_text() -> None:
    logger.warning(
        "turns are marked, but system_role_ids are not given, so a system turn counts as "
        "instruction text; give get_system_role_ids(processor)"
    )


@dataclass(frozen=True)
class TurnMarks:
    """Ids of the tokens of one of `TURN_MARKS`."""

    begin: int
    end: int
    is_system: bool


def _turn_marks(special_token_ids: Mapping[str, int] | Iterable[int]) -> TurnMarks | None:
    if not isinstance(special_token_ids, Mapping):
        return None
    for begin, end, is_system in TURN_MARKS:
        if {begin, end} <= set(special_token_ids):
            return TurnMarks(special_token_ids[begin], special_token_ids[end], is_system)
    return None


def _ids_of(special_token_ids: Mapping[str, int] | Iterable[int]) -> Iterable[int]:
    return special_token_ids.values() if isinstance(special_token_ids, Mapping) else special_token_ids


def _is_any(input_ids: torch.Tensor, token_ids: Iterable[int]) -> torch.Tensor:
    return torch.isin(input_ids, torch.tensor(list(token_ids), dtype=input_ids.dtype, device=input_ids.device))


def _mean_of_defined(values: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(N,) mean of (N, R) values over the response tokens where they are finite; NaN where there is none."""
    is_defined = response_mask.bool() & values.isfinite()
    return torch.where(is_defined, values, 0).sum(dim=1) / is_defined.sum(dim=1)


def _tokenizer_of(processor: Any) -> Any:
    return getattr(processor, "tokenizer", processor)


def _special_ids(processor: Any) -> dict[str, int]:
    """Every special token of the tokenizer, by its text; Qwen's also by the names that mark turns."""
    tokenizer = _tokenizer_of(processor)
    # Some tokenizers give ids alone: they are special under any name, and only Qwen's turns can be known.
    return ids_of_special_tokens(tokenizer) | get_qwen_special_token_ids(tokenizer)


def _known_id(tokenizer: Any, token: str) -> int | None:
    token_id = tokenizer.convert_tokens_to_ids(token)
    return None if token_id is None or token_id == getattr(tokenizer, "unk_token_id", None) else token_id
