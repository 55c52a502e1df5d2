# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_video.py
"""One video, whatever its form, is one set of frames; what is counted before decoding is what the model reads."""

from __future__ import annotations

import json
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from tests.batches import prompts_of, random_image, uids_of
from tests.family_models import IMAGE_TEXT_MODELS, make_family_model
from tests.probe import make_config, start_alone
from tests.tiny import CORPUS, build_tokenizer
from verl.data.conversation import messages_of
from verl.data.dataset import RLHFDataset
from verl.data.features import Featurizer
from verl.data.prompt import PromptEncoder
from verl.data.sources import JoinedDataset
from verl.data.video import MAX_FRAME_PIXELS, VideoLimits, load_video, outline_video, sample_frames
from verl.data.vision import MediaHandle
from verl.models.registry import media_token_ids
from verl.trainer.main import check_videos
from verl.utils.tokenizer import get_processor, get_tokenizer
from verl.workers.rollout.base import Sampling

pytestmark = pytest.mark.usefixtures("private_cache")

LIMITS = VideoLimits(fps=2.0, min_pixels=None, max_pixels=None)
SIZE = (84, 56)


def write_frames(folder: Path, number: int, size: tuple[int, int] = SIZE) -> list[str]:
    """Noise, one file a frame; returns their names."""
    for index in range(number):
        random_image(size, index).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(number)]


def write_video(path: Path, frames: list[Path], fps: int) -> None:
    """Without loss, so that frames are the same to the bit."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "bgr0"
        stream.time_base = Fraction(1, fps)
        for name in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(name))))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("total", "source_fps", "fps", "expected"),
    [
        (10, 10.0, 2.0, (0, 3, 6, 9)),  # one second has two frames, fewer than the least of four
        (31, 10.0, 2.0, (0, 6, 12, 18, 24, 30)),  # 3.1 seconds
        (41, 10.0, 1.9, (0, 8, 16, 24, 32, 40)),  # 7.8 frames, evened to 6
        (3, 1.0, 2.0, (0, 1, 2)),
        (1, 1.0, 2.0, (0, 0)),
    ],
)
def test_frames_are_spread_evenly_and_even_in_number(
    total: int, source_fps: float, fps: float, expected: tuple[int, ...]
) -> None:
    assert sample_frames(total, source_fps, fps) == expected


def test_a_long_video_is_thinned_out_to_the_most_frames() -> None:
    frames = sample_frames(1_000_000, 30.0, 2.0)
    assert len(frames) == 768
    assert (frames[0], frames[-1]) == (0, 999_999)


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_every_form_of_a_video_gives_the_frames_that_were_asked_for(suffix: str, tmp_path: Path) -> None:
    """20 frames at 10 a second: four of them, the first and the last among them. Matroska does not say how many
    frames it holds."""
    names = write_frames(tmp_path, 20)
    write_video(tmp_path / f"a.{suffix}", [tmp_path / name for name in names], fps=10)
    content = (tmp_path / f"a.{suffix}").read_bytes()
    shown = sample_frames(20, 10.0, 2.0)
    expected = np.stack([np.asarray(Image.open(tmp_path / names[index])) for index in shown])
    for form in (f"a.{suffix}", tmp_path / f"a.{suffix}", content, {"bytes": content}, {"path": f"a.{suffix}"}):
        video = load_video(form, tmp_path, LIMITS)
        assert video.outline.frame_indices == shown
        assert (video.outline.total_frames, video.outline.source_fps) == (20, 10.0)
        assert np.array_equal(video.frames, expected)
        assert outline_video(form, tmp_path, LIMITS) == video.outline


@pytest.mark.parametrize(("degrees", "turn"), [(90, "ROTATE_90"), (-90, "ROTATE_270"), (180, "ROTATE_180")])
def test_a_video_of_a_camera_held_on_its_side_is_shown_upright(degrees: int, turn: str, tmp_path: Path) -> None:
    """Players turn it against the clock by what its header says, and so does transposing by that name."""
    names = write_frames(tmp_path, 4)
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=4)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "rgb24"
        stream.set_display_rotation(degrees)
        for name in names:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.open(tmp_path / name))))
        container.mux(stream.encode())
    video = load_video("a.mov", tmp_path, LIMITS)
    upright = [Image.open(tmp_path / name).transpose(Image.Transpose[turn]) for name in names]
    assert np.array_equal(video.frames, np.stack([np.asarray(image) for image in upright]))
    assert outline_video("a.mov", tmp_path, LIMITS) == video.outline


def test_all_frames_of_a_list_are_shown_as_taken_at_the_rate_of_the_config(tmp_path: Path) -> None:
    names = write_frames(tmp_path, 5)
    as_bytes = [(tmp_path / name).read_bytes() for name in names]
    expected = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    for form in (names, as_bytes, [{"bytes": content, "path": None} for content in as_bytes]):
        video = load_video(form, tmp_path, LIMITS)
        assert np.array_equal(video.frames, expected)
        assert video.outline.metadata["duration"] == 2.5
        assert outline_video(form, tmp_path, LIMITS) == video.outline


def test_frames_are_brought_within_the_bounds_and_all_to_the_size_of_the_first(tmp_path: Path) -> None:
    """A quarter of the area halves the sides; no frame is above what Qwen's own sampler gives it."""
    names = write_frames(tmp_path, 2)
    random_image((10, 90), 7).save(tmp_path / names[1])
    limits = VideoLimits(2.0, None, SIZE[0] * SIZE[1] // 4)
    assert load_video(names, tmp_path, limits).frames.shape == (2, 28, 42, 3)
    random_image((2000, 1000), 7).save(tmp_path / names[0])
    width, height = outline_video(names, tmp_path, VideoLimits(2.0, 4_000_000, None)).frame_size
    assert MAX_FRAME_PIXELS - width - height < width * height <= MAX_FRAME_PIXELS


def test_lists_of_frames_need_no_decoder_and_files_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_frames(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(load_video(names, tmp_path, LIMITS).frames) == 2
    with pytest.raises(ImportError, match=r"PyAV.*requirements\.txt.*list of frames"):
        load_video("a.mp4", tmp_path, LIMITS)


def test_what_is_no_video_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for source, message in ((3, "not 3"), ([], "empty"), ("broken.mp4", "FFmpeg")):
        with pytest.raises(ValueError, match=message):
            outline_video(source, tmp_path, LIMITS)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/absent.mp4"):
        outline_video("absent.mp4", tmp_path, LIMITS)


# ---- in prompts ----


def make_dataset(name: str, folder: Path, rows: list[dict[str, Any]], **options: Any) -> RLHFDataset:
    path = make_family_model(name, folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"answer": "1", **row}) + "\n" for row in rows))
    return RLHFDataset(
        str(folder / "rows.jsonl"),
        get_tokenizer(path),
        get_processor(path),
        image_dir=str(folder),
        model_config=AutoConfig.from_pretrained(path),
        **{"max_prompt_length": 200, **options},
    )


