# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_attention_metrics.py
"""Which keys are text and which are images, wherever they stand, and what the attention on them comes to."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoProcessor

from tests.tokenizer_layouts import DEEPSEEK, GEMMA_3, LLAMA_3, PHI_3, QWEN3
from verl.utils import attention_metrics
from verl.utils.attention_metrics import (
    KeyKind,
    KeyVocabulary,
    attention_metrics_from_mass,
    build_modality_masks,
    classify_generated,
    classify_keys,
    compute_attention_metrics_for_batch,
    count_keys,
    extract_vision_token_spans_qwen,
    get_qwen_special_token_ids,
    get_system_role_ids,
    mass_from_attentions,
    vgr_epsilon,
    vgr_from_mass,
    vision_token_ids,
)
from verl.utils.attention_token_weights import build_token_vgr_weights_for_batch

# One character a token: brackets and placeholders are Qwen's, S and U are the roles, other letters are words.
TOKENS = {
    ".": "<|endoftext|>",
    "(": "<|im_start|>",
    ")": "<|im_end|>",
    "[": "<|vision_start|>",
    "]": "<|vision_end|>",
    "i": "<|image_pad|>",
    "v": "<|video_pad|>",
    "S": "system",
    "U": "user",
    **{letter: letter for letter in "abcdefgh"},
}
IDS = {character: 100 + index for index, character in enumerate(TOKENS)}
VOCABULARY = {token: IDS[character] for character, token in TOKENS.items()}
VISION_IDS = (IDS["i"], IDS["v"])

# PADDING, SINK, TEXT, VISION, PROMPT, RESPONSE
KIND_LETTERS = ".*tipr"


def stub_processor(vocabulary: dict[str, int] = VOCABULARY, **attributes: int | None) -> SimpleNamespace:
    """The least that is asked of a processor: end of sequence `)`, padding `.`, and a look-up of tokens."""
    ids = dict(bos_token_id=None, eos_token_id=IDS[")"], pad_token_id=IDS["."]) | attributes
    return SimpleNamespace(tokenizer=SimpleNamespace(convert_tokens_to_ids=vocabulary.get, **ids))


SPECIAL_IDS = get_qwen_special_token_ids(stub_processor())
SYSTEM_IDS = (IDS["S"],)


def ids_of(*rows: str) -> torch.Tensor:
    return torch.tensor([[IDS[character] for character in row] for row in rows])


def letters_of(key_kinds: torch.Tensor) -> list[str]:
    return ["".join(KIND_LETTERS[kind] for kind in row) for row in key_kinds.tolist()]


PROMPTS = {
    "a system turn, an image, a question": ("(Sab)(U[iii]cd)(e", "*pppppt" + "piiip" + "ttppt"),
    "a first user turn": ("(U[ii]cd)(e", "*tpiipttppt"),
    "a system turn that is not the first": ("(Ua)(Sb)(e", "*ttpp" + "ttppt"),
    "the word system within a user turn": ("(USa)(e", "*tttppt"),
    "a word before the system turn": ("a(Sb)(Ud", "*ppppptt"),
    "a system turn without an end": ("(Sab", "*ppp"),
    "the end of a turn before the system turn": ("a)(Sb)(U", "*ppppppt"),
    "the word system without a turn": ("aSb", "*tt"),
    "a system turn with an image": ("(S[i]a)(Ub", "*ppippp" + "ptt"),
    "two images and a video": ("(U[ii]a[v]b[i])", "*tpiiptpiptpipp"),
    "no image": ("(Uabc)(d", "*ttttppt"),
    "no text": ("([ii])(", "*piippp"),
    "the image first, its start cut off": ("ii](Ua", "*ipptt"),
    "an image whose end is cut off": ("(Ua[ii", "*ttpii"),
    "a word first": ("ab[i]", "*tpip"),
    "a sink alone": ("(", "*"),
    "no prompt": ("", ""),
}


@pytest.mark.parametrize("response", ["", "f", "fi)g"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("side", ["left", "right"])
def test_kinds_by_hand_whichever_side_is_padded(side, padding, response):
    """All prompts in one batch. Placeholders, specials and turns of a response are response."""
    width = padding + max(len(prompt) for prompt, _ in PROMPTS.values())
    filled = (lambda row: row.rjust(width, ".")) if side == "left" else (lambda row: row.ljust(width, "."))
    rows = [filled(prompt) + response for prompt, _ in PROMPTS.values()]
    expected = [filled(kinds) + "r" * len(response) for _, kinds in PROMPTS.values()]
    input_ids = ids_of(*rows)
    attention_mask = torch.tensor([[letter != "." for letter in kinds] for kinds in expected]).long()

    key_kinds = classify_keys(input_ids, attention_mask, len(response), VISION_IDS, SPECIAL_IDS, SYSTEM_IDS)

    assert key_kinds.dtype == torch.int8
    assert dict(zip(PROMPTS, letters_of(key_kinds), strict=True)) == dict(zip(PROMPTS, expected, strict=True))


def test_the_padding_of_a_response_is_padding_though_its_prompt_is_full():
    kinds = classify_keys(ids_of("(Uafg.."), torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), 4, VISION_IDS, SPECIAL_IDS)
    assert letters_of(kinds) == ["*ttrr.."]


def test_a_padding_id_in_the_middle_of_a_prompt_is_told_by_the_mask_alone():
    kinds = classify_keys(ids_of("..(U.a"), torch.tensor([[0, 0, 1, 1, 1, 1]]), 0, VISION_IDS, SPECIAL_IDS)
    assert letters_of(kinds) == ["..*tpt"]


def test_a_turn_under_the_padding_is_no_turn():
    kinds = classify_keys(ids_of("(S(Ua"), torch.tensor([[0, 0, 1, 1, 1]]), 0, VISION_IDS, SPECIAL_IDS, SYSTEM_IDS)
    assert letters_of(kinds) == ["..*tt"]


@pytest.mark.parametrize(
    ("begin", "end", "prompt", "role", "kinds"),
    [
        ("<|start_header_id|>", "<|eot_id|>", "a(Sbc)(Ub", True, "*ppppp" + "ptt"),
        ("<|start_header_id|>", "<|eot_id|>", "a(Ubc)(Sb", True, "*ptttp" + "ptt"),
        ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "a(bc)d", False, "*pppp" + "t"),
        ("<|system|>", "<|user|>", "a(bc)d", False, "*pppp" + "t"),
        ("<|system|>", "<|user|>", "ab)cd", False, "*tptt"),
    ],
)
def test_the_system_turn_of_other_templates_is_known_by_its_marks(begin, end, prompt, role, kinds):
    """Where the mark itself says that it is a system turn, no word has to follow, whatever role ids are given."""
    input_ids = ids_of(prompt)
    special = {begin: IDS["("], end: IDS[")"]}
    role_ids = SYSTEM_IDS if role else ()
    found = classify_keys(input_ids, torch.ones_like(input_ids), 0, VISION_IDS, special, role_ids)
    assert letters_of(found) == [kinds]


def test_a_role_may_be_several_tokens_of_which_all_must_agree():
    rows = ids_of("(abc)(d", "(acb)(d")
    kinds = classify_keys(rows, torch.ones_like(rows), 0, VISION_IDS, SPECIAL_IDS, (IDS["a"], IDS["b"]))
    assert letters_of(kinds) == ["*ppppp" + "t", "*tttpp" + "t"]


def test_a_role_cut_off_by_the_end_of_the_sequence_is_no_role():
    kinds = classify_keys(ids_of("a(", "ab"), torch.ones(2, 2), 0, VISION_IDS, SPECIAL_IDS, (IDS["a"], IDS["b"]))
    assert letters_of(kinds) == ["*p", "*t"]


def test_without_names_or_without_a_role_no_turn_is_known():
    input_ids = ids_of("(Sab)(U[i]c")
    mask = torch.ones_like(input_ids)
    unnamed = classify_keys(input_ids, mask, 0, VISION_IDS, iter(SPECIAL_IDS.values()), SYSTEM_IDS)
    without_role = classify_keys(input_ids, mask, 0, VISION_IDS, SPECIAL_IDS, ())
    assert letters_of(unnamed) == letters_of(without_role) == ["*tttpp" + "tpipt"]


def test_whoever_gives_no_role_is_told_once_that_a_system_turn_counts_as_text(caplog):
    """Not where no turn is known, or where it was said that none is a system turn."""
    attention_metrics._warn_that_system_turns_count_as_text.cache_clear()
    prompt = ids_of("(Sab)(U[i]c")
    mask = torch.ones_like(prompt)
    classify_keys(prompt, mask, 0, VISION_IDS, list(SPECIAL_IDS.values()))
    classify_keys(prompt, mask, 0, VISION_IDS, SPECIAL_IDS, ())
    build_modality_masks(prompt[0], [], SPECIAL_IDS, SYSTEM_IDS)
    assert caplog.messages == []

    five_arguments = classify_keys(prompt, mask, 0, VISION_IDS, SPECIAL_IDS)
    instruction_mask, _ = build_modality_masks(prompt[0], [(7, 10)], SPECIAL_IDS)
    assert letters_of(five_arguments) == ["*tttpp" + "tpipt"]
    assert instruction_mask[1:].tolist() == [letter == "t" for letter in "tttpp" + "tpipt"]
    (message,) = caplog.messages
    assert "system_role_ids are not given" in message and "get_system_role_ids(processor)" in message


def test_keys_are_counted_by_hand():
    """Text is U c d and, in the second row, U a b; the last two tokens are response."""
    input_ids = ids_of("(Sab)(U[iii]cd)ef", "(U[ii]a[v]b[i])ef", "(Uabcabcabcabcaef")
    mask = torch.ones_like(input_ids)
    keys = count_keys(classify_keys(input_ids, mask, 2, VISION_IDS, SPECIAL_IDS, SYSTEM_IDS))
    assert keys.dtype == torch.int64
    assert keys.tolist() == [[3, 3], [3, 4], [14, 0]]


@pytest.mark.parametrize("name", [name for name in PROMPTS if "cut off" not in name and name != "no prompt"])
def test_masks_of_a_prompt_are_its_kinds_but_for_the_sink(name):
    prompt, kinds = PROMPTS[name]
    input_ids = torch.tensor([IDS[character] for character in prompt], dtype=torch.int64)
    spans = extract_vision_token_spans_qwen(stub_processor(), input_ids)
    masks = build_modality_masks(input_ids, spans, SPECIAL_IDS, SYSTEM_IDS)
    for mask, letter in zip(masks, "ti", strict=True):
        assert mask.dtype == torch.bool
        assert mask[1:].tolist() == [kind == letter for kind in kinds[1:]]


# ---- ids and spans ----


def test_special_ids_are_those_that_the_tokenizer_has():
    assert get_qwen_special_token_ids(stub_processor()) == {
        "eos": IDS[")"],
        "pad": IDS["."],
        "im_start": IDS["("],
        "im_end": IDS[")"],
        "vision_start": IDS["["],
        "vision_end": IDS["]"],
        "image_pad": IDS["i"],
        "video_pad": IDS["v"],
    }
    assert get_qwen_special_token_ids(stub_processor({}, bos_token_id=0)) == {
        "bos": 0,
        "eos": IDS[")"],
        "pad": IDS["."],
    }


def test_a_token_that_becomes_the_unknown_one_is_not_there():
    processor = stub_processor(unk_token_id=7)
    processor.tokenizer.convert_tokens_to_ids = lambda token: 5 if token == "<|im_start|>" else 7
    assert get_qwen_special_token_ids(processor) == {"eos": IDS[")"], "pad": IDS["."], "im_start": 5}
    assert get_system_role_ids(processor) == ()


def test_the_role_is_one_known_token_or_what_the_tokenizer_makes_of_the_word():
    assert get_system_role_ids(stub_processor()) == SYSTEM_IDS
    processor = stub_processor({})
    assert get_system_role_ids(processor) == ()
    processor.tokenizer.encode = lambda text, add_special_tokens: [1] * add_special_tokens + [len(text), 9]
    assert get_system_role_ids(processor) == (6, 9)


def test_vision_ids_are_found_under_new_and_old_names():
    assert vision_token_ids(SimpleNamespace(image_token_id=5, video_token_id=6)) == (5, 6)
    assert vision_token_ids(SimpleNamespace(image_token_index=5, video_token_index=0)) == (5, 0)
    assert vision_token_ids(SimpleNamespace(image_token_id=5, image_token_index=5, video_token_id=None)) == (5,)
    assert vision_token_ids(SimpleNamespace(image_token_id=-1)) == ()
    assert vision_token_ids(SimpleNamespace()) == ()


def test_spans_run_from_the_start_token_to_one_past_the_end_token(caplog):
    prompt = "(U[ii]a[v]b[])"
    spans = extract_vision_token_spans_qwen(stub_processor(), ids_of(prompt)[0])
    assert [prompt[start:end] for start, end in spans] == ["[ii]", "[v]", "[]"]
    assert extract_vision_token_spans_qwen(stub_processor(), ids_of(prompt)[0].tolist()) == spans
    assert extract_vision_token_spans_qwen(stub_processor({}), ids_of(prompt)[0]) == []
    assert caplog.messages == []


@pytest.mark.parametrize(
    "prompt, whole, cut",
    [
        ("ii]a[i]", ["[i]"], [2]),
        ("(U[i]a[ii", ["[i]"], [6]),
        ("i][i]a[", ["[i]"], [1, 6]),
        ("[i[ii]", ["[ii]"], [0]),
        ("[i]]", ["[i]"], [3]),
    ],
)
def test_a_span_that_lost_an_end_is_left_out_and_reported(prompt, whole, cut, caplog):
    spans = extract_vision_token_spans_qwen(stub_processor(), ids_of(prompt)[0])
    assert [prompt[start:end] for start, end in spans] == whole
    (message,) = caplog.messages
    assert "truncation" in message
    assert message.endswith(f"tokens {cut}")


@pytest.fixture(scope="module")
def processor(tiny_model_path: str):
    return AutoProcessor.from_pretrained(tiny_model_path)


def test_a_real_chats_text_is_the_users_words_and_what_follows(processor, tiny_model_path):
    """The role names and the line breaks are words too; the system turn and all that Qwen puts around it are not."""
    turns = [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    prompt = prompt.replace("<|image_pad|>", "<|vision_pad|>" + 3 * "<|image_pad|>")
    input_ids = processor.tokenizer(prompt, return_tensors="pt")["input_ids"]
    config = AutoConfig.from_pretrained(tiny_model_path)

    vocabulary = KeyVocabulary.of(config, processor)
    kinds = vocabulary.classify(input_ids, torch.ones_like(input_ids), 0)

    assert processor.tokenizer.decode(input_ids[kinds == KeyKind.TEXT]) == (
        "\nuser\nWhat is in the picture?\nassistant\n"
    )
    assert processor.tokenizer.decode(input_ids[kinds == KeyKind.VISION]) == 3 * "<|image_pad|>"
    assert KeyVocabulary.of(config, processor.tokenizer) == vocabulary


@pytest.mark.parametrize(
    ("layout", "question", "text"),
    [
        (LLAMA_3, "What is it?", "user\n\nWhat is it?assistant\n\n"),
        (PHI_3, "What is it?", "\nWhat is it?\n\n"),
        (QWEN3, "What is <|box_start|>it<|box_end|>?", "\nuser\nWhat is it?\nassistant\n<think>\n"),
        (GEMMA_3, "What is <unused0>it?", "system\nBe brief.\nuser\nWhat is <unused0>it?\nmodel\n"),
    ],
    ids=["Llama 3", "Phi 3", "Qwen3", "Gemma 3"],
)
def test_tokens_added_as_special_are_no_text_and_mark_the_system_turn(layout, question, text):
    """The tokenizer names few of them. Tokens that are added without being special stay text, and so does the system
    turn of a template whose marks say no role."""
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    tokenizer = layout.build()
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    input_ids, mask = encoded["input_ids"], encoded["attention_mask"]
    kinds = KeyVocabulary.of(SimpleNamespace(), tokenizer).classify(input_ids, mask, 0)
    assert tokenizer.decode(input_ids[kinds == KeyKind.TEXT]) == text
    in_notebook, _ = classify_generated(input_ids, input_ids, SimpleNamespace(tokenizer=tokenizer))
    assert torch.equal(in_notebook, kinds)


def test_marks_that_are_added_but_not_special_stay_text():
    tokenizer = DEEPSEEK.build()
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=False)
    input_ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    kinds = KeyVocabulary.of(SimpleNamespace(), tokenizer).classify(input_ids, torch.ones_like(input_ids), 0)
    assert letters_of(kinds) == ["*" + "t" * len("UWhat?")]


def test_a_placeholder_that_is_added_as_special_is_vision():
    tokenizer = QWEN3.build()
    input_ids = tokenizer("a<|box_start|><|box_end|>b", return_tensors="pt")["input_ids"]
    config = SimpleNamespace(image_token_id=tokenizer.convert_tokens_to_ids("<|box_end|>"))
    kinds = KeyVocabulary.of(config, tokenizer).classify(input_ids, torch.ones_like(input_ids), 0)
    assert letters_of(kinds) == ["*pit"]


# ---- what generate returned ----


@pytest.mark.parametrize(
    "response, mask",
    [
        ("fgh", "111"),
        ("fg)", "111"),
        ("f).", "110"),
        (").f", "100"),
        ("f)g", "110"),
        ("f))", "110"),
        ("f..", "100"),
        ("f.g", "111"),
        ("...", "000"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("prompt, kinds", [("..(Ua", "..*tt"), ("(U.a)", "*tptp")])
def test_a_response_ends_with_its_first_end_token_or_before_its_last_padding(prompt, kinds, response, mask):
    sequences = ids_of(prompt + response)
    key_kinds, response_mask = classify_generated(ids_of(prompt), sequences, stub_processor())
    assert response_mask.tolist() == [[int(digit) for digit in mask]]
    assert letters_of(key_kinds) == [kinds + mask.replace("1", "r").replace("0", ".")]


def test_with_one_id_for_padding_and_end_only_the_leading_run_is_padding():
    """`)` is both. It ends the first turn, and the response whose last tokens it pads."""
    processor = stub_processor(pad_token_id=IDS[")"])
    key_kinds, response_mask = classify_generated(ids_of("))(Ua)"), ids_of("))(Ua)fg)))"), processor)
    assert letters_of(key_kinds) == ["..*ttprrr.."]
    assert response_mask.tolist() == [[1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    "response, mask",
    [("f.", "11"), ("f..", "110"), ("f)..", "1100"), ("f.)", "110"), ("f)g", "110"), ("...", "100"), ("fg", "11")],
)
def test_of_several_end_tokens_the_first_ends_a_response_also_where_it_is_the_padding(response, mask):
    """As Qwen's are: a response may end with `)` or with `.`, which pads as well. The tokenizer alone knows `)`."""
    prompt = ids_of("(Ua")
    sequences = ids_of("(Ua" + response)
    both = [IDS[")"], IDS["."]]
    _, response_mask = classify_generated(prompt, sequences, stub_processor(), eos_token_id=both)
    assert response_mask.tolist() == [[int(digit) for digit in mask]]
    _, by_number = classify_generated(prompt, sequences, stub_processor(), eos_token_id=IDS[")"])
    _, by_tokenizer = classify_generated(prompt, sequences, stub_processor())
    assert torch.equal(by_number, by_tokenizer)


