# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_inspect_attention.py
"""The script shows a model what it would be trained with: the same masses, weights and probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inspect_attention import Inspector, choice_table, main, parse, rows_of
from PIL import Image

from tests.batches import random_image
from tests.family_models import IMAGE_TEXT_MODELS, make_family_model
from tests.probe import make_config, start_alone
from tests.test_families import bare_model, log_probs_alone
from tests.test_token_map import Page
from tests.tiny import make_tiny_text_model
from verl.data.vision import MediaHandle
from verl.report.layer_agreement import MeasuredResponse, compare_layers
from verl.report.token_map import VISIBLE
from verl.utils.attention_metrics import vgr_from_mass
from verl.utils.attention_token_weights import token_weights_from_vgr

pytestmark = pytest.mark.usefixtures("private_cache")

SMALL = ["--min-pixels", "1", "--max-tokens", "12", "--max-prompt-tokens", "96"]


def write_images(folder: Path, *sizes: tuple[int, int]) -> list[str]:
    names = [f"{number}.png" for number in range(len(sizes))]
    for number, (name, size) in enumerate(zip(names, sizes, strict=True)):
        random_image(size, number).save(folder / name)
    return names


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "tokens.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_one_response_cannot_tell_is_undefined() -> None:
    masses, gain = np.full((1, 5, 2), 0.5, dtype=np.float32), np.arange(5.0)
    (row, *_) = choice_table(compare_layers([MeasuredResponse((0,), masses, (4, 4), gain)])).rows
    assert row == ["all", "0", "undefined", "undefined"]


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
def test_every_family_is_looked_at(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded and given responses, one image, two and none; the page has a picture for each and a map for each."""
    model = make_family_model(name, tmp_path / "model")
    write_images(tmp_path, (64, 64), (128, 64))
    rows = [
        {"prompt": "What is it?", "images": ["0.png"]},
        {"prompt": "<image>and<image>What?", "images": ["1.png", "0.png"], "response": "3+9=12 你", "answer": 12},
        {"prompt": "Answer in one word.", "response": "The quick brown fox"},
    ]
    output = tmp_path / "out"
    assert main(["--model", model, "--responses", write_rows(tmp_path, rows), "--output", str(output), *SMALL]) == 0
    assert "rank correlation" in capsys.readouterr().out

    one, two, blind = lines_of(output)
    assert (
        two["response"].startswith("3+9=12 你")
        and "".join(token["text"] for token in two["tokens"]) == two["response"]
    )
    for line in (one, two):
        assert line["image_tokens"] > 0
        for token in line["tokens"]:
            assert len(token["attention"]) == line["image_tokens"] and len(token["vgr_by_layer"]) == len(
                line["layers"]
            )
            assert 0 < sum(token["attention"]) < 1 and token["vgr"] > 0
        assert any(token["image_gain"] != 0 for token in line["tokens"])
    assert all(token["weight"] == 1 and token["vgr"] is None and token["image_gain"] == 0 for token in blind["tokens"])

    page = Page((output / "page.html").read_text(encoding="utf-8"))
    assert page.responses == [line["response"].translate(VISIBLE) for line in (one, two, blind)]
    assert [len(data["pictures"]) for data in page.data] == [1, 2, 0]
    assert sum(tag == "img" for tag, _ in page.elements) == 3
    layers = json.loads((output / "layers.json").read_text(encoding="utf-8"))
    assert layers["responses"] <= 2 and layers["advice"]


