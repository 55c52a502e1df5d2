# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_compare_signals.py
"""Studies: what is run, what is run again, what pairs and what the intervals say."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import compare_signals
import make_digits
import numpy as np
import pytest
import signal_table
import yaml
from datasets import load_dataset
from signal_study import Study, StudyError
from signal_table import Line, Pairs, add_line, compare, curve_differences, interval, pair, read_lines, remarks, table

from tests.documents import LANGUAGES, code_blocks, text_of

ROOT = Path(__file__).resolve().parent.parent

SMALL = [
    "data.rollout_batch_size=2",
    "data.max_response_length=8",
    "worker.actor.global_batch_size=2",
    "worker.actor.micro_batch_size_per_device_for_update=4",
    "worker.actor.micro_batch_size_per_device_for_experience=4",
    "worker.rollout.n=2",
    "trainer.max_steps=1",
    "trainer.val_freq=-1",
]

STUDY = """\
config: examples/quickstart.yaml
prepare: "{python} make.py {data} {warm_start}"
warm_starts: [1, b]
seeds: [4, 5]
overrides: ["data.train_files={data}/train.parquet", "data.seed={seed}"]
arms:
  uniform: [algorithm.enable_token_weights=false]
  vgr: []
"""


def line(arm: str, results: list[float], warm_start: int = 1, seed: int = 1, **others) -> Line:
    """Of a run that answered some questions."""
    given = dict(model="m", questions="q", validation={0: 0.25, 2: 0.5}, curves={"reward/accuracy": [0.1, 0.2]})
    given |= dict(overrides=[], means={"actor/grad_norm": 0.5}, seconds=9) | others
    return Line("task", arm, warm_start, seed, results=np.array(results, dtype=float), **given)


def study(tmp_path: Path, text: str = STUDY) -> Study:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return Study.read(path)


# ---- the file ----


def test_runs_of_a_warm_start_and_a_seed_come_side_by_side_with_their_overrides(tmp_path: Path) -> None:
    runs = study(tmp_path).runs()
    assert [(run.warm_start, run.seed, run.arm) for run in runs[:5]] == [
        (1, 4, "uniform"),
        (1, 4, "vgr"),
        (1, 5, "uniform"),
        (1, 5, "vgr"),
        ("b", 4, "uniform"),
    ]
    assert runs[2].overrides(Path("/d")) == [
        "data.train_files=/d/train.parquet",
        "data.seed=5",
        "algorithm.enable_token_weights=false",
    ]
    assert study(tmp_path).preparation("b", "/d") == f"{sys.executable} make.py /d b"
    some = study(tmp_path).runs(arms=["vgr"], warm_starts=["b"], seeds=["4"])
    assert [run.name for run in some] == ["vgr_b_4"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [4, 5]", "seed: [4, 5]", r"seed=\[4, 5\] is not a key of a study; did you mean seeds\?"),
        ("seeds: [4, 5]\n", "", "seeds=None is missing"),
        ("seeds: [4, 5]", "seeds: [4, 4]", r"seeds=\[4, 4\] is not a list of different integers"),
        ("seeds: [4, 5]", "seeds: 4", "seeds=4 is not a list"),
        ("vgr: []", "vgr: worker", "arms.vgr='worker' is not a list of overrides"),
        ("vgr: []", "vgr: [worker]", "arms.vgr='worker' is not an override"),
        ("vgr: []", "v/gr: []", "arms='v/gr' cannot name a folder"),
        ("seed={seed}", "seed={sed}", "overrides='data.seed={sed}' has an unknown placeholder"),
        ("{warm_start}", "{arm}", "prepare=.* has an unknown placeholder"),
        ("arms:", "arms: [", "is not YAML"),
    ],
)
def test_a_wrong_study_is_told_by_file_and_key(old: str, new: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=f"mine.yaml.*{message}"):
        study(tmp_path, STUDY.replace(old, new))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_study_in_the_documents_trains_on_images(language: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (text,) = (block for block in code_blocks(text_of(language), "yaml") if "arms:" in block)
    runner = compare_signals.Runner(study(tmp_path, text), tmp_path, tmp_path / "lines.jsonl")
    runs = runner.study.runs()
    assert [run.name for run in runs][:2] == ["plain_0_1", "vgr_0_1"]
    for config in map(runner.config_of, runs[:3]):
        assert "geometry3k" in config.data.train_files and "VL" in config.worker.actor.model.model_path


def test_an_arm_that_is_asked_for_and_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="--arms='entropy' is none of uniform, vgr"):
        study(tmp_path).runs(arms=["entropy"])


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_arms_of_our_studies_are_configurations(path: Path, tmp_path: Path, monkeypatch) -> None:
    """Held against the trainer's own checks, with files that are there in place of the data."""
    monkeypatch.chdir(ROOT)
    runner = compare_signals.Runner(Study.read(path), tmp_path, tmp_path / "lines.jsonl")
    for run in {run.arm: run for run in runner.study.runs()}.values():
        data = tmp_path / "data" / str(run.warm_start)
        (data / "model").mkdir(parents=True, exist_ok=True)
        for name in ("train", "test"):
            (data / f"{name}.parquet").touch()
        config = runner.config_of(run)
        assert config.algorithm.enable_token_weights