def test_end_tokens_are_handed_on_to_what_measures_and_what_weighs():
    """Both tokens of the hand-made maps belong to a response that the padding token ends."""
    processor = stub_processor({"<|im_start|>": IDS["("], "<|im_end|>": IDS[")"]})
    processor.image_token_id = IDS["i"]
    arguments = (maps_of_two_steps(), ids_of(".(ai("), ids_of(".(ai(f."), processor)
    both = [IDS[")"], IDS["."]]
    assert compute_attention_metrics_for_batch(*arguments)["text_mass"] == pytest.approx([0.375])
    assert compute_attention_metrics_for_batch(*arguments, eos_token_id=both)["text_mass"] == pytest.approx([0.2375])
    assert [len(weights) for weights in build_token_vgr_weights_for_batch(*arguments)[0]] == [1]
    assert [len(weights) for weights in build_token_vgr_weights_for_batch(*arguments, eos_token_id=both)[0]] == [2]


def test_a_tokenizer_without_padding_pads_nothing():
    key_kinds, _ = classify_generated(ids_of(".Ua"), ids_of(".Uaf"), stub_processor(pad_token_id=None))
    assert letters_of(key_kinds) == ["*ttr"]


def test_special_tokens_may_count_as_text_but_placeholders_and_the_system_turn_do_not():
    prompt, processor = ids_of("(Sab)(U[iii]c)ii"), stub_processor()
    kinds = [classify_generated(prompt, prompt, processor, exclude_special)[0] for exclude_special in (True, False)]
    assert letters_of(torch.cat(kinds)) == ["*ppppptpiiiptppp", "*pppptttiiitttpp"]


