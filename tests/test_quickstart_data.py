# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_quickstart_data.py
"""The quickstart's data, warm start, reward and summary."""

from __future__ import annotations

import json
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import make_digits
import numpy as np
import pytest
import report_quickstart
import torch
from datasets import load_dataset
from picture_task import encode_prompts, generate_answers, score_answers, write_examples
from sklearn.datasets import load_digits
from tiny_qwen import build_model, build_processor, build_tokenizer, save_tiny
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from warm_start import response_batch, response_loss, warm_start

from verl.data.dataset import RLHFDataset

ROOT = Path(__file__).resolve().parent.parent
TINY_SIZES = dict(hidden_size=64, num_layers=1, num_heads=4, vision_hidden_size=32, vision_depth=1, vision_heads=2)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Less of what takes time and is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_digits, "NUM_SLICE_PAIRS", 2)
        patch.setattr(make_digits, "SFT_BATCH_SIZE", 8)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quickstart folder whose model has had no warm start."""
    output = tmp_path_factory.mktemp("digits")
    make_digits.main(output, seed=3, steps=0)
    return output


@pytest.fixture(scope="module")
def digits() -> make_digits.DigitImages:
    return make_digits.DigitImages()


def model_and_processor() -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    tokenizer = build_tokenizer([make_digits.QUESTION, make_digits.solution(3, 9)])
    return build_model(tokenizer, seed=0, **TINY_SIZES), build_processor(tokenizer)


def test_splits_share_no_source_image_and_use_each_of_theirs_twice(made: Path) -> None:
    """1797 digits: rows 0..1286 of the set train, the other 510 test, each once on the left and once on the right."""
    for split, expected in (("train", range(1287)), ("test", range(1287, 1797))):
        rows = load_dataset("parquet", data_files=str(made / f"{split}.parquet"), split="train")
        for side in np.array(rows["sources"]).T:
            assert sorted(side) == list(expected)


def test_a_row_shows_the_digits_that_it_says(made: Path) -> None:
    """The picture's halves are the source's strokes, dark where the 8 x 8 original is; the answer is their sum."""
    source = load_digits()
    row = load_dataset("parquet", data_files=str(made / "test.parquet"), split="train")[7]
    picture = 255 - np.asarray(row["images"][0], dtype=float)  # (56, 112), high on strokes
    assert picture.shape == (56, 112)
    for half, index, label in zip(np.split(picture, 2, axis=1), row["sources"], row["digits"], strict=True):
        shrunk = half.reshape(8, 7, 8, 7).mean(axis=(1, 3))
        assert np.corrcoef(shrunk.ravel(), source.images[index].ravel())[0, 1] > 0.95
        assert source.target[index] == label
    assert row["answer"] == str(sum(row["digits"]))


def test_the_seed_decides_the_training_rows_and_leaves_the_test_set_alone(made: Path, tmp_path: Path) -> None:
    make_digits.main(tmp_path / "same", seed=3, steps=0)
    make_digits.main(tmp_path / "other", seed=4, steps=0)
    for name in ("train.parquet", "test.parquet", "model/model.safetensors"):
        assert (made / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert (made / "test.parquet").read_bytes() == (tmp_path / "other" / "test.parquet").read_bytes()
    for name in ("train.parquet", "model/model.safetensors"):
        assert (made / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_more_held_out_rows_begin_with_the_default_ones_and_use_images_evenly(digits: make_digits.DigitImages) -> None:
    """Six images: seven rows are a round of six and one more."""
    form = make_digits.FORMS["short"]
    six, seven = (
        [
            row.facts["sources"]
            for row in make_digits.build_split(digits, range(6), np.random.default_rng(0), form, rows)
        ]
        for rows in (None, 7)
    )
    assert seven[:6] == six and len(seven) == 7
    assert sorted(left for left, _ in six) == list(range(6))


def test_a_long_answer_names_the_digits_and_then_adds_them(digits: make_digits.DigitImages) -> None:
    """60 to 100 tokens, and the reward function takes it."""
    text = make_digits.long_solution(9, 0, 8, 9)
    assert text == (
        "<think>I see 9, 0, 8 and 9. We start with 9. We add 0 to 9 and get 9. We add 8 to 9 and get 17. "
        "We add 9 to 17 and get 26. So the sum of the 4 digits is 26.</think> \\boxed{26}"
    )
    tokenizer = build_tokenizer(
        [make_digits.long_solution(*row) for row in ((1, 2, 3, 4), (9, 8, 7, 6), (5, 0, 5, 0))]
    )
    for labels in ((0, 0, 0, 0), (9, 9, 9, 9)):
        assert 60 <= len(tokenizer(make_digits.long_solution(*labels)).input_ids) <= 96
    assert score_answers([text], ["26"])["overall"] == 1
    example = make_digits.FORMS["long"].example(digits, [0, 1, 2, 3])
    assert example.image.size == (224, 56)
    assert example.answer == "6" and example.solution == make_digits.long_solution(0, 1, 2, 3)


def test_supervision_and_the_trainers_dataset_build_the_same_prompt(made: Path) -> None:
    """26 ids: a warm start on any other prompt would be taught for nothing."""
    processor = Qwen2_5_VLProcessor.from_pretrained(made / "model")
    dataset = RLHFDataset(
        str(made / "test.parquet"), processor.tokenizer, processor, max_prompt_length=64, min_pixels=None
    )
    item = dataset[0]
    real = item["input_ids"][item["attention_mask"].bool()]
    inputs = encode_prompts(processor, item["multi_modal_data"]["images"], [make_digits.QUESTION])
    assert real.tolist() == inputs["input_ids"][0].tolist()
    assert len(real) == 26
    assert processor.tokenizer.decode(real).endswith(
        "What is the sum of the digits?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_taught_response_ends_its_turn_and_its_padding_does_not_count() -> None:
    """9 + 9 = 18 has two digits more than 1 + 2 = 3, once in the sum and once in the box."""
    _, processor = model_and_processor()
    texts = [make_digits.solution(1, 2), make_digits.solution(9, 9)]
    responses, mask = response_batch(processor.tokenizer, texts)
    assert mask.sum(dim=1).tolist() == [responses.shape[1] - 2, responses.shape[1]]
    for row, real, text in zip(responses, mask.bool(), texts, strict=True):
        assert processor.tokenizer.decode(row[real]) == text + "<|im_end|>"


def test_the_supervised_loss_is_the_models_own_over_the_real_response_tokens(digits: make_digits.DigitImages) -> None:
    """Against transformers' loss with every other label ignored, for responses of two lengths."""
    model, processor = model_and_processor()
    prompts = encode_prompts(
        processor, [digits.side_by_side(0, 1), digits.side_by_side(2, 3)], [make_digits.QUESTION] * 2
    )
    texts = [make_digits.solution(1, 2), make_digits.solution(9, 9)]
    responses, mask = response_batch(processor.tokenizer, texts)
    loss = response_loss(model, prompts, responses, mask)

    inputs = dict(prompts)
    added = {"input_ids": responses, "attention_mask": mask, "mm_token_type_ids": torch.zeros_like(responses)}
    for name, columns in added.items():
        inputs[name] = torch.cat([inputs[name], columns], dim=1)
    ignored = torch.full_like(prompts["input_ids"], -100)
    labels = torch.cat([ignored, responses.masked_fill(mask == 0, -100)], dim=1)
    assert loss.item() == pytest.approx(model(**inputs, labels=labels).loss.item(), rel=1e-5)