def test_numbers_are_those_of_training_and_of_a_black_image(
    tiny_model_path: str, tmp_path: Path, lone_process_group
) -> None:
    write_images(tmp_path, (56, 84), (112, 56))
    given = [
        {"prompt": "What is in the picture?", "images": ["0.png"], "response": "I see 3 and 9."},
        {"prompt": "What is the sum?", "images": ["1.png"], "response": "<think>3+9=12.</think> \\boxed{12}"},
    ]
    command = ["--model", tiny_model_path, "--responses", write_rows(tmp_path, given), "--layers", "last:1", *SMALL]
    arguments = parse([*command, "--clip", "0.9", "1.1"])
    rows, inspector = rows_of(arguments), Inspector(arguments)
    measured = inspector.inspect(rows)

    collect = ("worker.rollout.collect_attentions=true", "algorithm.token_weight_layers=last:1")
    batch = inspector._answered(inspector._prompts(rows)[0], rows)
    trained = start_alone(make_config(tiny_model_path, *collect)).compute_log_probs(batch).batch
    vgr = vgr_from_mass(trained["attention_mass"], trained["attention_keys"])
    weights = token_weights_from_vgr(vgr, batch.batch["response_mask"], (0.9, 1.1), 0.0)
    bare = bare_model(tiny_model_path)
    for place, one in enumerate(measured):
        mask = batch.batch["response_mask"][place].bool()
        assert one.response.endswith("<|im_end|>") and len(one.tokens) == int(mask.sum())
        torch.testing.assert_close(torch.from_numpy(one.weights), weights[place, mask], atol=1e-5, rtol=0)
        assert one.vgr == pytest.approx(vgr[place, mask].numpy(), abs=1e-5)
        assert one.vgr_by_layer[-1] == pytest.approx(one.vgr, abs=1e-5)
        assert one.vgr_by_layer[0] != pytest.approx(one.vgr, abs=1e-5)
        assert one.vgr_by_group.shape == (2, 2)
        row = batch[place]
        (image,) = one.images
        with_image = log_probs_alone(bare, tiny_model_path, row)
        row.non_tensor_batch["multi_modal_data"] = [MediaHandle.put(Image.new("RGB", image.size))]
        gain = with_image - log_probs_alone(bare, tiny_model_path, row)
        assert gain.abs().max() > 1e-3
        assert one.image_gain == pytest.approx(gain.numpy(), abs=1e-4)
        assert one.log_probs == pytest.approx(with_image.numpy(), abs=1e-4)


def test_one_prompt_on_the_command_line_is_answered_greedily(
    tiny_model_path: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, (56, 56))
    command = ["--model", tiny_model_path, "--image", "0.png", "--prompt", "What is it?", *SMALL]
    assert main([*command, "--output", "first"]) == main([*command, "--output", "second", "--layers", "0"]) == 0
    (first,), (second,) = lines_of(tmp_path / "first"), lines_of(tmp_path / "second")
    assert first["response"] == second["response"] and 1 <= len(first["tokens"]) <= 12
    assert (first["weighted_layers"], second["weighted_layers"]) == ([0, 1], [0])
    mean = np.mean([token["weight"] for token in first["tokens"]])
    assert mean == pytest.approx(1, abs=0.2)
    assert main([*command, "--response", "3+9", "--output", "third"]) == 0
    assert lines_of(tmp_path / "third")[0]["response"] == "3+9<|im_end|>"


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "What?", "images": ["none.png"]}, [], "there is no image"),
        ({"prompt": "What?", "images": ["0.png"], "response": "<|image_pad|>"}, [], "holds <|image_pad|>"),
        ({"prompt": "What?", "images": ["0.png"]}, ["--layers", "7"], "[7] are no full-attention layers"),
        ({"prompt": "What?", "images": ["0.png"]}, ["--layers", "first"], "token_weight_layers"),
        (
            {"prompt": "What?", "images": ["0.png"]},
            ["--head-groups", "3"],
            "head_groups=3 does not divide the 4 heads",
        ),
        ({"prompt": "What?", "videos": ["0.mp4"]}, [], "it has videos"),
        ({"prompt": 3}, [], "prompt is 3; it must be a text"),
    ],
)
def test_what_cannot_be_shown_is_refused_before_anything_is_written(
    row: dict, options: list[str], message: str, tiny_model_path: str, tmp_path: Path, capsys
) -> None:
    write_images(tmp_path, (56, 56))
    rows = write_rows(tmp_path, [row])
    output = tmp_path / "out"
    command = ["--model", tiny_model_path, "--responses", rows, "--output", str(output), *SMALL, *options]
    assert main(command) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_a_line_separator_inside_a_text_does_not_end_its_line(tmp_path: Path) -> None:
    """U+2028 and U+0085, which JSON may hold as they are."""
    given = [{"prompt": "a\u2028b", "response": "c\u0085d"}, {"prompt": "e", "response": "f"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in given) + "\n", encoding="utf-8")
    rows = rows_of(parse(["--model", "m", "--responses", str(path), "--output", str(tmp_path)]))
    assert [(row["prompt"], row["response"]) for row in rows] == [("a\u2028b", "c\u0085d"), ("e", "f")]


def test_a_model_without_images_is_refused(tmp_path: Path, capsys) -> None:
    path = make_tiny_text_model(tmp_path / "model")
    assert main(["--model", path, "--prompt", "What?"]) == 2
    assert "takes no images" in capsys.readouterr().err
