# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_report.py
"""A run's page: curves of what was logged and samples of the last validation, small, written at the right time."""

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.test_token_map import Page, sample_of
from verl.report.curves import COLOURS as LINE_COLOURS
from verl.report.curves import MOST_POINTS, PANELS, History, _band, _thinned, charts
from verl.report.numbers import number_text
from verl.report.run_page import SampleSet, run_page
from verl.report.token_map_image import COLOURS, COLUMNS, token_map_image
from verl.trainer.report_sink import ReportSink
from verl.trainer.sinks import FileSink, Run, read_log

BOUNDS = (0.2, 3.0)
CONFIG = {
    "algorithm": {
        "adv_estimator": "grpo",
        "enable_token_weights": True,
        "token_weight_signal": "vgr",
        "token_weight_control": "none",
        "token_weight_top_share": None,
        "token_weight_clip": [0.2, 3.0],
    },
    "worker": {"actor": {"model": {"model_path": "org/model"}}, "rollout": {"collect_attentions": True}},
}


def run_in(folder: Path, resume_step: int = 0, only_validates: bool = False) -> Run:
    return Run(CONFIG, "digits", "demo", folder, 9, resume_step, resume_step > 0, only_validates, {})


def svg_of(uri: str) -> str:
    return base64.b64decode(uri.partition(",")[2]).decode()


def test_a_chart_is_drawn_where_one_of_its_metrics_was_logged_and_says_its_first_and_last_number() -> None:
    signals = {"signals/vgr/mean": 1.0, "signals/image_kl/mean": 0.5}
    history = History(
        {
            2: {"reward/overall": 0.75, "signals/spearman/vgr_image_kl": -0.5, **signals},
            1: {"reward/overall": 0.5, "actor/grad_norm": float("nan")},
            3: {"reward/overall": None, "val/reward_score": 0.25},
        }
    )
    reward, agreement = charts(history)
    assert (reward.title, reward.summary) == ("Reward", "training 0.5 to 0.75; held-out 0.25")
    assert (agreement.title, agreement.summary) == ("Agreement of signals", "vgr, image_kl -0.5")
    assert ">training<" in svg_of(reward.light) and ">held-out<" in svg_of(reward.dark)
    assert "#16161a" in svg_of(reward.light) and "#16161a" not in svg_of(reward.dark)


def test_numbers_are_written_in_full_up_to_ten_million() -> None:
    written = {0.01234: "0.0123", 27.06: "27.1", 999.7: "1,000", 1024.4: "1,024", -100000.0: "-100,000"}
    written |= {2e9: "2e+09", -0.0: "0", float("nan"): "undefined"}
    assert {number: number_text(number) for number in written} == written
    (chart,) = charts(History({0: {"val_response_length/mean": 900.0}, 2: {"val_response_length/mean": 1500.0}}))
    assert chart.summary == "held-out 900 to 1,500"


def test_a_chart_of_one_step_counts_in_whole_steps() -> None:
    (chart,) = charts(History({7: {"actor/grad_norm": 0.5}}))
    texts = re.findall(r">([^<>\s]+)</text>", svg_of(chart.light))
    assert "7" in texts and not {text for text in texts if text.startswith(("6.", "7."))}


def test_a_line_has_the_same_colour_and_its_name_where_the_other_of_its_chart_lacks() -> None:
    (alone,) = charts(History({0: {"val/reward_score": 0.25}}))
    blue, orange = LINE_COLOURS["light"][:2]
    assert orange in svg_of(alone.light) and blue not in svg_of(alone.light)
    assert ">held-out<" in svg_of(alone.light)


def test_the_band_of_the_weights_is_a_standard_deviation_on_both_sides() -> None:
    (panel,) = [panel for panel in PANELS if panel.title == "Token weights"]
    history = History({step: {"token_weights/mean": 1.0, "token_weights/std": step / 4} for step in (1, 2)})
    assert _band(panel, history).tolist() == [[1, 0.75, 1.25], [2, 0.5, 1.5]]


def test_long_lines_are_drawn_as_means_and_keep_their_mean() -> None:
    points = np.stack([np.arange(3 * MOST_POINTS), np.random.default_rng(0).random(3 * MOST_POINTS)], axis=1)
    thinned = _thinned(points)
    assert thinned.shape == (MOST_POINTS, 2)
    assert thinned.mean(axis=0) == pytest.approx(points.mean(axis=0))
    assert thinned[0] == pytest.approx(points[:3].mean(axis=0))


def test_the_page_of_a_long_run_with_32_samples_is_below_5_megabytes() -> None:
    names = [line.metric for panel in PANELS for line in panel.lines] + ["vgr/p10", "vgr/p90", "token_weights/std"]
    pairs = [f"signals/spearman/{one}_{other}" for one in "abcd" for other in "efgh"]
    generator = np.random.default_rng(0)
    history = History({step: {name: generator.random() for name in (*names, *pairs)} for step in range(5000)})
    samples = [sample_of(["字"] * 2000, num_images=2, side=32, seed=seed) for seed in range(16)]
    html = run_page("run", [], history, [SampleSet("held-out", samples), SampleSet("training", samples)], BOUNDS)
    assert len(html.encode()) < 5_000_000