def test_where_there_are_no_spans_the_processor_names_the_placeholders():
    """InternVL, Gemma and others have words of their own for images."""
    processor = stub_processor({})
    processor.image_token_id = IDS["g"]
    prompt = ids_of("ag[gb")
    assert letters_of(classify_generated(prompt, prompt, processor)[0]) == ["*itit"]


def test_kinds_of_a_real_batch_are_those_of_training(processor, tiny_model_path):
    """All special tokens that the tokenizer declares count as such, not only the ones in Qwen's chats."""
    text = "<|im_start|>system\nA<|im_end|>\n<|vision_pad|>b<|vision_start|><|image_pad|><|vision_end|>"
    input_ids = processor.tokenizer([text, "What?"], padding=True, return_tensors="pt")["input_ids"]
    key_kinds, _ = classify_generated(input_ids, input_ids, processor)
    attention_mask = (input_ids != processor.tokenizer.pad_token_id).long()
    vocabulary = KeyVocabulary.of(AutoConfig.from_pretrained(tiny_model_path), processor)
    assert torch.equal(key_kinds, vocabulary.classify(input_ids, attention_mask, 0))
    assert set(key_kinds[0].tolist()) == {KeyKind.SINK, KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT}


@pytest.mark.parametrize("sequences", [("(Ub", "(Uc"), ("(Uaf", "(Uaf", "(Ubf", "(Ubf"), ("fg", "fg")])
def test_sequences_of_other_prompts_are_an_error(sequences):
    with pytest.raises(ValueError, match="do not begin with input_ids.*num_return_sequences"):
        classify_generated(ids_of("(Ua", "(Ub"), ids_of(*sequences), stub_processor())