# ---- lines and pairs ----


@pytest.mark.parametrize("results", [[1, 0, 0, 1, 1, 0, 1, 0, 1], [0.5, 1, 0]])
def test_a_line_is_read_as_it_was_written(results: list[float]) -> None:
    written = line("vgr", results)
    again = Line.from_json(written.to_json())
    assert again.results.tolist() == results
    assert again.to_json() == written.to_json()
    assert (again.before, again.accuracy) == (0.25, np.mean(results))
    assert replace(again, validation={50: 0.5}).before is None


def test_lines_add_up_and_reading_them_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert read_lines(path) == []
    for seed in (1, 2):
        add_line(path, line("vgr", [1, 0], seed=seed))
    path.write_text(path.read_text().rstrip("\n"))  # as some editors leave it
    before = path.read_bytes()
    assert [one.seed for one in read_lines(path)] == [1, 2]
    assert path.read_bytes() == before
    add_line(path, line("vgr", [1, 0], seed=3))
    assert [one.seed for one in read_lines(path)] == [1, 2, 3]


def test_a_damaged_line_and_two_lines_of_a_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    whole = line("vgr", [1, 0]).to_json() + "\n"
    path.write_text(whole * 2)
    with pytest.raises(ValueError, match="two lines of arm vgr, warm start 1, seed 1"):
        read_lines(path)
    for damaged in ('{"arm": 3}\n', '{"task": "ta'):
        path.write_text(whole + damaged)
        with pytest.raises(ValueError, match="line 2 is not the record of a run"):
            read_lines(path)
        assert path.read_text() == whole + damaged


@pytest.mark.parametrize("other", [{"model": "n"}, {"questions": "r"}, {"seed": 2}, {"warm_start": 2}])
def test_runs_pair_only_from_one_model_one_seed_and_one_set_of_questions(other: dict) -> None:
    assert pair([line("uniform", [1, 0]), line("vgr", [1, 1])], "vgr", "uniform").differences.tolist() == [[0, 1]]
    assert pair([line("uniform", [1, 0]), line("vgr", [1, 1], **other)], "vgr", "uniform").warm_starts == []


# ---- intervals ----


def test_an_interval_of_differences_that_never_vary_is_a_point() -> None:
    resampled = Pairs(np.full((4, 7), 0.25), [1, 1, 2, 2]).resampled()
    assert interval(resampled, 0.95) == pytest.approx((0.25, 0.25))


def test_differences_between_warm_starts_do_not_widen_the_interval() -> None:
    """Seeds are drawn within a warm start, and each warm start has its own mean."""
    differences = np.repeat([[0.0], [0.0], [0.5], [0.5]], 6, axis=1)
    assert interval(Pairs(differences, [1, 1, 2, 2]).resampled(), 0.95) == pytest.approx((0.25, 0.25))


