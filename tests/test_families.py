# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_families.py
"""Every model family trains: one whole step of a mixed batch, from rows on disk to moved weights, with VGR on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from tests.batches import answer_at_random, prompts_of, random_image, uids_of
from tests.family_models import FAMILY_MODELS, IMAGE_TEXT_MODELS, TEXT_MODELS, make_family_model
from tests.probe import RESPONSE_LENGTH, make_config, start_alone, start_two
from verl.data.conversation import messages_of
from verl.data.dataset import RLHFDataset
from verl.data.prompt import PromptEncoder
from verl.data.video import VideoLimits, load_video
from verl.models.position_ids import GRIDS
from verl.models.registry import family_of, media_token_ids, packs
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyKind, KeyVocabulary, vgr_from_mass
from verl.utils.attention_token_weights import token_weights_from_vgr
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import Sampling

pytestmark = pytest.mark.usefixtures("private_cache", "lone_process_group")

SAMPLING = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=False)
OVERRIDES = (
    "worker.rollout.collect_attentions=true",
    "algorithm.enable_token_weights=true",
    "worker.actor.optim.lr=1e-3",
)


def write_rows(folder: Path, takes_images: bool, takes_videos: bool) -> str:
    """One image, two images of different shapes, a video before an image, and text alone, as far as they are taken."""
    sizes = {"a": (56, 56), "b": (112, 56), "c": (56, 84)}
    for seed, (name, size) in enumerate(sizes.items()):
        random_image(size, seed).save(folder / f"{name}.png")
    frames = [f"frame{index}.png" for index in range(4)]
    for index, name in enumerate(frames):
        random_image((56, 56), 10 + index).save(folder / name)
    rows = [
        {"prompt": "<image>What is in the picture?", "images": ["a.png"], "videos": []},
        {"prompt": "<image>and<image>What is the sum?", "images": ["b.png", "a.png"], "videos": []},
        {"prompt": "<video>What is in<image>the picture?", "images": ["c.png"], "videos": [frames]},
        {"prompt": "Answer in one word.", "images": [], "videos": []},
    ]
    if not takes_videos:
        rows[2] = {"prompt": "The quick brown fox", "images": [], "videos": []}
    if not takes_images:
        rows = [{"prompt": row["prompt"].replace("<image>", "")} for row in rows]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "1"}) + "\n" for row in rows))
    return str(path)


def make_family_prompts(model_path: str, folder: Path) -> DataProto:
    tokenizer, processor = get_tokenizer(model_path), get_processor(model_path)
    family = family_of(AutoConfig.from_pretrained(model_path))
    dataset = RLHFDataset(
        write_rows(folder, family.has_vision_tower, family.takes_videos),
        tokenizer,
        processor,
        image_dir=str(folder),
        video_fps=1.0,
        max_prompt_length=96,
        filter_overlong_prompts_workers=1,
    )
    return prompts_of(dataset)


def bare_model(model_path: str) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(model_path)
    is_image_text = type(config) in AutoModelForImageTextToText._model_mapping
    auto_class = AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM
    return auto_class.from_pretrained(model_path, dtype=torch.float32)


@torch.no_grad()
def log_probs_alone(model: PreTrainedModel, model_path: str, row: DataProto) -> torch.Tensor:
    """(length,) of one row's response: no padding, no batch, positions of the model's own, media straight from the
    processor, which also makes the token types."""
    is_real = row.batch["attention_mask"].bool()
    ids = row.batch["input_ids"][is_real][None]
    length = int(row.batch["response_mask"].sum())
    processor = get_processor(model_path)
    inputs = {}
    if processor is not None:
        media = [handle.load() for handle in row.non_tensor_batch["multi_modal_data"] or []]
        images = [medium for medium in media if not hasattr(medium, "frames")]
        videos = [medium for medium in media if hasattr(medium, "frames")]
        if images:
            nested = [images] if "Gemma" in type(processor).__name__ else images
            inputs |= processor(images=nested, text=[processor.image_token * len(images)], return_tensors="pt")
        if videos:
            inputs |= processor.video_processor(
                [video.frames for video in videos], do_sample_frames=False, return_tensors="pt"
            )
            if "Qwen2_5" in type(processor).__name__:
                inputs["second_per_grid_ts"] = torch.tensor([2.0])  # seconds of two frames
        types = processor.create_mm_token_type_ids(ids.tolist())
        name = "token_type_ids" if "Gemma" in type(processor).__name__ else "mm_token_type_ids"
        inputs = {key: value for key, value in inputs.items() if "token_type" not in key and "mask" not in key}
        if family_of(model.config).token_types:
            inputs[name] = torch.tensor(types)
    logits = model(**{**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    banned = torch.tensor(media_token_ids(model.config), dtype=torch.long)
    logits = logits.index_fill(1, banned, -torch.inf)[-length - 1 : -1]
    return logits.log_softmax(-1).gather(1, ids[0, -length:, None])[:, 0]


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_mixed_batch_trains_one_step_with_token_weights(name: str, tmp_path: Path) -> None:
    model_path = make_family_model(name, tmp_path / "model")
    prompts = make_family_prompts(model_path, tmp_path)
    worker = start_alone(make_config(model_path, *OVERRIDES))
    before = worker.weights()

    prompts.meta_info = {"sampling": SAMPLING, "seed_parts": (0,)}
    worker.prepare_rollout_engine()
    batch = worker.generate_sequences(prompts)
    worker.release_rollout_engine()
    batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(SAMPLING.n)
    batch.non_tensor_batch["uid"] = uids_of(len(batch), SAMPLING.n)
    mask = batch.batch["response_mask"]

    measured = worker.compute_log_probs(batch).batch
    torch.testing.assert_close(
        measured["old_log_probs"], batch.batch["rollout_log_probs"], atol=1e-4, rtol=0, msg="engine and trainer"
    )
    model = bare_model(model_path)
    for index, length in enumerate(mask.sum(dim=1).tolist()):
        alone = log_probs_alone(model, model_path, batch[index])
        torch.testing.assert_close(measured["old_log_probs"][index, :length], alone, atol=1e-4, rtol=0)

    vgr = vgr_from_mass(measured["attention_mass"], measured["attention_keys"])
    weights = token_weights_from_vgr(vgr, mask, (0.2, 3.0), 0.0)
    has_media = torch.tensor([bool(media) for media in batch.non_tensor_batch["multi_modal_data"]])
    assert has_media.any() == (name in IMAGE_TEXT_MODELS)
    assert (weights[~has_media] == mask[~has_media]).all()
    for row in has_media.nonzero():
        if mask[row].sum() > 1:
            assert (weights[row] != mask[row]).any()

    batch.batch["old_log_probs"] = measured["old_log_probs"]
    batch.batch["ref_log_probs"] = worker.compute_ref_log_probs(batch).batch["ref_log_probs"]
    batch.batch["token_weights"] = weights
    batch.batch["advantages"] = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    metrics = worker.update_actor(batch)
    assert metrics["actor/grad_norm"] > 0
    after = worker.weights()
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert any("layers.0." in key and "vis" not in key for key in moved)
    if name in IMAGE_TEXT_MODELS:
        assert any("visual." in key or "vision_tower." in key for key in moved)


def test_ranks_whose_rows_hold_other_media_stay_in_step(tmp_path: Path, ray_cluster) -> None:
    """Rank 0 has images in both its micro-batches; rank 1 a video and an image in one, and nothing in the other."""
    model_path = make_family_model("Qwen3-VL", tmp_path / "model")
    batch = answer_at_random(make_family_prompts(model_path, tmp_path), 2, RESPONSE_LENGTH)
    few = ("worker.actor.micro_batch_size_per_device_for_update=2", "worker.actor.dynamic_batching=false")
    gradients, metrics = start_alone(make_config(model_path, *few)).gradients(batch, "token")
    group = start_two(make_config(model_path, *few))
    try:
        shared, shared_metrics = group.gradients(batch, "token")
    finally:
        group.release()
    assert shared_metrics == pytest.approx(metrics, rel=1e-5)
    for key, value in gradients.items():
        torch.testing.assert_close(shared[key], value, atol=1e-5 * value.abs().max().item() + 1e-9, rtol=0)


@pytest.mark.parametrize("name", ["LLaVA", "Gemma 3"])
def test_a_checkpoint_resumes_exactly_though_some_weights_have_no_gradient(name: str, tmp_path: Path) -> None:
    """Those of the vision tower that the model leaves out, which then have no state in the optimizer either."""
    model_path = make_family_model(name, tmp_path / "model")
    batch = answer_at_random(make_family_prompts(model_path, tmp_path), 2, RESPONSE_LENGTH)
    config = make_config(model_path, "worker.actor.optim.lr=1e-3")
    first, second = start_alone(config), start_alone(config)
    first.update_actor(batch)
    first.save_checkpoint(str(tmp_path), model_only=False)
    second.load_checkpoint(str(tmp_path), model_only=False)
    with_state = [
        {key for key, value in worker.actor.model.named_parameters() if value in worker.actor.optimizer.state}
        for worker in (first, second)
    ]
    assert with_state[0] == with_state[1] < {key for key, _ in first.actor.model.named_parameters()}
    for worker in (first, second):
        worker.update_actor(batch)
    expected = first.weights()
    assert all(torch.equal(value, expected[key]) for key, value in second.weights().items())


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_a_prompt_is_measured_without_pixels_as_the_processor_writes_it_with_them(name: str, tmp_path: Path) -> None:
    """Ids, and the grids that positions are made of. The last image is above the processors' own limits, which they
    apply once more; seven frames do not fill four moments."""
    model_path = make_family_model(name, tmp_path)
    config, processor = AutoConfig.from_pretrained(model_path), get_processor(model_path)
    encoder = PromptEncoder(processor.tokenizer, processor, config)
    images = [random_image(size, 0) for size in ((28, 28), (61, 43), (300, 90), (20, 130), (500, 500))]
    videos, media = [], {"images": [images] if "Gemma" in type(processor).__name__ else images}
    if encoder.family.takes_videos:
        frames = [random_image((61, 43), index) for index in range(7)]
        videos = [load_video(frames, None, VideoLimits(2.0, None, None))]
        media["videos"] = [video.frames for video in videos]
        media["video_metadata"] = [video.outline.metadata for video in videos]
        media["do_sample_frames"] = False
    text = encoder.chat_text(
        messages_of("<image>" * len(images) + "What?" + "<video>" * len(videos)), ["image", "video"], by_processor=True
    )
    expected = processor(text=[text], return_tensors="pt", **media)
    measured = encoder.model_inputs(text, [image.size for image in images], [video.outline for video in videos])
    for key in {"input_ids", *GRIDS} & expected.keys():
        assert torch.equal(torch.as_tensor(measured[key]), torch.as_tensor(expected[key])), key


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_keys_of_each_family_are_sorted(name: str, tmp_path: Path) -> None:
    """Vision keys are the media tokens; of text keys none is special, and together they are the words of the turn."""
    model_path = make_family_model(name, tmp_path / "model")
    prompts = make_family_prompts(model_path, tmp_path)
    tokenizer, config = get_tokenizer(model_path), AutoConfig.from_pretrained(model_path)
    vocabulary = KeyVocabulary.of(config, get_processor(model_path) or tokenizer)
    input_ids = prompts.batch["input_ids"]
    kinds = vocabulary.classify(input_ids, prompts.batch["attention_mask"], 0)
    is_media = torch.isin(input_ids, torch.tensor(media_token_ids(config), dtype=torch.long))
    assert torch.equal(kinds == KeyKind.VISION, is_media)
    for row, text in enumerate(prompts.non_tensor_batch["prompt_text"]):
        of_text = input_ids[row][kinds[row] == KeyKind.TEXT]
        assert not set(of_text.tolist()) & set(tokenizer.all_special_ids)
        words = tokenizer.decode(of_text)
        for part in text.replace("<video>", "<image>").split("<image>"):
            assert part in words


def test_sequences_of_recurrent_layers_and_of_images_that_see_forward_are_not_packed() -> None:
    packable = {name for name, family in FAMILY_MODELS.items() if packs(family.config())}
    assert packable == FAMILY_MODELS.keys() - {"Qwen3.5", "Qwen3.5-MoE", "Gemma 3"}


def test_every_family_has_a_row_and_text_models_share_one() -> None:
    names = {family_of(family.config()).name for family in IMAGE_TEXT_MODELS.values()}
    assert len(names) == len(IMAGE_TEXT_MODELS) - 1  # Qwen3.5 and its mixture of experts are one
    assert {family_of(family.config()).name for family in TEXT_MODELS.values()} == {"plain text"}