def test_samples_of_all_sets_are_on_the_page_in_their_order() -> None:
    sets = [SampleSet("one <b>", [sample_of(["a"]), sample_of(["b"])]), SampleSet("two", [sample_of(["c"], 1)])]
    html = run_page("run <i>", ["note <u>"], History({}), sets, BOUNDS)
    assert Page(html).responses == ["a", "b", "c"]
    assert html.index("one &lt;b&gt;") < html.index("two") and "note &lt;u&gt;" in html and "run &lt;i&gt;" in html
    assert html.count('class="legend"') == 1 and "No step has been logged yet." in html


def test_the_page_is_written_after_a_validation_and_at_the_end_with_the_latest_samples(tmp_path: Path) -> None:
    sink = ReportSink(run_in(tmp_path))
    page = tmp_path / "report.html"
    sink.log({"reward/overall": 0.5}, 1)
    assert not page.exists()
    sink.log_token_maps([sample_of(["old"])], 1, "train")
    sink.log_token_maps([sample_of(["held"])], 2, "val")
    sink.log_token_maps([sample_of(["new"])], 2, "train")
    sink.log({"reward/overall": 0.625, "val/reward_score": 0.875}, 2)
    html = page.read_text("utf-8")
    assert Page(html).responses == ["held", "new"]
    assert "Held-out responses, step 2" in html and "Training responses, step 2" in html
    assert "step 2 of 9" in html and "Token weights on: vgr, all layers, clip 0.2 to 3;" in html
    sink.log({"reward/overall": 0.75}, 3)
    assert page.read_text("utf-8") == html
    (written,) = sink.files()
    assert written.path == page and "training 0.5 to 0.75" in page.read_text("utf-8")


def test_a_resumed_run_draws_the_steps_before_it_and_none_that_it_takes_again(tmp_path: Path) -> None:
    log = FileSink(run_in(tmp_path))
    for step, value in ((1, 0.1), (2, 0.2), (3, 0.9)):
        log.log({"reward/overall": value}, step)
    with (tmp_path / "experiment_log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    assert read_log(tmp_path) == {1: {"reward/overall": 0.1}, 2: {"reward/overall": 0.2}, 3: {"reward/overall": 0.9}}
    sink = ReportSink(run_in(tmp_path, resume_step=2))
    sink.log({"reward/overall": 0.3, "val/reward_score": 0.5}, 3)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "Resumed" not in html
    assert "training 0.1 to 0.3" in html and "0.9" not in html.partition("Reward: ")[2][:80]


def test_a_run_that_only_validates_writes_a_page_of_its_own(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text("of the training")
    sink = ReportSink(run_in(tmp_path, only_validates=True))
    sink.log({"val/reward_score": 0.5}, 0)
    (written,) = sink.files()
    assert written.path == tmp_path / "validation_report.html"
    assert "held-out 0.5" in written.path.read_text("utf-8")
    assert page.read_text() == "of the training"


def test_a_run_resumed_in_a_new_folder_says_that_its_first_steps_lack(tmp_path: Path) -> None:
    sink = ReportSink(run_in(tmp_path, resume_step=2))
    sink.log({"reward/overall": 0.3, "val/reward_score": 0.5}, 3)
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "Resumed from step 2: this folder has no log of the steps before." in html


def test_the_log_reads_back_as_it_was_logged(tmp_path: Path) -> None:
    log = FileSink(run_in(tmp_path))
    metrics = {"a/b": 1.0, "a/b/c": 2.0, "d/e/f": float("nan"), "plain": 3.0}
    log.log(metrics, 5)
    log.log({"val/x": 4.0}, 5)
    assert read_log(tmp_path) == {5: {**metrics, "d/e/f": None, "val/x": 4.0}}
    assert json.loads((tmp_path / "experiment_log.jsonl").read_text().splitlines()[0])["step"] == 5


def test_the_picture_of_a_map_has_a_tokens_colour_under_it_and_the_attention_over_the_image() -> None:
    sample = sample_of(["a", "b", "界", ""], num_images=1)
    sample.weights[:] = [3.0, 0.2, 1.0, 1.0]
    picture = token_map_image(sample, BOUNDS)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
    rgb = [tuple(bytes.fromhex(COLOURS[place][1:])) for place in (10, 0, 8)]
    assert set(rgb[:2]) <= colours and rgb[2] not in colours
    cells = picture[-234:-66, 10:234].astype(int).reshape(4, 42, 4, 56, 3)  # 64 x 48 in a box of 224, 4 x 4 fields
    orange = (cells[..., 0] - cells[..., 2]).mean(axis=(1, 3))
    field = sample.maps[0].values.mean(axis=0)
    assert np.argmax(orange) == np.argmax(field) and np.corrcoef(orange.ravel(), np.sqrt(field).ravel())[0, 1] > 0.9


def test_the_picture_of_a_long_response_ends_with_its_last_line_that_fits() -> None:
    one, many = (token_map_image(sample_of(["word "] * count), BOUNDS) for count in (10, 5000))
    assert one.shape[1] == many.shape[1] and one.shape[0] < many.shape[0] < 1500
    wide = token_map_image(sample_of(["界"] * (COLUMNS // 2 + 1)), BOUNDS)
    assert wide.shape[0] == token_map_image(sample_of(["a"] * (COLUMNS + 1)), BOUNDS).shape[0]