# ---- masses ----

PROMPT_KINDS = [KeyKind.PADDING, KeyKind.SINK, KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT]
TWO_TOKENS = torch.tensor([[*PROMPT_KINDS, KeyKind.RESPONSE, KeyKind.RESPONSE]], dtype=torch.int8)


def maps_of_two_steps() -> list[list[torch.Tensor]]:
    """Two layers of two heads for `TWO_TOKENS`; of the first step only the last query's row is a number."""
    first = [
        [[0.0, 0.5, 0.2, 0.2, 0.1], [0.0, 0.3, 0.4, 0.1, 0.2]],
        [[0.0, 0.2, 0.2, 0.4, 0.2], [0.0, 0.2, 0.2, 0.4, 0.2]],
    ]
    second = [
        [[0.0, 0.4, 0.1, 0.3, 0.1, 0.1], [0.0, 0.4, 0.1, 0.3, 0.1, 0.1]],
        [[0.0, 0.5, 0.0, 0.0, 0.0, 0.5], [0.0, 0.5, 0.0, 0.0, 0.0, 0.5]],
    ]
    prefill = [torch.full((1, 2, 5, 5), torch.nan) for _ in first]
    for attention, rows in zip(prefill, first, strict=True):
        attention[0, :, -1] = torch.tensor(rows)
    return [prefill, [torch.tensor(rows)[None, :, None] for rows in second]]