def test_the_resampled_spread_is_that_of_seeds_or_that_of_questions() -> None:
    """15 seeds at 0 and 15 at 1 on equal questions: a standard error of sqrt(0.25 / 29), times sqrt(29 / 27), the
    standard deviation of Student's t. One answer in two differs, alike for all seeds: sqrt(0.25 / 100)."""
    of_seeds = Pairs(np.repeat([[0.0], [1.0]] * 15, 5, axis=1), [1] * 30).resampled()
    assert of_seeds.std() == pytest.approx((0.25 / 27) ** 0.5, rel=0.03)
    of_questions = Pairs(np.tile([0.0, 1.0], (3, 50)), [1, 1, 1]).resampled()
    assert of_questions.std() == pytest.approx(0.05, rel=0.03)


def test_intervals_cover_the_truth_about_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """15 pairs on 100 questions whose difference varies by seed, by question and by chance; its mean is 0."""
    monkeypatch.setattr(signal_table, "RESAMPLES", 500)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        seeds, questions = rng.normal(0, 0.05, (15, 1)), rng.normal(0, 0.1, (1, 100))
        differences = seeds + questions + rng.normal(0, 0.3, (15, 100))
        low, high = interval(Pairs(differences, [1, 2, 3] * 5).resampled(), 0.95)
        covered += low <= 0 <= high
    assert 90 <= covered <= 99


