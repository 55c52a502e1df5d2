# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_data_sources.py
"""Several files with shares, rows that cannot be read, and files that are hard to read."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from verl.data import files
from verl.data.dataset import RLHFDataset
from verl.data.files import load_rows
from verl.data.loader import PromptLoader, create_dataloader
from verl.data.order import epoch_order, mixed_order
from verl.data.sources import JoinedDataset
from verl.trainer.config import DataConfig, load_config
from verl.utils.tokenizer import get_processor

pytestmark = pytest.mark.usefixtures("private_cache")


def write_rows(path: Path, answers: list[str], **columns: Any) -> str:
    rows = [{"prompt": "?", "answer": answer, **columns} for answer in answers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def three_files(tmp_path: Path) -> list[str]:
    """Of 10, 4 and 6 rows, whose answers are a0 to a9 and so on."""
    sizes = {"a": 10, "b": 4, "c": 6}
    return [write_rows(tmp_path / f"{name}.jsonl", [f"{name}{i}" for i in range(n)]) for name, n in sizes.items()]


def loader_of(
    train_files: Any, tokenizer: PreTrainedTokenizerBase, val_files: Any = None, processor: Any = None, **settings: Any
):
    settings = {"max_prompt_length": 32, "rollout_batch_size": 4, "filter_overlong_prompts": False, **settings}
    config = DataConfig(train_files=train_files, val_files=val_files or train_files, **settings)
    return create_dataloader(config, tokenizer, processor)


def weighted(paths: list[str], *weights: float) -> list[str]:
    return [f"{path}:{weight}" for path, weight in zip(paths, weights, strict=True)]


def draw(loader: PromptLoader, times: int) -> list[str]:
    return [answer for _ in range(times) for answer in loader.draw()["ground_truth"]]


# ---- several files ----


def test_several_files_without_weights_are_one_set(three_files, tokenizer) -> None:
    train, val = loader_of(three_files, tokenizer)
    assert Counter(draw(train, 5)) == Counter(
        a for name, n in (("a", 10), ("b", 4), ("c", 6)) for a in [f"{name}{i}" for i in range(n)]
    )
    assert sum(len(batch["ground_truth"]) for batch in val) == 20


def test_one_file_in_a_list_is_drawn_as_the_file_alone(three_files, tokenizer) -> None:
    alone, listed = (loader_of(files, tokenizer)[0] for files in (three_files[0], three_files[:1]))
    assert draw(alone, 6) == draw(listed, 6)


def test_weights_are_the_shares_of_the_files_in_every_epoch(three_files, tokenizer) -> None:
    """Of 20 prompts an epoch, weights 5, 3, 2 give 10, 6 and 4."""
    train, _ = loader_of(weighted(three_files, 5, 3, 2), tokenizer, three_files)
    for _ in range(3):
        assert Counter(answer[0] for answer in draw(train, 5)) == {"a": 10, "b": 6, "c": 4}


def test_a_source_gives_every_row_before_it_gives_one_again(three_files, tokenizer) -> None:
    """In four epochs, b's 4 rows are drawn 24 times and c's 6 rows 16 times; a's 10 are drawn once an epoch."""
    train, _ = loader_of(weighted(three_files, 5, 3, 2), tokenizer, three_files)
    drawn = Counter(draw(train, 20))
    times = {name: {drawn[answer] for answer in drawn if answer[0] == name} for name in "abc"}
    assert times == {"a": {4}, "b": {6}, "c": {2, 3}}


@pytest.mark.parametrize("drawn", [1, 4, 7])
def test_a_mixture_goes_on_after_a_checkpoint_as_if_nothing_had_happened(drawn, three_files, tokenizer) -> None:
    first, second = (loader_of(weighted(three_files, 1, 1, 2), tokenizer, three_files)[0] for _ in range(2))
    draw(first, drawn)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert draw(first, 8) == draw(second, 8)


def test_other_weights_than_the_checkpoints_are_refused(three_files, tokenizer) -> None:
    one, other = (
        loader_of(weighted(three_files, *weights), tokenizer, three_files)[0] for weights in ((1, 1, 1), (1, 1, 2))
    )
    with pytest.raises(ValueError, match=r"had weights=\[1.0, 1.0, 1.0\], this run has \[1.0, 1.0, 2.0\]"):
        other.load_state_dict(one.state_dict())


def test_unshuffled_sources_take_turns_in_their_files_order() -> None:
    assert mixed_order([4, 2], [2, 1], epoch=0, shuffle=False, seed=0).tolist() == [0, 4, 1, 2, 5, 3]