def real_ids(item: dict[str, Any]) -> list[int]:
    return item["input_ids"][item["attention_mask"].bool()].tolist()


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3.5"])
def test_rows_with_videos_are_counted_to_the_token_before_anything_is_decoded(name: str, tmp_path: Path) -> None:
    """A row that just fits stays, with one token less it goes. Five frames are three moments of 2 x 3 tokens."""
    row = {"prompt": "<video>What?<image>", "images": ["0.png"], "videos": [write_frames(tmp_path, 5)]}
    dataset = make_dataset(name, tmp_path, [row, {"prompt": "a", "images": [], "videos": []}])
    ids = real_ids(dataset[0])
    image, video = media_token_ids(dataset.model_config)
    assert (ids.count(video), ids.count(image)) == (3 * 6, 6)
    assert dataset[0]["raw_prompt_ids"].count(video) == 1
    assert len(make_dataset(name, tmp_path, [row], max_prompt_length=len(ids))) == 1
    with pytest.raises(ValueError, match=f"every row of .*: {len(ids)} to {len(ids)} tokens"):
        make_dataset(name, tmp_path, [row], max_prompt_length=len(ids) - 1)


@pytest.mark.parametrize("number", [1, 0.5])
def test_files_and_lists_of_frames_may_stand_in_one_column_of_json(number: float, tmp_path: Path) -> None:
    """Also where a fraction beside them keeps `datasets` from reading the column as lists."""
    names = write_frames(tmp_path, 4)
    write_video(tmp_path / "a.mkv", [tmp_path / name for name in names], fps=2)
    videos = ["a.mkv", names, {"path": "a.mkv", "score": number}, [{"path": name} for name in names]]
    rows = [{"prompt": "<video>What?", "videos": [video]} for video in videos]
    dataset = make_dataset("Qwen2.5-VL", tmp_path, [*rows, {"prompt": "a", "videos": None}])
    assert dataset.has_videos
    expected = load_video(names, tmp_path, LIMITS).frames
    for index in range(len(videos)):
        (video,) = dataset[index]["multi_modal_data"]["videos"]
        assert np.array_equal(video.frames, expected)
    assert dataset[len(videos)]["multi_modal_data"] is None