@pytest.mark.parametrize("warm_starts", [[1] * 3, [1, 2, 3] * 3])
def test_intervals_of_few_seeds_miss_the_truth_about_as_seldom_as_they_say(
    warm_starts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Normal seeds on one question. Percentiles of three drawn seeds alone would miss in one case of six."""
    monkeypatch.setattr(signal_table, "RESAMPLES", 2000)
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(400):
        low, high = interval(Pairs(rng.normal(0, 1, (len(warm_starts), 1)), warm_starts).resampled(), 0.975)
        missed += not low <= 0 <= high
    assert 3 <= missed <= 20  # 10 are expected


def test_the_correction_widens_with_the_number_of_arms_and_one_seed_has_no_interval() -> None:
    rng = np.random.default_rng(0)
    lines = [line(arm, rng.integers(0, 2, 40).tolist(), seed=seed) for arm in "abc" for seed in (1, 2, 3)]
    rows = compare(lines, ["a", "b", "c"])
    assert rows[0].difference is None
    for row in rows[1:]:
        assert row.corrected[0] < row.plain[0] < row.difference < row.plain[1] < row.corrected[1]
    assert compare(lines, ["a", "b"])[1].corrected == rows[1].plain  # one comparison needs no correction
    (_, alone) = compare([one for one in lines if one.seed == 1], ["a", "b"])
    assert alone.difference is not None and alone.plain is None


def test_empty_cells_have_a_remark() -> None:
    lines = [line("a", [1, 0], seed=seed) for seed in (1, 2)]
    lines += [line("b", [1, 1], seed=1), line("b", [1, 1], seed=2, model="other")]
    few, single = remarks(lines, ["a", "b"])
    assert few == "b: 1 of 2 runs have no partner with the same warm start, seed, weights and questions"
    assert single == "b: no interval, since an interval needs two seeds of each warm start (1 has one)"
    assert remarks(lines[2:], ["a", "b"]) == ["no run of a is shown, so nothing is compared with it"]
    assert remarks(lines[:2] + [line("b", [1, 1], seed=seed) for seed in (1, 2)], ["a", "b"]) == []


def test_the_table_shows_points_and_marks_what_differs() -> None:
    """vgr answers all ten questions, uniform six: +40 points in each of two pairs."""
    lines = [line("uniform", [1, 0] * 3 + [1] * 3 + [0], seed=seed) for seed in (1, 2)]
    lines += [line("vgr", [1] * 10, seed=seed, means={"token_weights/ess": 0.7}) for seed in (1, 2)]
    text = table(lines, ["uniform", "vgr", "random"], "reward/accuracy")
    assert "| uniform | 2 | 60.0 | 0.0 |  |  |  |  |" in text
    assert "| vgr | 2 | 100.0 | 0.0 | 2 | +40.0 * | +10.0 to +70.0 |" in text
    assert "| arm | gradient norm | effective sample size |" in text
    assert "random" not in text
    assert "reward/accuracy" not in text  # two steps have no fifths


def test_where_arms_part_is_told_in_fifths_of_the_training() -> None:
    """Ten steps. Over the last two, one pair parts by 0.2 and the other by 0.4: 0.3 with a standard error of 0.1."""
    flat = [0.5] * 10
    of_first = [line("uniform", [1], seed=seed, curves={"reward/accuracy": flat}) for seed in (1, 2)]
    rising = {1: 0.7, 2: 0.9}
    lines = of_first + [
        line("vgr", [1], seed=seed, curves={"reward/accuracy": [*flat[:8], end, end]}) for seed, end in rising.items()
    ]
    parts = curve_differences(lines, "vgr", "uniform", "reward/accuracy")
    assert np.array(parts) == pytest.approx(np.array([[0, 0]] * 4 + [[0.3, 0.1]]))
    assert "| vgr | +0.0 (0.0) | +0.0 (0.0) | +0.0 (0.0) | +0.0 (0.0) | +30.0 (10.0) |" in table(
        lines, ["uniform", "vgr"], "reward/accuracy"
    )
    (*_, (mean, error)) = curve_differences(lines[:-1], "vgr", "uniform", "reward/accuracy")
    assert mean == pytest.approx(0.2) and np.isnan(error)


# ---- runs ----


def command(path: Path, folder: Path, *words: str) -> list[str]:
    return [sys.executable, "scripts/compare_signals.py", str(path), "--folder", str(folder), *words]


@pytest.mark.ray
def test_a_study_runs_what_has_no_line_and_leaves_one_for_each_run(tmp_path: Path) -> None:
    """One step of a model without a warm start. A half-finished run is begun anew, and a finished one left alone."""
    made = tmp_path / "made"
    make_digits.main(made, seed=0, steps=0)
    rows = load_dataset("parquet", data_files=str(made / "test.parquet"), split="train")
    rows.select(range(5)).to_parquet(made / "few.parquet")
    path = tmp_path / "mine.yaml"
    overrides = [*SMALL, "data.train_files={data}/train.parquet", "data.val_files={data}/few.parquet"]
    overrides += ["worker.actor.model.model_path={data}/model", "data.seed={seed}", "worker.rollout.seed={seed}"]
    content = {"config": "examples/quickstart.yaml", "prepare": f"cp -r {made}/. {{data}}", "overrides": overrides}
    content |= {"seeds": [1, 2], "arms": {"vgr": []}}
    path.write_text(yaml.safe_dump(content))
    half = tmp_path / "study" / "runs" / "vgr_0_1"
    half.mkdir(parents=True)
    (half / "experiment_log.jsonl").write_text('{"step": 77}\n')
    (tmp_path / "mine.jsonl").write_text(line("vgr", [1] * 5, warm_start=0, seed=2).to_json() + "\n")

    finished = subprocess.run(command(path, tmp_path / "study"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "1 of 2 runs are done, 1 left" in finished.stdout
    old, new = read_lines(tmp_path / "mine.jsonl")
    assert old.seed == 2
    assert (new.seed, new.arm, len(new.results), list(new.validation)) == (1, "vgr", 5, [0, 1])
    assert new.model == compare_signals.identity(str(made / "model"))
    assert new.questions == compare_signals.identity(str(made / "few.parquet"))
    assert len(new.curves["actor/grad_norm"]) == 1
    assert new.means["token_weights/digit_share"] >= 0
    assert (tmp_path / "mine.svg").exists()
    assert not list(half.glob("global_step_*"))

    again = subprocess.run(command(path, tmp_path / "study"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert "2 of 2 runs are done, 0 left" in again.stdout
    assert finished.stdout.partition("| arm")[2] == again.stdout.partition("| arm")[2]


def test_a_selection_shows_its_own_runs_beside_the_picture_of_the_whole_study(tmp_path: Path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    runs = [line("vgr", [1, warm_start == 1], warm_start, seed) for warm_start in (1, "b") for seed in (4, 5)]
    (tmp_path / "mine.jsonl").write_text("".join(run.to_json() + "\n" for run in runs))
    pictures = []
    selection = ["--warm-starts", "b", "--first", "vgr"]
    for words, row in ([], "| vgr | 4 | 75.0 |"), (selection, "| vgr | 2 | 50.0 |"), ([], "| vgr | 4 |"):
        assert compare_signals.main(compare_signals.parse([str(path), "--table-only", *words])) == 0
        assert row in capsys.readouterr().out
        pictures.append((tmp_path / "mine.svg").read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]  # the same lines make the same file
    assert (tmp_path / "mine_first_vgr_warm_starts_b.svg").read_bytes() != pictures[0]


def test_a_table_of_no_runs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    with pytest.raises(StudyError, match="mine.jsonl has no lines of these runs; without --table-only"):
        compare_signals.main(compare_signals.parse([str(path), "--table-only"]))


def test_lines_of_an_arm_that_has_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY.replace("vgr: []", "vgr: [trainer.max_steps=3]"))
    add_line(tmp_path / "mine.jsonl", line("vgr", [1, 0], seed=4))
    with pytest.raises(StudyError, match=r"vgr, .*seed 4 was trained with \[\], and arms.vgr is .*max_steps=3"):
        compare_signals.main(compare_signals.parse([str(path), "--table-only"]))


def test_a_line_without_the_key_that_is_compared_is_told_with_the_keys_there_are(tmp_path: Path) -> None:
    """Not a failure of one run: all others would end alike, so it ends the study."""
    (tmp_path / "experiment_log.jsonl").write_text('{"step": 1, "actor": {"grad_norm": 1.0}}\n')
    (tmp_path / "val_rewards.jsonl").write_text(json.dumps({"step": 1, "rewards": {"overall": [1, 0]}}) + "\n")
    (run, *_) = study(tmp_path).runs()
    with pytest.raises(StudyError, match="accuracy=accuracy is not among the held-out results, overall") as raised:
        compare_signals.line_of(run, tmp_path, "m", "q", 9.0)
    assert not isinstance(raised.value, compare_signals.RunFailed)


def test_a_run_that_fails_and_a_preparation_that_fails_are_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(STUDY)
    finished = subprocess.run(command(path, tmp_path / "study"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert "prepare failed for warm start 1" in finished.stderr and "make.py" in finished.stderr
    path.write_text(STUDY.replace("prepare", "#").replace("{data}/train", "/nowhere"))
    finished = subprocess.run(command(path, tmp_path / "study"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert finished.stderr.startswith("arms.uniform: data.train_files")
    path.unlink()
    finished = subprocess.run(command(path, tmp_path / "study"), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.stderr.startswith("[Errno 2] No such file")


# ---- our study ----


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "study").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_our_study_are_those_of_its_lines(path: Path, language: str) -> None:
    page = (ROOT / "docs" / language / "study.md").read_text("utf-8")
    lines, arms = read_lines(path), list(Study.read(path.with_suffix(".yaml")).arms)
    accuracies, *_ = table(lines, arms, "reward/accuracy").split("\n\n")
    assert accuracies in page
    if "shuffled" in arms:
        from_shuffled, *_ = table(lines, sorted(arms, key=lambda arm: arm != "shuffled"), "reward/accuracy").split(
            "\n\n"
        )
        (row,) = [row for row in from_shuffled.splitlines() if row.startswith("| vgr |")]
        assert f"{from_shuffled.splitlines()[0]}\n| {' | '.join(['---'] * 8)} |\n{row}\n" in page


def test_our_study_pairs_all_its_runs_and_fits_the_repository() -> None:
    paths = sorted((ROOT / "examples" / "study").glob("*.jsonl"))
    assert sum(path.stat().st_size for path in paths) < 1_000_000
    for path in paths:
        arms = list(Study.read(path.with_suffix(".yaml")).arms)
        for row in compare(read_lines(path), arms)[1:]:
            assert row.num_pairs == len(row.accuracies) or path.stem == "digits_rate"