def test_a_small_share_is_drawn_in_some_epochs_and_in_the_mean_as_often_as_its_weight_says() -> None:
    """Of 30 rows an epoch, weights 100 and 1 give the second source 0.297 a draw."""
    drawn = [np.sum(mixed_order([20, 10], [100, 1], epoch, True, 0) >= 20) for epoch in range(200)]
    assert set(drawn) == {0, 1}
    assert np.mean(drawn) == pytest.approx(30 / 101, abs=0.01)
    assert all(len(mixed_order([1, 1, 1], [1, 1, 1], epoch, True, 0)) == 3 for epoch in range(5))


def test_passes_over_a_source_and_sources_of_one_size_have_orders_of_their_own() -> None:
    """Two sources of 8 rows; an epoch has 6 of each. Later shuffling does not change which ones."""
    epochs = [set(mixed_order([8, 8, 8], [1, 1, 2], epoch, True, 3).tolist()) for epoch in range(8)]
    of_one, of_other = ([{row % 8 for row in rows if row // 8 == source} for rows in epochs] for source in (0, 1))
    assert of_one != of_other
    assert of_one[4:] != of_one[:4]  # four epochs are three passes


def test_sources_are_shuffled_among_each_other() -> None:
    patterns = [(mixed_order([8, 8], [1, 1], epoch, True, 3) < 8).tolist() for epoch in range(2)]
    in_turns = (mixed_order([8, 8], [1, 1], 0, False, 3) < 8).tolist()
    assert patterns[0] != patterns[1] and in_turns not in patterns


def test_other_rows_of_a_source_take_the_places_of_those_that_are_skipped() -> None:
    """Shares stay, and so does everything else."""
    for epoch in range(4):
        whole = mixed_order([6, 4], [2, 3], epoch, True, 0)
        less = mixed_order([6, 4], [2, 3], epoch, True, 0, skipped={1, 2, 9})
        assert not {1, 2, 9} & set(less.tolist())
        assert ((whole < 6) == (less < 6)).all()
        assert all(one == other for one, other in zip(whole, less, strict=True) if one not in {1, 2, 9})


def test_equal_shares_by_size_draw_every_row_once_an_epoch() -> None:
    for epoch in range(3):
        assert sorted(mixed_order([5, 7], [5, 7], epoch, True, 1)) == list(range(12))
        assert sorted(epoch_order(12, epoch, True, 1)) == list(range(12))


def test_a_weight_on_a_lone_file_is_refused(tmp_path) -> None:
    (tmp_path / "a.jsonl").touch()
    for value in (f"{tmp_path}/a.jsonl:0.5", f"['{tmp_path}/a.jsonl:2']"):
        with pytest.raises(ValueError, match="has a weight, which means something beside other items only"):
            load_config([f"data.train_files={value}"])


def test_a_path_may_end_like_a_weight(tmp_path) -> None:
    (tmp_path / "x:2").mkdir()
    config = load_config([f"data.train_files=['{tmp_path}/x:2']", f"data.val_files=['{tmp_path}/x:2','a/b@test']"])
    assert config.data.train_files == [f"{tmp_path}/x:2"]
    config = load_config([f"data.train_files=['{tmp_path}/x:2:0.25','a/b@train[:9]:3']"])
    assert config.data.train_files == [f"{tmp_path}/x:2:0.25", "a/b@train[:9]:3.0"]


# ---- rows that cannot be read ----


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Rows 0 to 9 of `rows.jsonl` have pictures; picture 3 then loses its last bytes and 7 becomes no picture."""
    noise = np.random.default_rng(0).integers(0, 256, (10, 56, 56, 3), dtype=np.uint8)
    for index in range(10):
        Image.fromarray(noise[index]).save(tmp_path / f"{index}.png")
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    rows = [{"prompt": "<image>?", "answer": str(i), "images": [f"{i}.png"]} for i in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "rows.jsonl"


@pytest.fixture
def read(pictures: Path, tokenizer: PreTrainedTokenizerBase, tiny_model_path: str) -> Callable[..., RLHFDataset]:
    processor = get_processor(tiny_model_path)
    options = {"image_dir": str(pictures.parent), "max_prompt_length": 32}
    return lambda **settings: RLHFDataset(str(pictures), tokenizer, processor, **{**options, **settings})


def test_a_damaged_picture_is_found_before_training_and_named(read) -> None:
    """Its header is whole, so that only decoding finds it."""
    assert len(read()) == 10
    with pytest.raises(ValueError, match=r"^row 3 of .*rows.jsonl.*: image 0 cannot be read: "):
        read(check_media=True)


def test_rows_left_out_are_counted_and_named(read, pictures, caplog) -> None:
    (pictures.parent / "7.png").write_bytes(b"no picture")
    dataset = read(check_media=True, on_bad_row="skip")
    assert "data.on_bad_row=skip leaves out 1 of 10 rows: row 7 of " in caplog.text
    assert "data.on_bad_row=skip leaves out 1 of 10 rows: row 3 of " in caplog.text
    loader = PromptLoader(JoinedDataset([dataset]), 4, shuffle=True, seed=0)
    assert loader.num_prompts == 8
    assert sorted(draw(loader, 2)) == ["0", "1", "2", "4", "5", "6", "8", "9"]


def test_mismatches_and_odd_prompts_are_left_out_too(read, pictures, caplog) -> None:
    lines = pictures.read_text().splitlines()
    lines[1] = json.dumps({"prompt": "no place", "answer": "1", "images": ["1.png"]})
    lines[2] = json.dumps({"prompt": None, "answer": "2", "images": []})
    pictures.write_text("\n".join(lines))
    with pytest.raises(ValueError, match="2 of 10 rows cannot be read"):
        read()
    assert read(on_bad_row="skip").skipped == {1, 2}
    assert "row 1 of" in caplog.text and "row 2 of" in caplog.text


def skipping(pictures: Path) -> dict[str, Any]:
    """Settings that find the damaged picture and leave it out."""
    return {"image_dir": str(pictures.parent), "min_pixels": None, "check_media": True, "on_bad_row": "skip"}


def test_skipped_rows_of_a_second_file_and_of_the_held_out_set_are_not_drawn(
    read, pictures, tokenizer, tiny_model_path, tmp_path
) -> None:
    text = write_rows(tmp_path / "text.jsonl", ["t0", "t1", "t2"])
    files = [text, str(pictures)]
    train, val = loader_of(files, tokenizer, files, get_processor(tiny_model_path), **skipping(pictures))
    good = {"t0", "t1", "t2", *(str(row) for row in range(10) if row != 3)}
    assert train.num_prompts == val.num_prompts == 12
    assert set(draw(train, 3)) == good
    assert [answer for batch in val for answer in batch["ground_truth"]] == sorted(
        good, key=lambda a: (a[0] != "t", a)
    )


def test_a_mixture_with_a_damaged_picture_draws_without_end(read, pictures, tokenizer, tiny_model_path, tmp_path):
    text = write_rows(tmp_path / "text.jsonl", [f"t{row}" for row in range(6)])
    files = [f"{pictures}:9", f"{text}:1"]
    settings = {**skipping(pictures), "rollout_batch_size": 8}
    train, _ = loader_of(files, tokenizer, text, get_processor(tiny_model_path), **settings)
    drawn = draw(train, 12)
    assert "3" not in drawn and any(answer[0] == "t" for answer in drawn)


def test_a_run_goes_on_past_a_picture_that_has_vanished(read, pictures) -> None:
    before = PromptLoader(read(), 1, shuffle=True, seed=5)
    before.draw()
    (pictures.parent / "7.png").unlink()
    after = PromptLoader(read(check_media=True, on_bad_row="skip"), 1, shuffle=True, seed=5)
    after.load_state_dict(before.state_dict())
    expected = [str(row) for row in epoch_order(10, 0, True, seed=5)[1:] if row not in (3, 7)]
    assert draw(after, len(expected)) == expected


def test_a_set_without_a_good_row_is_refused(read, pictures) -> None:
    for index in range(10):
        (pictures.parent / f"{index}.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="no row of .* can be read: row 0") as caught:
        read(on_bad_row="skip")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("drawn", range(4))
def test_a_run_that_met_a_damaged_picture_goes_on_without_it(drawn, read) -> None:
    """The rows drawn after the restart follow the first run's order, without the damaged one."""
    order = epoch_order(10, 0, True, seed=5).tolist()
    before = PromptLoader(read(), 1, shuffle=True, seed=5)
    for _ in range(min(drawn, order.index(3))):
        before.draw()
    after = PromptLoader(read(check_media=True, on_bad_row="skip"), 1, shuffle=True, seed=5)
    after.load_state_dict(before.state_dict())
    left = [str(row) for row in order[before.state_dict()["position"] :] if row != 3]
    assert draw(after, len(left)) == left
    assert after.state_dict()["epoch"] == 0
    assert draw(after, 9) == [str(row) for row in epoch_order(10, 1, True, seed=5) if row != 3]


def test_several_processes_find_what_one_finds(read, monkeypatch, caplog) -> None:
    monkeypatch.setattr("verl.data.dataset.ROWS_PER_PROCESS", 2)
    dataset = read(check_media=True, on_bad_row="skip", filter_overlong_prompts_workers=2)
    assert dataset.skipped == {3}


# ---- files that are hard to read ----


def test_a_row_group_too_large_is_read_in_pieces_to_the_same_rows(tmp_path, monkeypatch) -> None:
    """The bounds are lowered; Arrow's own, 2 GiB, was reached once by hand."""
    blobs = [[{"bytes": bytes([i]) * 1000, "path": None}] for i in range(50)]
    table = pa.table({"prompt": [f"<image>{i}" for i in range(50)], "answer": ["1"] * 50, "images": blobs})
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=50, use_dictionary=False)
    whole = load_rows(str(tmp_path / "big.parquet"))
    monkeypatch.setattr(files, "LARGEST_ROW_GROUP", 20_000)
    monkeypatch.setattr(files, "ROW_GROUP", 5_000)
    pieces = load_rows(str(tmp_path / "big.parquet"))
    assert pieces.to_list() == whole.to_list()
    (copy,) = Path(datasets.config.HF_DATASETS_CACHE).glob("small_row_groups/*/big.parquet")
    assert pq.ParquetFile(copy).num_row_groups > 5
    changed = copy.stat().st_mtime_ns
    load_rows(str(tmp_path / "big.parquet"))
    assert copy.stat().st_mtime_ns == changed  # made once
    pq.write_table(table.slice(0, 40), tmp_path / "big.parquet", row_group_size=50, use_dictionary=False)
    assert load_rows(str(tmp_path / "big.parquet")).num_rows == 40  # and anew for another file


def test_media_of_columns_that_are_not_used_stay_undecoded(tmp_path, tokenizer) -> None:
    """JSON beside them is decoded."""
    picture = {"bytes": b"no picture", "path": None}
    rows = datasets.Dataset.from_dict(
        {
            "prompt": ["a"],
            "answer": ["1"],
            "thumbnail": [picture],
            "views": [[{"picture": picture, "note": {"x": [1, "y"]}}]],
        },
        features=datasets.Features(
            prompt=datasets.Value("string"),
            answer=datasets.Value("string"),
            thumbnail=datasets.Image(),
            views=datasets.List({"picture": datasets.Image(), "note": datasets.Json()}),
        ),
    )
    rows.save_to_disk(tmp_path / "saved")
    item = RLHFDataset(str(tmp_path / "saved"), tokenizer, None)[0]
    assert item["extra"] == {"thumbnail": picture, "views": [{"picture": picture, "note": {"x": [1, "y"]}}]}


@pytest.mark.parametrize("name", ["d.csv", "d.jsonl", "d.json"])
def test_text_that_is_not_utf8_is_refused_with_the_remedy(name, tmp_path) -> None:
    body = "prompt,answer\ncaf\xe9,1\n" if name == "d.csv" else '{"prompt": "caf\xe9", "answer": "1"}\n'
    (tmp_path / name).write_bytes(body.encode("latin-1"))
    with pytest.raises(
        ValueError, match="its text is not UTF-8: convert it, as by `iconv -f LATIN1 -t UTF-8`"
    ) as caught:
        load_rows(str(tmp_path / name))
    assert len(str(caught.value)) < 700


def test_the_row_of_text_that_is_not_utf8_counts_over_the_pieces_of_its_column() -> None:
    good, bad = pa.array(["a", "b", "c"]), pa.array([b"d", b"\xe9"]).view(pa.string())
    table = pa.table({"prompt": pa.chunked_array([good, bad])})
    with pytest.raises(ValueError, match="column prompt in row 4: "):
        files._require_utf8(datasets.Dataset(table))


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_set_of_the_hub_is_read_as_its_files_are(kind, tmp_path, monkeypatch) -> None:
    """The library finds the files of a folder as it finds a hub's; only where they lie differs."""
    (tmp_path / "set").mkdir()
    if kind == "csv":
        (tmp_path / "set" / "train.csv").write_text("prompt,answer\na,007\nb,NA\n")
    else:
        write_rows(tmp_path / "set" / "train.jsonl", ["2023-05-17", "2024-01-02"])
    from_hub = files._load_from_hub(str(tmp_path / "set"), "train")
    assert from_hub.to_list() == load_rows(str(tmp_path / "set")).to_list()
    assert from_hub["answer"][:] == (["007", "NA"] if kind == "csv" else ["2023-05-17", "2024-01-02"])