def test_a_warm_start_repeats_exactly_and_changes_every_part_of_the_model(digits: make_digits.DigitImages) -> None:
    """Two runs of a seed end in the same weights, bit for bit; the vision tower learns too."""

    def trained(steps: int) -> dict[str, torch.Tensor]:
        model, processor = model_and_processor()
        examples = [make_digits.FORMS["short"].example(digits, [row, row + 1]) for row in range(8)]
        warm_start(model, processor, lambda: examples, steps)
        return model.state_dict()

    untrained, once, again = trained(0), trained(2), trained(2)
    for name, weight in once.items():
        assert torch.equal(weight, again[name]), name
        assert not torch.equal(weight, untrained[name]), name


def test_generated_answers_do_not_depend_on_who_is_in_the_batch(
    digits: make_digits.DigitImages, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = model_and_processor()
    images = [digits.side_by_side(0, 1), digits.side_by_side(2, 3), digits.side_by_side(4, 5)]
    prompts = [make_digits.QUESTION] * 3
    together = generate_answers(model, processor, images, prompts)
    monkeypatch.setattr("picture_task.GENERATION_BATCH_SIZE", 2)
    assert generate_answers(model, processor, images, prompts) == together


@pytest.mark.parametrize(
    ("response", "accuracy", "in_form"),
    [
        (make_digits.solution(3, 9), 1, 1),
        ("<think>I see 9 and 4. 9+4=13.</think> \\boxed{13}", 0, 1),
        ("\\boxed{12}", 1, 0),
        ("<think>12</think> 12", 0, 0),
        ("<think>I see 3 and 9.</think> \\boxed{13} or \\boxed{12}", 1, 0),  # the last box is the answer
        ("", 0, 0),
    ],
)
def test_the_reward_is_the_sum_and_a_little_for_the_form(response: str, accuracy: float, in_form: float) -> None:
    """overall = 0.9 accuracy + 0.1 format, for the true sum 12."""
    compute_score = runpy.run_path(str(ROOT / "examples/reward_function/digits.py"))["compute_score"]
    (score,) = compute_score([{"response": response, "response_length": 9, "ground_truth": "12"}])
    expected = {"overall": 0.9 * accuracy + 0.1 * in_form, "format": in_form, "accuracy": accuracy}
    assert score == pytest.approx(expected)


def test_answers_are_marked_by_the_reward_function_and_averaged() -> None:
    marks = score_answers([make_digits.solution(3, 9), make_digits.solution(1, 1)], ["12", "3"])
    assert marks == pytest.approx({"overall": (1.0 + 0.1) / 2, "format": 1.0, "accuracy": 0.5})


def write_run(folder: Path, model: Path, data: Path) -> None:
    """What the trainer leaves behind after two steps which changed nothing."""
    lines = [
        {"step": 0, "val": {"reward_score": 0.2, "accuracy_reward": 0.125}},
        {"step": 1, "reward": {"overall": 0.25, "accuracy": 0.2}},
        {"step": 2, "reward": {"overall": 0.75, "accuracy": 0.7}},
        {"step": 2, "val": {"reward_score": 0.6, "accuracy_reward": 0.625}},
    ]
    actor = folder / "global_step_2" / "actor"
    actor.mkdir(parents=True)
    (folder / "experiment_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "worker": {"actor": {"model": {"model_path": str(model)}}},
        "data": {"val_files": str(data)},
        "trainer": {"project_name": "quickstart"},
    }
    (folder / "experiment_config.json").write_text(json.dumps(config))
    weights = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    torch.save(weights.state_dict(), actor / "model_world_size_1_rank_0.pt")
    weights.config.save_pretrained(actor / "huggingface")
    Qwen2_5_VLProcessor.from_pretrained(model).save_pretrained(actor / "huggingface")


def test_the_summary_reads_the_log_and_draws_the_curve(
    tmp_path: Path, digits: make_digits.DigitImages, capsys: pytest.CaptureFixture
) -> None:
    """Lines of a step are merged; rewards are means over (up to) five steps, here both: (0.25 + 0.75) / 2."""
    model, processor = model_and_processor()
    save_tiny(tmp_path / "model", model, processor)
    form = make_digits.FORMS["short"]
    write_examples(
        make_digits.build_split(digits, range(6), np.random.default_rng(0), form), tmp_path / "test.parquet"
    )
    write_run(tmp_path / "run", tmp_path / "model", tmp_path / "test.parquet")
    report_quickstart.main(tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    (reward,) = [line for line in lines if line.startswith("training reward")]
    (accuracy,) = [line for line in lines if line.startswith("held-out accuracy, by the trainer")]
    assert reward.split()[-2:] == ["0.500", "0.500"]
    assert accuracy.split()[-2:] == ["0.125", "0.625"]
    assert sum("image" in line and line.endswith("0.000   0.000") for line in lines) == 3
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    beside = report_quickstart.compare([tmp_path / "run", tmp_path / "run"]).splitlines()
    assert beside[0] == "| | run | run | mean |"
    assert beside[3].count("0.125 → 0.625") == 3


def test_controls_swap_and_blank_the_image(digits: make_digits.DigitImages) -> None:
    """A reader that is never wrong: own images 1, blank 0 (it sees no digits), the next row's image right only where
    the next sum is the same: sums 1, 1, 5 -> one of three."""
    images = [digits.side_by_side(0, 1), digits.side_by_side(1, 0), digits.side_by_side(2, 3)]
    sums = {image.tobytes(): str(total) for image, total in zip(images, (1, 1, 5), strict=True)}

    def read_perfectly(images, prompts) -> list[str]:
        return [f"\\boxed{{{sums.get(image.tobytes(), 99)}}}" for image in images]

    accuracies = report_quickstart.control_accuracies(read_perfectly, images, ["?"] * 3, ["1", "1", "5"])
    assert list(accuracies.values()) == pytest.approx([1.0, 0.0, 1 / 3])


@pytest.mark.parametrize("arguments", [["--engine", "warp"], ["--seed", "two"], ["--seed"], ["--seed=3"], ["steps"]])
def test_the_quickstart_refuses_what_it_does_not_know_before_it_installs_anything(arguments: list[str]) -> None:
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert arguments[-1] in result.stderr and "usage:" in result.stderr