def test_masses_by_hand():
    """First token, layer 0: means over heads are sink 0.4, text 0.3, vision 0.15, other 0.15. Without the sink 0.6 is
    left: 0.5 for text and 0.25 for vision. Layer 1: 0.2 and 0.4 of 0.8, so 0.25 and 0.5. Mean 0.375 and 0.375.

    Second token: 0.1 and 0.3 of 0.5 in layer 0, so 0.2 and 0.6; nothing at all in layer 1; mean 0.1 and 0.3.
    """
    mass = mass_from_attentions(maps_of_two_steps(), TWO_TOKENS, 2)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(mass, torch.tensor([[[0.375, 0.375], [0.1, 0.3]]]))


@pytest.mark.parametrize(
    "last_k_layers, expected",
    [
        (1, [[0.25, 0.5], [0.0, 0.0]]),
        (2, [[0.375, 0.375], [0.1, 0.3]]),
        (9, [[0.375, 0.375], [0.1, 0.3]]),
    ],
)
def test_the_last_layers_are_taken_or_all_if_there_are_fewer(last_k_layers, expected):
    mass = mass_from_attentions(maps_of_two_steps(), TWO_TOKENS, 2, last_k_layers)
    torch.testing.assert_close(mass, torch.tensor([expected]))


def test_layers_that_were_not_kept_are_left_out_unless_they_are_asked_for():
    maps = [[None, None, *by_layer[1:]] for by_layer in maps_of_two_steps()]
    expected = torch.tensor([[[0.25, 0.5], [0.0, 0.0]]])
    for last_k_layers in (None, 1):
        torch.testing.assert_close(mass_from_attentions(maps, TWO_TOKENS, 2, last_k_layers), expected)
    with pytest.raises(ValueError, match=r"has layers \[2\] of 3, but last_k_layers=2 needs \[1\]"):
        mass_from_attentions(maps, TWO_TOKENS, 2, 2)
    torch.testing.assert_close(mass_from_attentions(maps, TWO_TOKENS, 2, 4), expected)  # more than there are


