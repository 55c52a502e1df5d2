# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_dataset.py
"""Rows become prompts with the real processor, and whatever is wrong with a row is said with its number."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLProcessor

from verl.data.dataset import RLHFDataset, collate_fn
from verl.data.features import Featurizer
from verl.data.files import load_rows
from verl.data.vision import MediaHandle
from verl.trainer.config import DataConfig
from verl.utils.tokenizer import get_processor, get_tokenizer

P = 64
SIDE = 28  # pixels of one image token


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture(scope="module")
def processor(tiny_model_path: str) -> Qwen2_5_VLProcessor:
    return get_processor(tiny_model_path)


@pytest.fixture
def make(tokenizer: PreTrainedTokenizerBase, processor: Qwen2_5_VLProcessor, tmp_path: Path) -> Callable:
    """`make(rows, **options)` is the dataset of such rows, from a json lines file with images beside it."""

    def build(rows: list[dict[str, Any]], **options: Any) -> RLHFDataset:
        options = {"tokenizer": tokenizer, "processor": processor, "max_prompt_length": P, **options}
        return RLHFDataset(write_json(tmp_path / "rows.jsonl", rows), **{"image_dir": str(tmp_path), **options})

    return build


def write_json(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_image(folder: Path, name: str, width: int, height: int) -> str:
    """A noise image, so that any change of pixels shows; returns `name`."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return name