@pytest.mark.parametrize("features", ["path", "bytes", "videos"])
def test_parquet_rows_hold_video_files_in_three_ways(features: str, tmp_path: Path) -> None:
    """A path below `image_dir`, bytes, and the library's own feature. 20 frames at 10 a second are two moments."""
    names = write_frames(tmp_path, 20)
    write_video(tmp_path / "a.mkv", [tmp_path / name for name in names], fps=10)
    content = (tmp_path / "a.mkv").read_bytes()
    cell, feature = {
        "path": ("a.mkv", datasets.Value("string")),
        "bytes": (content, datasets.Value("binary")),
        "videos": ({"bytes": content, "path": None}, datasets.Video()),
    }[features]
    text = datasets.Value("string")
    schema = datasets.Features({"prompt": text, "answer": text, "videos": datasets.List(feature)})
    rows = datasets.Dataset.from_dict({"prompt": ["<video>?"], "answer": ["1"], "videos": [[cell]]}, features=schema)
    rows.to_parquet(tmp_path / "rows.parquet")
    path = make_family_model("Qwen2.5-VL", tmp_path / "model")
    dataset = RLHFDataset(
        str(tmp_path / "rows.parquet"), get_tokenizer(path), get_processor(path), image_dir=str(tmp_path)
    )
    item = dataset[0]
    (video,) = item["multi_modal_data"]["videos"]
    assert np.array_equal(video.frames, load_video("a.mkv", tmp_path, LIMITS).frames)
    grid = Featurizer(dataset.processor).featurize([[MediaHandle.put(video)]])["video_grid_thw"]
    assert grid.tolist() == [[2, 4, 6]]
    assert real_ids(item).count(media_token_ids(dataset.model_config)[1]) == 2 * 6


def test_qwen3_reads_the_time_of_every_moment_in_the_place_of_the_marks_around_a_video(tmp_path: Path) -> None:
    """Frames at 0, 0.5, 1 and 1.5 seconds are two moments, at 0.25 and 1.25 seconds, written with one digit."""
    rows = [{"prompt": "<video>What?", "videos": [write_frames(tmp_path, 4, (56, 28))]}]
    dataset = make_dataset("Qwen3-VL", tmp_path, rows)
    moments = "".join(
        f"<{seconds} seconds><|vision_start|>{'<|video_pad|>' * 2}<|vision_end|>" for seconds in ("0.2", "1.2")
    )
    text = dataset.tokenizer.decode(real_ids(dataset[0]))
    assert text == f"<|im_start|>user\n{moments}What?<|im_end|>\n<|im_start|>assistant\n"


def test_text_and_the_time_after_it_are_counted_as_they_are_read_together(tmp_path: Path) -> None:
    """A space before a video and the `<` of its first time are one token of most vocabularies, as of this one."""
    family = IMAGE_TEXT_MODELS["Qwen3-VL"]
    tokenizer = build_tokenizer([*CORPUS, "a < b " * 50])
    assert len(tokenizer.encode("a <")) == 2
    path = make_family_model("Qwen3-VL", tmp_path / "model")
    encoder = PromptEncoder(tokenizer, family.build_processor(tokenizer), AutoConfig.from_pretrained(path))
    video = load_video(write_frames(tmp_path, 4), tmp_path, LIMITS)
    text = encoder.chat_text(messages_of("a <video>"), ["video"], by_processor=True)
    raw_ids = encoder.raw_ids(text, 0, 1)
    ids = encoder.model_inputs(text, [], [video.outline])["input_ids"][0]
    assert encoder.length(text, raw_ids, [], [video.outline]) == len(ids)
    assert tokenizer.convert_tokens_to_ids("\u0120<") in ids


def test_features_of_images_and_videos_are_those_of_each_alone_in_row_order(tmp_path: Path) -> None:
    names = write_frames(tmp_path, 6)
    processor = get_processor(make_family_model("Qwen2.5-VL", tmp_path / "model"))
    first, second = (MediaHandle.put(load_video(part, tmp_path, LIMITS)) for part in (names[:4], names[4:]))
    image = MediaHandle.put(random_image(SIZE, 9))
    features = Featurizer(processor).featurize([[image, second], None, [first, second]])
    frames = [handle.load().frames for handle in (second, first, second)]
    alone = [processor.video_processor([video], do_sample_frames=False, return_tensors="pt") for video in frames]
    for key in ("pixel_values_videos", "video_grid_thw"):
        assert torch.equal(features[key], torch.cat([single[key] for single in alone]))
    assert features["second_per_grid_ts"].tolist() == [1.0] * 3  # two frames of two a second
    assert features["image_grid_thw"].tolist() == [[1, 4, 6]]