def test_maps_without_any_layer_are_an_error():
    with pytest.raises(ValueError, match="at least one"):
        mass_from_attentions([[None, None]] * 2, TWO_TOKENS, 2)
    with pytest.raises(ValueError, match="at least one"):
        mass_from_attentions([[], []], TWO_TOKENS, 2)


def test_a_layer_that_is_missing_from_a_later_step_is_an_error():
    maps = maps_of_two_steps()
    maps[1][0] = None
    with pytest.raises(ValueError, match="layer 0 at the first step, but not at step 1"):
        mass_from_attentions(maps, TWO_TOKENS, 2)


@pytest.mark.parametrize("last_k_layers", [0, -1])
def test_no_layers_are_an_error(last_k_layers):
    with pytest.raises(ValueError, match=f"last_k_layers={last_k_layers} is no number of layers"):
        mass_from_attentions(maps_of_two_steps(), TWO_TOKENS, 2, last_k_layers)


def test_fewer_steps_than_tokens_are_an_error():
    with pytest.raises(ValueError, match="has 1 steps for responses of up to 2 tokens"):
        mass_from_attentions(maps_of_two_steps()[:1], TWO_TOKENS, 2)


def test_steps_beyond_the_longest_response_need_not_be_there():
    """A response column that is padding in every row has no query."""
    kinds = TWO_TOKENS.clone()
    kinds[0, -1] = KeyKind.PADDING
    mass = mass_from_attentions(maps_of_two_steps()[:1], kinds, 2)
    torch.testing.assert_close(mass, torch.tensor([[[0.375, 0.375], [0.0, 0.0]]]))
    assert mass_from_attentions([], TWO_TOKENS[:, :5], 0).shape == (1, 0, 2)