def row(prompt: str, images: list[Any] | None = None, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answer": "1", "images": images, **columns}


def real_ids(item: dict[str, Any]) -> list[int]:
    """The prompt's tokens without padding."""
    return item["input_ids"][item["attention_mask"].bool()].tolist()


# ---- where rows come from ----


def as_parquet(rows: datasets.Dataset, folder: Path) -> str:
    rows.to_parquet(folder / "d.parquet")
    return str(folder / "d.parquet")


def as_json(rows: datasets.Dataset, folder: Path) -> str:
    (folder / "d.json").write_text(json.dumps(rows.to_list()))
    return str(folder / "d.json")


def as_jsonl(rows: datasets.Dataset, folder: Path) -> str:
    return write_json(folder / "d.jsonl", rows.to_list())


def as_csv(rows: datasets.Dataset, folder: Path) -> str:
    rows.to_csv(folder / "d.csv")
    return str(folder / "d.csv")


def as_saved_folder(rows: datasets.Dataset, folder: Path) -> str:
    rows.save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_arrow(rows: datasets.Dataset, folder: Path) -> str:
    (file,) = Path(as_saved_folder(rows, folder)).glob("*.arrow")
    return str(file)


def as_folder(rows: datasets.Dataset, folder: Path) -> str:
    """Two files beside an image: a folder of data may hold its media too."""
    (folder / "d").mkdir()
    for index in range(2):
        write_json(folder / "d" / f"part-{index}.jsonl", rows.to_list()[2 * index : 2 * index + 2])
    write_image(folder / "d", "a.png", SIDE, SIDE)
    return str(folder / "d")


@pytest.mark.parametrize(
    "write", [as_parquet, as_json, as_jsonl, as_csv, as_arrow, as_saved_folder, as_folder], ids=lambda f: f.__name__
)
def test_every_kind_of_file_and_folder_gives_the_same_rows(
    write: Callable[[datasets.Dataset, Path], str], tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {index}", "answer": f"a{index}"} for index in range(4)]
    path = write(datasets.Dataset.from_list(rows), tmp_path)
    assert load_rows(path).to_list() == rows
    assert load_rows(f"{path}@train").to_list() == rows


def folder_of(folder: Path, *names: str) -> str:
    """A folder of json lines files whose one row is the file's name, and of such other files as are named."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, [{"prompt": name}])
    return str(folder)


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (["train-0.jsonl", "train-1.jsonl", "test.jsonl"], "", ["train-0.jsonl", "train-1.jsonl"]),
        (["train-0.jsonl", "train-1.jsonl"], "@train[:1]", ["train-0.jsonl"]),
        (["train.jsonl", "test.jsonl"], "@test", ["test.jsonl"]),
        (["train.jsonl", "val.jsonl"], "@validation", ["val.jsonl"]),
        (["train.jsonl", "test.jsonl"], "@train+test", ["train.jsonl", "test.jsonl"]),
        (["train/0.jsonl", "test/0.jsonl"], "@test", ["test/0.jsonl"]),
        (["train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"], "", ["train.jsonl"]),
        (["a.jsonl", "dataset_infos.json", "README.md", "images/a.png"], "", ["a.jsonl"]),
    ],
)
def test_a_split_of_a_folder_is_the_data_files_named_after_it(
    names: list[str], split: str, expected: list[str], tmp_path: Path
) -> None:
    assert load_rows(folder_of(tmp_path / "d", *names) + split)["prompt"][:] == expected


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        (["a.jsonl", "test.jsonl"], r'Unknown split "train". Should be one of \[\'test\'\]'),
        (["validation.jsonl", "test.jsonl"], r'Unknown split "train". Should be one of'),
        (
            ["rows.jsonl", "train/a.png"],
            r"no \.parquet, .* where its split names lead \(.*a\.png\); name the data file",
        ),
        (["README.md"], "doesn't contain any data files"),
    ],
)
def test_held_out_rows_never_become_training_rows(names: list[str], problem: str, tmp_path: Path) -> None:
    """A folder without the split asked for is refused, rather than read otherwise."""
    with pytest.raises(ValueError, match=problem):
        load_rows(folder_of(tmp_path / "d", *names))


def test_loading_a_small_file_leaves_the_console_quiet(make: Callable, capfd: pytest.CaptureFixture) -> None:
    """And the library's switch as it was."""
    make([row("a")] * 3)
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


def test_counting_the_prompts_of_a_large_set_shows_a_bar(
    make: Callable, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verl.data.dataset.ROWS_PER_PROCESS", 3)
    make([row("a")] * 3)
    output = capfd.readouterr().err
    assert "counting prompt tokens" in output
    assert "Generating" not in output


def test_a_saved_set_of_splits_is_read_by_split(tmp_path: Path) -> None:
    splits = {name: datasets.Dataset.from_dict({"prompt": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert load_rows(f"{tmp_path / 'saved'}@test")["prompt"][:] == ["test"]
    with pytest.raises(ValueError, match="no split 'dev' in it; its splits are train, test"):
        load_rows(f"{tmp_path / 'saved'}@dev")
    with pytest.raises(ValueError, match="saved as one set without splits; leave @test out"):
        load_rows(f"{tmp_path / 'saved' / 'train'}@test")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("no/such-dataset", r"no such file or folder here, and it cannot be loaded from the hub \(Couldn't reach"),
        ("no/such-dataset@test", "'no/such-dataset@test': .*it cannot be loaded from the hub"),
        ("./nowhere", "no such file or folder"),
        ("nowhere.parquet", "no such file or folder"),
    ],
)
def test_data_that_is_not_there_is_named(path: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE is set for all tests, so the hub is not asked."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"cannot load the data.*{problem}"):
        load_rows(path)


def test_a_split_that_a_file_does_not_have_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = write_json(tmp_path / "d.jsonl", [{"prompt": "a"}])
    with pytest.raises(ValueError, match=r'd.jsonl@test.*Unknown split "test".*train'):
        load_rows(f"{path}@test")


def test_a_folder_of_mixed_types_and_an_unknown_type_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.jsonl", [{"prompt": "a"}])
    (tmp_path / "b.csv").write_text("prompt\na\n")
    with pytest.raises(ValueError, match=r"files of several types \(\.csv, \.json\)"):
        load_rows(str(tmp_path))
    (tmp_path / "notes.txt").write_text("a")
    with pytest.raises(ValueError, match=r"notes\.txt is none of \.parquet, \.json"):
        load_rows(str(tmp_path / "notes.txt"))


def test_a_damaged_file_says_what_is_wrong_with_it(tmp_path: Path) -> None:
    (tmp_path / "d.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match=r"cannot load the data.*d\.parquet.*[Pp]arquet magic bytes"):
        load_rows(str(tmp_path / "d.parquet"))


# ---- one item ----


def test_an_item_holds_what_processor_and_tokenizer_make_of_the_chat(
    make: Callable, tokenizer: PreTrainedTokenizerBase, processor: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    """56 x 84 pixels are 2 x 3 tokens and 28 x 28 are one, of 28 x 28 pixels each."""
    wide, square = write_image(tmp_path, "a.png", 84, 56), write_image(tmp_path, "b.png", 28, 28)
    dataset = make([row("<image>one<image>two", [wide, square], level=3, source="here")])
    item = dataset[0]
    chat = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>one"
        "<|vision_start|><|image_pad|><|vision_end|>two<|im_end|>\n<|im_start|>assistant\n"
    )
    images = [Image.open(tmp_path / name) for name in (wide, square)]
    expected = processor(text=[chat], images=images, return_tensors="pt")

    assert item["raw_prompt_ids"] == tokenizer.encode(chat)
    assert real_ids(item) == expected["input_ids"][0].tolist()
    assert real_ids(item).count(processor.image_token_id) == 6 + 1
    assert item["prompt_text"] == "<image>one<image>two"
    assert item["ground_truth"] == "1"
    assert item["extra"] == {"level": 3, "source": "here"}
    assert [image.size for image in item["multi_modal_data"]["images"]] == [(84, 56), (28, 28)]


def test_prompts_are_padded_on_the_left_and_positions_start_at_the_text(
    make: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    item = make([row("<image>?", [write_image(tmp_path, "a.png", 84, 56)])])[0]
    length = item["attention_mask"].sum().item()
    assert item["input_ids"].shape == item["attention_mask"].shape == (P,)
    assert item["input_ids"].dtype == item["attention_mask"].dtype == item["position_ids"].dtype == torch.int64
    assert item["attention_mask"].tolist() == [0] * (P - length) + [1] * length
    assert (item["input_ids"][: P - length] == tokenizer.pad_token_id).all()
    assert item["position_ids"].shape == (4, P)
    assert item["position_ids"][0].tolist() == [0] * (P - length) + list(range(length))
    assert (item["position_ids"][:, : P - length] == 0).all()
    # The image takes 6 tokens and 3 positions.
    assert (item["position_ids"][1:, -1] == length - 1 - 3).all()


@pytest.mark.parametrize("features", ["images", "structs", "bytes"])
def test_parquet_rows_hold_images_in_three_ways_and_give_the_same_pixels(
    features: str, make: Callable, tokenizer: PreTrainedTokenizerBase, processor: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    """As the library's own Image feature, as plain {"bytes", "path"} structs, and as raw bytes."""
    write_image(tmp_path, "a.png", 84, 56)
    image, data = Image.open(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes()
    cell = {"images": [image], "structs": [{"bytes": data, "path": None}], "bytes": [data]}[features]
    columns = {"prompt": ["<image>?", "text"], "answer": ["1", "2"], "images": [cell, None]}
    schema = {"prompt": datasets.Value("string"), "answer": datasets.Value("string")}
    schema["images"] = datasets.List(
        {
            "images": datasets.Image(),
            "structs": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "bytes": datasets.Value("binary"),
        }[features]
    )
    path = as_parquet(datasets.Dataset.from_dict(columns, features=datasets.Features(schema)), tmp_path)
    dataset = RLHFDataset(path, tokenizer, processor, max_prompt_length=P)
    by_path = make([row("<image>?", ["a.png"])])[0]
    assert np.array_equal(dataset[0]["multi_modal_data"]["images"][0], by_path["multi_modal_data"]["images"][0])
    assert torch.equal(dataset[0]["input_ids"], by_path["input_ids"])
    assert dataset[1]["multi_modal_data"] is None


@pytest.mark.parametrize(
    "cells",
    [
        (["a.png"], [{"path": "a.png"}]),
        (["a.png", {"path": "a.png"}], None),
        ([{"path": "a.png", "score": 0.5}], [{"path": "a.png", "score": 1}]),
        ([{"path": "a.png"}], [{"image": "a.png"}], []),
        ([{"path": "a.png", "note": [1, "x"]}], ["a.png"]),
    ],
    ids=["path or dict", "both in a row", "a number", "other keys", "a mixed note"],
)
@pytest.mark.parametrize("saved", [False, True])
def test_images_of_json_may_be_written_in_several_ways_in_one_column(
    saved: bool, cells: tuple[Any, ...], make: Callable, tmp_path: Path
) -> None:
    write_image(tmp_path, "a.png", SIDE, SIDE)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    rows = [row("<image>" * len(cell or []), cell) for cell in cells]
    dataset = make(rows)
    if saved:
        path = as_saved_folder(load_rows(dataset.data_path), tmp_path)
        dataset = RLHFDataset(path, dataset.tokenizer, dataset.processor, config=dataset.config)
    for index, cell in enumerate(cells):
        media = dataset[index]["multi_modal_data"] or {"images": []}
        assert len(media["images"]) == len(cell or [])
        assert all(np.array_equal(np.asarray(image), pixels) for image in media["images"])


def test_lists_of_a_fixed_size_hold_as_many_images(
    tokenizer: PreTrainedTokenizerBase, processor: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    data = (tmp_path / write_image(tmp_path, "a.png", SIDE, SIDE)).read_bytes()
    images = pa.array([[data, data], None], pa.list_(pa.binary(), 2))
    table = pa.table({"prompt": ["<image><image>", "a"], "answer": ["1", "2"], "images": images})
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    dataset = RLHFDataset(str(tmp_path / "d.parquet"), tokenizer, processor, max_prompt_length=P)
    assert len(dataset[0]["multi_modal_data"]["images"]) == 2
    assert dataset[1]["multi_modal_data"] is None


def test_rows_without_images_stand_beside_rows_with_them(make: Callable, tmp_path: Path) -> None:
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    dataset = make([row("<image>a", [name]), row("b", None), row("b", []), row("<image><image>", [name, name])])
    batch = collate_fn([dataset[index] for index in range(4)])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (4, P)
    assert batch["position_ids"].shape == (4, 4, P)
    counts = [len(media["images"]) if media else 0 for media in batch["multi_modal_data"]]
    assert counts == [1, 0, 0, 2]
    assert torch.equal(batch["input_ids"][1], batch["input_ids"][2])


def test_a_text_row_reads_the_same_with_an_image_column_as_without(make: Callable) -> None:
    without = make([{"prompt": "What?", "answer": "1"}])[0]
    beside = make([row("What?", None)])[0]
    for key in ("input_ids", "attention_mask", "position_ids"):
        assert torch.equal(without[key], beside[key])
    assert without["raw_prompt_ids"] == beside["raw_prompt_ids"]


def test_a_text_model_gets_single_positions_and_ignores_an_empty_image_column(make: Callable) -> None:
    item = make([row("What is <image> in html?", None)], processor=None)[0]
    assert item["position_ids"].shape == (P,)
    assert item["multi_modal_data"] is None


def test_special_tokens_come_from_the_chat_template_alone(make: Callable, tiny_model_path: str) -> None:
    """Llama's tokenizer puts a first token before every text, and its template writes that token too."""
    tokenizer = get_tokenizer(tiny_model_path)
    plain = make([row("a")], processor=None)[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    )
    assert len(tokenizer.encode("a")) == 1 + len(tokenizer.encode("a", add_special_tokens=False))
    item = make([row("a")], processor=None, tokenizer=tokenizer)[0]
    assert item["raw_prompt_ids"] == real_ids(item) == plain["raw_prompt_ids"]


def test_everything_but_tensors_is_collated_to_objects_of_one_dimension(make: Callable) -> None:
    """Two equal lists of ids are the case that numpy would make a matrix of."""
    dataset = make([row("same", note={"a": [1, 2]}), row("same", note={"a": [1, 2]})])
    batch = collate_fn([dataset[0], dataset[1]])
    for key in ("raw_prompt_ids", "prompt_text", "ground_truth", "multi_modal_data", "extra"):
        assert batch[key].shape == (2,)
        assert batch[key].dtype == object
    assert batch["raw_prompt_ids"][0] == dataset[0]["raw_prompt_ids"]
    assert batch["extra"][1] == {"note": {"a": [1, 2]}}


def test_format_prompt_renders_the_question_into_the_user_turn(
    make: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    (tmp_path / "f.jinja").write_text("{{ content | trim }} Answer in one word.\n")
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    item = make([row("<image>What?  ", [name])], format_prompt=str(tmp_path / "f.jinja"))[0]
    assert item["prompt_text"] == "<image>What? Answer in one word."
    assert "<|vision_end|>What? Answer in one word.<|im_end|>" in tokenizer.decode(item["raw_prompt_ids"])


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("Answer in one word.", "never uses {{ content }}"),
        ("{{ content }} {{ hint }}", "'hint' is undefined; it may use one variable, {{ content }}"),
        ("{{ content", "unexpected end"),
        ("{{ content }}{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
        ("{{ content }}{{ content.format.__globals__ }}", "access to attribute '__globals__' .* is unsafe"),
        ("{% include '/etc/passwd' %}{{ content }}", "no loader"),
        ("{% for i in range(999999999) %}{{ content }}{% endfor %}", "Range too big"),
        ("é {{ content }}", "cannot be read as a UTF-8 text file: .*can't decode byte 0xe9"),
    ],
)
def test_a_format_prompt_that_cannot_work_is_refused(
    template: str, problem: str, make: Callable, tmp_path: Path
) -> None:
    (tmp_path / "f.jinja").write_text(template, encoding="latin-1")
    with pytest.raises(ValueError, match=f"data.format_prompt=.*f.jinja.*{problem}"):
        make([row("What?")], format_prompt=str(tmp_path / "f.jinja"))


def test_a_format_prompt_that_reaches_into_python_for_some_questions_is_refused_with_row_and_key(
    make: Callable, tmp_path: Path
) -> None:
    path = tmp_path / "f.jinja"
    path.write_text("{{ content }}{% if content == 'now' %}{{ content.__class__.__mro__ }}{% endif %}")
    make([row("later")], format_prompt=str(path))
    with pytest.raises(ValueError, match=f"row 1 of .*: data.format_prompt={path}: access to attribute '__class__'"):
        make([row("later"), row("now")], format_prompt=str(path))


def test_a_folder_as_format_prompt_is_refused(make: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.format_prompt=.* is not a file"):
        make([row("What?")], format_prompt=str(tmp_path))


@pytest.mark.parametrize(
    ("limits", "tokens"),
    [
        (dict(), 5 * 10),
        (dict(max_pixels=(5 * SIDE) * (10 * SIDE) // 25), 1 * 2),
        (dict(min_pixels=(5 * SIDE) * (10 * SIDE) * 4), 10 * 20),
    ],
)
def test_the_worker_featurizes_the_pixels_whose_tokens_the_dataset_counted(
    limits: dict[str, int], tokens: int, make: Callable, processor: Qwen2_5_VLProcessor, tmp_path: Path
) -> None:
    """An image of 5 x 10 tokens; a 25th of its area is 1 x 2, four times its area 10 x 20."""
    name = write_image(tmp_path, "a.png", 10 * SIDE, 5 * SIDE)
    item = make([row("<image>", [name])], max_prompt_length=256, **limits)[0]
    handles = [MediaHandle.put(image) for image in item["multi_modal_data"]["images"]]
    features = Featurizer(processor).featurize([handles])
    assert real_ids(item).count(processor.image_token_id) == tokens
    assert features["image_grid_thw"].prod().item() // processor.image_processor.merge_size**2 == tokens


def test_a_line_tells_how_many_images_are_enlarged_or_shrunk_and_from_what_to_what(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small, large = write_image(tmp_path, "a.png", SIDE, 2 * SIDE), write_image(tmp_path, "b.png", 8 * SIDE, 8 * SIDE)
    rows = [row("<image><image>", [small, large]), row("<image>", [small]), row("a")]
    area = SIDE * SIDE
    with caplog.at_level(logging.INFO, logger="verl"):
        make(rows, max_prompt_length=1000, min_pixels=8 * area, max_pixels=16 * area)
    sizes = f"from {SIDE} x {2 * SIDE} to {2 * SIDE} x {4 * SIDE} pixels"
    assert (
        f"data.min_pixels={8 * area} has 2 of 3 images enlarged, the first {sizes}; data.min_pixels=null"
        in caplog.text
    )
    sizes = f"from {8 * SIDE} x {8 * SIDE} to {4 * SIDE} x {4 * SIDE} pixels"
    assert f"data.max_pixels={16 * area} has 1 of 3 images shrunk, the first {sizes}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="verl"):
        make(rows, max_prompt_length=1000)
    assert "images" not in caplog.text


def test_a_prompt_that_is_too_long_names_the_key_that_made_it_long(make: Callable, tmp_path: Path) -> None:
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    options = dict(max_prompt_length=30, filter_overlong_prompts=False)
    enlarging = dict(min_pixels=64 * SIDE * SIDE)
    told = f"lower data.min_pixels={64 * SIDE * SIDE}, which enlarges an image from {SIDE} x {SIDE} to {8 * SIDE} x"
    with pytest.raises(ValueError, match=told):
        make([row("<image>", [name])], **options, **enlarging)[0]
    with pytest.raises(ValueError, match=told):
        make([row("<image>", [name])], max_prompt_length=30, **enlarging)
    large = write_image(tmp_path, "b.png", 8 * SIDE, 8 * SIDE)
    with pytest.raises(ValueError, match="raise it, lower data.max_pixels, or set"):
        make([row("<image>", [large])], **options)[0]
    with pytest.raises(ValueError, match="raise it, or set data.filter_overlong_prompts=true"):
        make([row("word " * 200)], **options)[0]


# ---- length ----


def test_rows_longer_than_the_limit_are_dropped_and_counted(
    make: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By text or by image, at the limit exactly: a row that fits to the token stays, with one token less it goes."""
    small, large = write_image(tmp_path, "a.png", SIDE, SIDE), write_image(tmp_path, "b.png", 8 * SIDE, 8 * SIDE)
    rows = [row("a"), row("word " * 200), row("<image>", [large]), row("<image>", [small]), row("bb cc dd 123456")]
    lengths = [len(real_ids(make([each], max_prompt_length=1000)[0])) for each in rows]
    with caplog.at_level(logging.INFO, logger="verl"):
        dataset = make(rows, max_prompt_length=lengths[4])
    assert "kept 3 of 5 prompts, dropped 2 longer than data.max_prompt_length" in caplog.text
    assert [item["prompt_text"] for item in dataset] == ["a", "<image>", "bb cc dd 123456"]
    assert len(make(rows, max_prompt_length=lengths[4] - 1)) == 2


def test_several_processes_drop_the_rows_that_one_drops(make: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("word " * (index % 7) * 5, number=index) for index in range(30)]
    one = make(rows, max_prompt_length=25)
    monkeypatch.setattr("verl.data.dataset.ROWS_PER_PROCESS", 10)
    several = make(rows, max_prompt_length=25, filter_overlong_prompts_workers=2)
    assert 0 < len(one) < 30
    assert [item["extra"]["number"] for item in several] == [item["extra"]["number"] for item in one]


@pytest.mark.parametrize("workers", [1, 2])
def test_checking_the_rows_leaves_the_folder_of_the_data_as_it_was(
    workers: int, make: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be shared, or not be written at all; results in it would never be read again."""
    monkeypatch.setattr("verl.data.dataset.ROWS_PER_PROCESS", 2)
    options = {"filter_overlong_prompts": True, "filter_overlong_prompts_workers": workers, "check_media": True}
    first = make([row("abc"), row("abc " * P), row("a"), row("b")])
    folder = as_saved_folder(load_rows(first.data_path), tmp_path)
    before = sorted(Path(folder).iterdir())
    dataset = RLHFDataset(folder, first.tokenizer, first.processor, max_prompt_length=P, **options)
    assert len(dataset) == 3
    assert sorted(Path(folder).iterdir()) == before


def test_a_set_with_no_row_short_enough_says_how_long_they_are(make: Callable) -> None:
    with pytest.raises(
        ValueError, match=r"every row of .* is longer than data.max_prompt_length=4: \d+ to \d+ tokens"
    ):
        make([row("a"), row("bb cc")], max_prompt_length=4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_never_cut_short(side: str, make: Callable) -> None:
    with pytest.raises(ValueError, match=f"truncation='{side}' would cut prompts short; use 'error'"):
        make([row("a")], truncation=side)


def test_the_section_and_the_arguments_of_easyr1_give_the_same_items(
    make: Callable, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """An argument goes before the section; what neither gives differs as it does in EasyR1."""
    by_arguments = make([row("a <image>", [write_image(tmp_path, "a.png", SIDE, SIDE)])], min_pixels=4 * SIDE * SIDE)
    section = DataConfig(image_dir=str(tmp_path), max_prompt_length=7, min_pixels=4 * SIDE * SIDE)
    by_section = RLHFDataset(
        by_arguments.data_path, tokenizer, by_arguments.processor, config=section, max_prompt_length=P
    )
    assert real_ids(by_section[0]) == real_ids(by_arguments[0])
    assert len(by_section[0]["input_ids"]) == P
    text = write_json(tmp_path / "text.jsonl", [row("a")])
    assert RLHFDataset(text, tokenizer, None).config.max_prompt_length == 1024
    with pytest.raises(ValueError, match="RLHFDataset takes no promt_key; did you mean prompt_key"):
        make([row("a")], promt_key="prompt")
    with pytest.raises(ValueError, match="data.max_prompt_length=0 is below 1"):
        make([row("a")], max_prompt_length=0)


def test_a_long_row_is_named_with_both_lengths(make: Callable) -> None:
    dataset = make([row("a"), row("abc " * 90)], filter_overlong_prompts=False)
    with pytest.raises(ValueError, match=rf"row 1 of .* has \d+ tokens, data.max_prompt_length={P}; raise it"):
        dataset[1]


@pytest.mark.parametrize("name", ["a[1]", "a*b?", "me@home", "x@y@z"])
def test_any_name_of_a_folder_or_a_file_is_taken_as_it_is(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for split, answer in (("train", "1"), ("test", "2")):
        write_json(folder / f"{split}.jsonl", [{"prompt": "a", "answer": answer}])
        (folder / f"{split}{name}.csv").write_text(f"prompt,answer\na,{answer}\n")
        assert answers_of(DataConfig(train_files=f"{folder}/{split}{name}.csv").train_files, tokenizer) == [answer]
    for csv in folder.glob("*.csv"):
        csv.unlink()
    assert answers_of(DataConfig(train_files=str(folder)).train_files, tokenizer) == ["1"]
    assert answers_of(DataConfig(train_files=f"{folder}@test").train_files, tokenizer) == ["2"]
    with pytest.raises(ValueError, match="does not exist|has not the form"):
        DataConfig(train_files=f"{folder}x@test")


# ---- answers as the file holds them ----


def answers_of(path: str, tokenizer: PreTrainedTokenizerBase, **options: Any) -> list[Any]:
    dataset = RLHFDataset(path, tokenizer, None, max_prompt_length=P, **options)
    return [dataset[index]["ground_truth"] for index in range(len(dataset))]


@pytest.mark.parametrize("lines", [True, False])
def test_json_texts_stay_texts_and_numbers_stay_whole(
    lines: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """A text that looks like a date, a whole number beside a fraction, a number beside a text."""
    for number, answers in enumerate(
        (["2023-05-17", "12:30"], ["2023-05-17", "2024-01-02"], [1, 2.5], [1, "x"], [0.5])
    ):
        rows = [{"prompt": "a", "answer": answer, "kept": {"since": "2023-05-17"}} for answer in answers]
        path = tmp_path / f"{number}.json{'l' * lines}"
        path.write_text("\n".join(map(json.dumps, rows)) if lines else json.dumps(rows))
        found = answers_of(str(path), tokenizer)
        assert (found, list(map(type, found))) == (answers, list(map(type, answers)))
        extra = RLHFDataset(str(path), tokenizer, None, max_prompt_length=P)[0]["extra"]
        assert extra == {"kept": {"since": "2023-05-17"}}


def test_csv_cells_are_the_texts_that_they_are(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,answer,note\na,007,\nb,NA,x\nc,1.50,2023-05-17\nd,True,null\n")
    assert answers_of(str(tmp_path / "d.csv"), tokenizer) == ["007", "NA", "1.50", "True"]
    dataset = RLHFDataset(str(tmp_path / "d.csv"), tokenizer, None, max_prompt_length=P)
    assert [dataset[index]["extra"]["note"] for index in range(4)] == [None, "x", "2023-05-17", "null"]


def test_class_labels_give_their_names(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    features = datasets.Features(
        prompt=datasets.Value("string"),
        answer=datasets.ClassLabel(names=["cat", "dog"]),
        answer2=datasets.Value("int8"),
    )
    columns = {"prompt": ["a", "b", "c"], "answer": [1, 0, None], "answer2": [1, 0, 1]}
    path = as_saved_folder(datasets.Dataset.from_dict(columns, features), tmp_path)
    assert answers_of(path, tokenizer) == ["dog", "cat", None]
    assert answers_of(path, tokenizer, answer_key="answer2") == [1, 0, 1]


def test_rows_without_an_answer_are_counted_where_others_have_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty cell of CSV and a null of JSON. A set without any answer is one whose reward function needs none."""
    (tmp_path / "d.csv").write_text("prompt,answer\na,1\nb,\nc,2\nd,\n")
    assert answers_of(str(tmp_path / "d.csv"), tokenizer) == ["1", None, "2", None]
    expected = "the answer (data.answer_key=answer) is null in 2 of 4 rows; the first is row 1"
    assert caplog.text.count("is null in") == 1 and expected in caplog.text
    answers_of(write_json(tmp_path / "mixed.jsonl", [row("a", answer=one) for one in ("x", 2, None)]), tokenizer)
    assert "is null in 1 of 3 rows; the first is row 2" in caplog.text
    caplog.clear()
    for answers in ([None, None], ["", "x"], [0, 1]):
        answers_of(write_json(tmp_path / "d.jsonl", [row("a", answer=one) for one in answers]), tokenizer)
    assert "is null in" not in caplog.text


# ---- what is wrong with a row ----


def test_placeholders_that_do_not_match_the_images_are_reported_for_all_rows_at_once(
    make: Callable, tmp_path: Path
) -> None:
    """Before the overlong filter, which would drop row 1."""
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    rows = [
        row("<image>", [name]),
        row("<image><image>" + "abc " * 200, [name]),
        row("no placeholder", [name]),
    ]
    with pytest.raises(ValueError) as caught:
        make(rows)
    message = str(caught.value)
    assert message.startswith("2 of 3 rows cannot be read: row 1 of ")
    for part in ("2 <image> in the prompt", "0 <image> in the prompt", "but 1 images"):
        assert part in message
    assert "row 0" not in message


def test_a_long_list_of_mismatches_is_cut_short(make: Callable, tmp_path: Path) -> None:
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    with pytest.raises(ValueError, match=r"^20 of 20 rows cannot be read: row 0 .*; and 19 more$") as caught:
        make([row("none", [name])] * 20)
    assert len(str(caught.value)) < 500


def test_placeholders_in_a_set_without_the_image_column_name_that_column(make: Callable) -> None:
    problem = r"1 of 1 rows .* no column data.image_key=images; name the column, or write \\<image> for the word"
    with pytest.raises(ValueError, match=problem):
        make([{"prompt": "<image>", "answer": "1", "picture": []}])


def test_a_template_that_adds_a_placeholder_is_caught(make: Callable, tmp_path: Path) -> None:
    (tmp_path / "f.jinja").write_text("<image>{{ content }}")
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    with pytest.raises(
        ValueError, match="row 0 of .*: 2 <image> in the prompt .after data.format_prompt., but 1 images"
    ):
        make([row("<image>", [name])], format_prompt=str(tmp_path / "f.jinja"))


def test_a_prompt_that_spells_out_a_media_token_is_caught(make: Callable) -> None:
    with pytest.raises(ValueError, match=r"row 1 of .*: 0 images, but 1 of <\|image_pad\|>"):
        make([row("a"), row("what does <|image_pad|> mean?")])


@pytest.mark.parametrize("cell", [["absent.png"], ["broken.png"], [{"bytes": None, "path": None}]])
def test_an_image_that_cannot_be_opened_names_its_row_when_loading(
    cell: list[Any], make: Callable, tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"row 1 of .*rows\.jsonl'?: image 0 cannot be read"):
        make([row("a"), row("<image>", cell)])


def test_an_image_whose_pixels_are_damaged_names_its_row_in_the_file(make: Callable, tmp_path: Path) -> None:
    """Row 0 is dropped for its length, which must not move the number; the header of the image is whole."""
    buffer = io.BytesIO()
    Image.open(tmp_path / write_image(tmp_path, "a.png", 100, 100)).save(buffer, format="PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:2000])
    dataset = make([row("abc " * 200), row("<image>", ["cut.png"])])
    with pytest.raises(ValueError, match="row 1 of .*: image 0 cannot be read"):
        dataset[0]


def test_an_image_too_narrow_for_the_processor_names_its_row(make: Callable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="row 0 of .*: .*aspect ratio"):
        make([row("<image>", [write_image(tmp_path, "a.png", 2000, 2)])])


@pytest.mark.parametrize(
    ("option", "key"), [("prompt_key", "problem"), ("answer_key", "solution")], ids=["prompt", "answer"]
)
def test_a_missing_column_is_named_with_those_there_are(option: str, key: str, make: Callable) -> None:
    with pytest.raises(ValueError, match=f"data.{option}={key} is no column of .*; it has prompt, answer, images"):
        make([row("a")], **{option: key})


def test_columns_may_have_other_names(make: Callable, tmp_path: Path) -> None:
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    rows = [{"problem": "<image>?", "solution": 7, "picture": [name], "images": "kept"}]
    item = make(rows, prompt_key="problem", answer_key="solution", image_key="picture")[0]
    assert item["ground_truth"] == 7
    assert item["extra"] == {"images": "kept"}
    assert len(item["multi_modal_data"]["images"]) == 1


def test_a_prompt_that_is_no_text_names_its_row(make: Callable) -> None:
    with pytest.raises(
        ValueError, match="row 1 of .*: the prompt is None, neither a text nor a list of chat messages"
    ):
        make([row("a"), row(None)])


def test_a_single_image_instead_of_a_list_is_refused(make: Callable) -> None:
    with pytest.raises(ValueError, match="data.image_key=images: each row of .* needs a list of images"):
        make([row("<image>", "a.png")])


def test_a_single_image_beside_lists_is_refused_or_skipped_by_its_row(make: Callable, tmp_path: Path) -> None:
    name = write_image(tmp_path, "a.png", SIDE, SIDE)
    rows = [row("<image>", [name]), row("<image>", name), row("a", None)]
    with pytest.raises(
        ValueError, match=r"^row 1 of .*: data.image_key=images has to be a list of images, not 'a.png'$"
    ):
        make(rows)
    for filtered in (True, False):
        dataset = make(rows, on_bad_row="skip", filter_overlong_prompts=filtered)
        assert (dataset.skipped, len(dataset)) == ({1}, 3)


def test_images_for_a_text_model_name_the_first_row_that_has_them(make: Callable) -> None:
    with pytest.raises(ValueError, match="row 1 of .* has images, but .* is a text-only model"):
        make([row("a"), row("<image>", ["a.png"])], processor=None)


def test_an_empty_video_column_is_none(make: Callable) -> None:
    assert len(make([row("a", videos=None), row("b", videos=[])])) == 2


def test_a_set_without_rows_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    empty = datasets.Dataset.from_dict({"prompt": [], "answer": []})
    with pytest.raises(ValueError, match=r"cannot load the data .*d\.parquet.* no data"):
        RLHFDataset(as_parquet(empty, tmp_path), tokenizer, None)
    with pytest.raises(ValueError, match=r"cannot load the data .*: d\.jsonl is empty"):
        RLHFDataset(as_jsonl(empty, tmp_path), tokenizer, None)