def test_frames_that_may_not_be_written_are_read_without_a_warning(tmp_path: Path) -> None:
    """As Ray's store hands them out, shared with others. PyTorch warns once a process unless it is told otherwise."""
    processor = get_processor(make_family_model("Qwen2.5-VL", tmp_path / "model"))
    video = load_video(write_frames(tmp_path, 2), tmp_path, LIMITS)
    video.frames.setflags(write=False)
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Featurizer(processor).featurize([[MediaHandle.put(video)]])
    finally:
        torch.set_warn_always(False)


def test_a_family_that_takes_no_videos_names_those_that_do(tmp_path: Path) -> None:
    rows = [{"prompt": "<video>", "videos": [["a.png"]]}]
    with pytest.raises(ValueError, match=r"data.video_key=videos: .* family LLaVA; use one of Qwen2-VL, .*ignore"):
        make_dataset("LLaVA", tmp_path, rows)


def test_data_with_videos_is_refused_when_loaded_where_the_engine_reads_them_otherwise(tmp_path: Path) -> None:
    """Not when the first of them is drawn. One that is dropped for its length is never drawn."""
    text = {"prompt": "a", "videos": []}
    rows = [text, {"prompt": "<video>", "videos": [write_frames(tmp_path, 2)]}]
    plain, mixed = (make_dataset("Qwen2.5-VL", tmp_path, part) for part in ([text], rows))
    dropped = make_dataset("Qwen2.5-VL", tmp_path, rows, max_prompt_length=len(mixed[1]["raw_prompt_ids"]))
    vllm, hf = (make_config(str(tmp_path / "model"), f"worker.rollout.name={name}") for name in ("vllm", "hf"))
    check_videos(vllm, plain, dropped)
    with pytest.raises(
        ValueError, match=r"rows\.jsonl' has videos: .*vllm .* family Qwen2.5-VL; use .*name=hf .* Qwen3-VL"
    ):
        check_videos(vllm, plain, mixed)
    check_videos(hf, plain, mixed)
    assert JoinedDataset([plain, mixed]).has_videos and not JoinedDataset([plain, dropped]).has_videos
    check_videos(vllm, make_dataset("Qwen3-VL", tmp_path, rows))


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL"])
def test_a_response_after_a_long_video_is_generated_at_the_positions_of_its_training(
    family: str, tmp_path: Path, lone_process_group
) -> None:
    """The video's last moment lies further ahead than the few tokens of text behind it."""
    rows = [{"prompt": "What?<video>", "videos": [write_frames(tmp_path, 64, (28, 28))]}]
    prompts = prompts_of(make_dataset(family, tmp_path, rows))
    positions = prompts.batch["position_ids"][0, 1:]  # (3, P)
    assert positions.max() > positions[:, -1].max()
    sampling = Sampling(n=2, temperature=1.0, top_p=1.0, top_k=-1, ignore_eos=True)
    prompts.meta_info = {"sampling": sampling, "seed_parts": (0,)}
    worker = start_alone(make_config(str(tmp_path / "model")))
    worker.prepare_rollout_engine()
    batch = worker.generate_sequences(prompts)
    batch.non_tensor_batch["multi_modal_data"] = prompts.non_tensor_batch["multi_modal_data"].repeat(2)
    batch.non_tensor_batch["uid"] = uids_of(2, 2)
    trained = worker.compute_log_probs(batch).batch["old_log_probs"]
    torch.testing.assert_close(trained, batch.batch["rollout_log_probs"], atol=1e-4, rtol=0)


def test_videos_that_do_not_match_their_placeholders_or_cannot_be_read_name_the_row(tmp_path: Path) -> None:
    good = {"prompt": "a", "videos": []}
    with pytest.raises(ValueError, match="row 1 of .*: 2 <video> in the prompt .* but 1 videos"):
        make_dataset("Qwen2.5-VL", tmp_path, [good, {"prompt": "<video><video>", "videos": ["a.mp4"]}])
    with pytest.raises(ValueError, match="row 1 of .*: video 0 cannot be read: .*No such file"):
        make_dataset("Qwen2.5-VL", tmp_path, [good, {"prompt": "<video>", "videos": ["a.mp4"]}])
    with pytest.raises(
        ValueError, match="1 of 1 rows .* have <video> in the prompt, but there is no column data.video_key=videos"
    ):
        make_dataset("Qwen2.5-VL", tmp_path, [{"prompt": "<video>"}])