def test_a_sliding_window_is_an_error_since_its_columns_are_not_the_prompts():
    """At the second step a layer with a window of five keys sees columns 1 to 5."""
    maps = maps_of_two_steps()
    maps[1][0] = maps[1][0][..., 1:]
    with pytest.raises(ValueError, match="layer 0 sees 5 keys at step 1, not the 6 before it.*sliding window"):
        mass_from_attentions(maps, TWO_TOKENS, 2)


def test_a_finished_row_is_zero_whatever_its_maps_hold():
    kinds = torch.cat([TWO_TOKENS, TWO_TOKENS])
    kinds[1, -1] = KeyKind.PADDING
    maps = [[attention.repeat(2, 1, 1, 1) for attention in by_layer] for by_layer in maps_of_two_steps()]
    for attention in maps[1]:
        attention[1] = torch.nan
    mass = mass_from_attentions(maps, kinds, 2)
    torch.testing.assert_close(mass, torch.tensor([[[0.375, 0.375], [0.1, 0.3]], [[0.375, 0.375], [0.0, 0.0]]]))


def test_maps_of_half_precision_are_summed_in_single():
    """Thousands of keys: a sum in bfloat16, which has eight bits, would stand still at 1/128."""
    kinds = torch.full((1, 4097), KeyKind.TEXT, dtype=torch.int8)
    kinds[0, 0], kinds[0, 2048:4096], kinds[0, 4096] = KeyKind.SINK, KeyKind.VISION, KeyKind.RESPONSE
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 3, 1, 4096, generator=generator).softmax(-1).bfloat16()
    heads = attention[0, :, 0].double().mean(0)
    expected = torch.stack([heads[1:2048].sum(), heads[2048:].sum()]) / heads[1:].sum()
    mass = mass_from_attentions([[attention]], kinds, 1)
    torch.testing.assert_close(mass[0, 0].double(), expected, atol=1e-6, rtol=0)


# ---- from masses to VGR and metrics ----


def test_vgr_by_hand():
    """Two text keys and four vision keys: densities 0.15 and 0.15, 0.2 and 0.05, 0.05 and 0.2. Epsilon is 1e-6 / 6 =
    1.667e-7, so the second VGR is 0.2 / 0.05000017 = 3.9999867. Without vision mass it is 0.5 / 1.667e-7 = 3e6."""
    mass = torch.tensor([[[0.3, 0.6], [0.4, 0.2], [0.1, 0.8], [1.0, 0.0], [0.0, 0.5]]])
    vgr = vgr_from_mass(mass, torch.tensor([[2, 4]]))
    assert vgr.dtype == torch.float32
    expected = torch.tensor([[0.9999989, 3.9999867, 0.2499998, 3e6, 0.0]])
    torch.testing.assert_close(vgr, expected, atol=1e-7, rtol=2e-7)


def test_vgr_is_undefined_without_text_without_images_without_mass_and_without_numbers():
    some = torch.tensor([0.3, 0.6])
    keys = torch.tensor([[2, 4], [0, 4], [2, 0], [2, 4], [2, 4], [2, 4]])
    mass = torch.stack([some, some, some, 0 * some, torch.nan * some, torch.tensor([torch.inf, 0.6])])[:, None]
    assert vgr_from_mass(mass, keys).isnan().flatten().tolist() == [False, True, True, True, True, True]


def test_epsilon_is_a_millionth_of_evenly_spread_attention():
    epsilon = vgr_epsilon(torch.tensor([[2, 4], [0, 16_000], [0, 0]]))
    assert epsilon.dtype == torch.float32
    torch.testing.assert_close(epsilon, torch.tensor([[1e-6 / 6], [6.25e-11], [1e-6]]), rtol=1e-6, atol=0)


def test_epsilon_is_beneath_notice_beside_one_image_token_of_many():
    """0.98 of the attention on a text of 100 tokens, 0.02 on an image of 16,000: VGR is 7840 exactly."""
    vgr = vgr_from_mass(torch.tensor([[[0.98, 0.02]]]), torch.tensor([[100, 16_000]]))
    assert vgr.item() == pytest.approx(7840, rel=1e-4)


def test_metrics_by_hand():
    """Of three tokens the last is padding; keys as above, so that VGRs are 1 and 4.

    Shares of text are 0.3 / 0.9 and 0.4 / 0.6, of text keys 2 / 6: efficiencies 1 and 2, of vision 1 and 0.5.
    """
    mass = torch.tensor([[[0.3, 0.6], [0.4, 0.2], [torch.nan, 0.5]]])
    metrics = attention_metrics_from_mass(mass, torch.tensor([[2, 4]]), torch.tensor([[1, 1, 0]]))
    expected = dict(
        text_mass=0.35,
        vision_mass=0.4,
        text_density=0.175,
        vision_density=0.1,
        text_share=0.5,
        vision_share=0.5,
        aei_text=1.5,
        aei_vision=0.75,
        vgr=2.5,
    )
    assert metrics.keys() == expected.keys()
    assert {name: values.item() for name, values in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_what_is_undefined_is_nan_and_leaves_the_rest_alone():
    """A sample without images, one without a response, and one of whose two tokens the first looks nowhere."""
    mass = torch.tensor([[[0.5, 0.0], [0.7, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.4, 0.2]]])
    keys, mask = torch.tensor([[5, 0], [2, 4], [2, 4]]), torch.tensor([[1, 1], [0, 0], [1, 1]])
    metrics = attention_metrics_from_mass(mass, keys, mask)
    without_images, without_response, half = (
        {name: values[row].item() for name, values in metrics.items()} for row in range(3)
    )
    assert without_images["text_mass"] == pytest.approx(0.6)
    assert without_images["text_share"] == without_images["aei_text"] == 1
    assert {name for name, value in without_images.items() if value != value} == {
        "vision_density",
        "aei_vision",
        "vgr",
    }
    assert all(value != value for value in without_response.values())
    assert half["text_mass"] == pytest.approx(0.2)
    assert half["vgr"] == pytest.approx(4, rel=1e-5)


def test_metrics_of_generate_are_those_of_its_masses():
    """The hand-made maps, for a prompt of the kinds they are made for; the two tokens' masses are 0.375 and 0.375, 0.1
    and 0.3, and there is one key of each kind."""
    processor = stub_processor({"<|im_start|>": IDS["("], "<|im_end|>": IDS[")"]})
    processor.image_token_id = IDS["i"]
    input_ids, sequences = ids_of(".(ai("), ids_of(".(ai(fg")
    assert letters_of(classify_generated(input_ids, sequences, processor)[0]) == [".*tiprr"]

    metrics = compute_attention_metrics_for_batch(maps_of_two_steps(), input_ids, sequences, processor)

    assert metrics["text_mass"] == metrics["text_density"] == pytest.approx([0.2375])
    assert metrics["vision_mass"] == metrics["vision_density"] == pytest.approx([0.3375])
    assert metrics["text_share"] == pytest.approx([(0.5 + 0.25) / 2])
    assert metrics["aei_vision"] == pytest.approx([(0.5 + 0.75) / 2 / 0.5])
    assert metrics["vgr"] == pytest.approx([(1 + 1 / 3) / 2], rel=1e-5)
    last_layer = compute_attention_metrics_for_batch(maps_of_two_steps(), input_ids, sequences, processor, 1)
    assert last_layer["vgr"] == pytest.approx([0.5], rel=1e-5)
    assert compute_attention_metrics_for_batch(None, input_ids, sequences, processor) == {}
    assert compute_attention_metrics_for_batch((), input_ids, sequences, processor) == {}
