# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_library_sinks.py
"""Each logger with a library behind it, against the real one without a network: what is on disk is read back.

tensorboard and mlflow are read by their own readers and swanlab by the one that `swanlab sync` uses. wandb has none in
Python, so its file is taken apart here, down to the library's own protocol buffers.
"""

import io
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pytest
import wandb
from PIL import Image
from swanlab.proto.swanlab.record.v1.record_pb2 import Record as SwanlabRecord
from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
from swanlab.sdk.internal.core_python.store import DataStoreReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record as WandbRecord

from tests.test_token_map import Page, sample_of
from verl.report.token_map import TokenMap
from verl.report.token_map_image import token_map_image
from verl.trainer.library_sinks import hyper_parameters
from verl.trainer.tracking import RUN_IDS, Tracker
from verl.utils.checkpoint import ResumePoint

SAMPLES = [("What digit?", "<think>It is\n\n7.</think>", "7", 1.0), ("And this?", "九", "9", 0.0)]
TAGGED = [
    "[prompt] What digit?\n[output] <think>It is\n\n7.</think>\n[ground_truth] 7",
    "[prompt] And this?\n[output] 九\n[ground_truth] 9",
]
NOT_NUMBERS = {"actor/grad_norm": np.float32("nan"), "actor/pg_loss": float("inf"), "reward/pass@1": 1.0}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as mlflow makes it, which takes longer than all that is done with it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No library reaches out of the machine, and each writes below the test's own folder."""
    monkeypatch.chdir(tmp_path)
    settings = {
        "TENSORBOARD_DIR": "board",
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
        "SWANLAB_MODE": "offline",
        "SWANLAB_DIR": "swan",
        "SWANLAB_TERMINAL_PROXY_TYPE": "none",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    yield
    wandb.teardown()  # it reads the variables once


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> mlflow.MlflowClient:
    shutil.copy(empty_store, tmp_path)
    return mlflow.MlflowClient()


def make_tracker(logger: str, resume_step: int = 0, max_steps: int = 3, only_validates: bool = False) -> Tracker:
    config = {"trainer": {"max_steps": max_steps, "ray_timeline": None}, "worker": {"actor": {"optim": {"lr": 1e-6}}}}
    point = ResumePoint(f"run/global_step_{resume_step}", resume_step) if resume_step else None
    return Tracker(
        [logger],
        config,
        "digits",
        "demo",
        "run",
        total_steps=max_steps,
        resume_point=point,
        only_validates=only_validates,
    )


def run_and_resume(logger: str) -> str:
    """Steps 1, 2 and 3, then 3 and 4 by a run that goes on from a checkpoint of step 2. Returns the run's id."""
    with make_tracker(logger) as tracker:
        tracker.log_generations(SAMPLES, step=0)
        tracker.log({"val/reward_score": 0.5}, step=0)
        for step in (1, 2, 3):
            tracker.log({"reward/overall": np.float32(step / 4)}, step)
    first = run_ids()
    with make_tracker(logger, resume_step=2, max_steps=4) as tracker:
        tracker.log({"reward/overall": 0.125}, step=3)
        tracker.log_generations(SAMPLES[:1], step=4)
        tracker.log({"reward/overall": 1.0, **NOT_NUMBERS}, step=4)
    assert run_ids() == first
    return first.get(logger, "")


def run_ids() -> dict[str, str]:
    path = Path("run") / RUN_IDS
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def fail(logger: str) -> None:
    with pytest.raises(ZeroDivisionError), make_tracker(logger) as tracker:
        tracker.log({"reward/overall": 1 / 0}, step=1)


# secrets


@pytest.mark.parametrize("logger", ["file", "tensorboard", "wandb", "swanlab", "mlflow"])
def test_no_logger_writes_what_is_named_like_a_secret_or_is_in_a_url(
    logger: str, store: mlflow.MlflowClient, tmp_path: Path
) -> None:
    secrets = {
        "api_key": "s3cr3t-1",
        "judge": {"hf_token": "s3cr3t-2"},
        "url": "https://bob:s3cr3t-3@judge.example/v1",
    }
    kwargs = {**secrets, "answer_key": "known-1", "max_tokens": 7}
    config = {"data": {"prompt_key": "known-2"}, "worker": {"reward": {"reward_function_kwargs": kwargs}}}
    with Tracker([logger], config, "digits", "demo", "run", total_steps=3) as tracker:
        tracker.log({"reward/overall": 1.0}, step=1)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"known-1" in written and b"known-2" in written and b"judge.example" in written
    assert b"s3cr3t" not in written and b"bob" not in written
    assert kwargs["api_key"] == "s3cr3t-1"


# tensorboard


def test_tensorboard_shows_scalars_and_generations_by_name_and_step():
    run_and_resume("tensorboard")
    events = EventAccumulator("board/digits/demo").Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/overall")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.125),
        (4, 1.0),
    ]
    assert np.isnan(events.Scalars("actor/grad_norm")[0].value)
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")
    shown = {
        event.step: event.tensor_proto.string_val[0].decode()
        for event in events.Tensors("val/generations/text_summary")
    }
    assert shown[0] == (
        "**sample 1, score 1.000**\n\n"
        "    [prompt] What digit?\n    [output] <think>It is\n    \n    7.</think>\n    [ground_truth] 7\n\n"
        "**sample 2, score 0.000**\n\n"
        "    [prompt] And this?\n    [output] 九\n    [ground_truth] 9"
    )
    assert sorted(shown) == [0, 4]


def test_tensorboard_does_not_show_a_fresh_run_the_points_of_an_earlier_one():
    for value, steps in ((0.25, 3), (0.75, 2)):
        with make_tracker("tensorboard") as tracker:
            for step in range(steps):
                tracker.log({"reward/overall": value}, step)
    events = EventAccumulator("board/digits/demo").Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/overall")] == [(0, 0.75), (1, 0.75)]


@pytest.mark.parametrize("resume_step", [0, 1])
def test_a_run_that_only_validates_hides_no_points_of_tensorboards(resume_step: int, caplog):
    with make_tracker("tensorboard") as tracker:
        for step in range(3):
            tracker.log({"reward/overall": 0.5}, step)
    with make_tracker("tensorboard", resume_step=resume_step, only_validates=True) as tracker:
        tracker.log({"val/reward_score": 0.25}, resume_step)
    events = EventAccumulator("board/digits/demo").Reload()
    assert [event.step for event in events.Scalars("reward/overall")] == [0, 1, 2]
    assert [event.step for event in events.Scalars("val/reward_score")] == [resume_step]
    assert caplog.messages == []


def test_a_fresh_run_in_the_event_folder_of_another_is_told_so_and_a_resumed_one_is_not(caplog):
    for resume_step, is_told in ((0, False), (0, True), (2, False)):
        caplog.clear()
        with make_tracker("tensorboard", resume_step=resume_step) as tracker:
            tracker.log({"reward/overall": 0.5}, 3)
        told = f"{Path('board/digits/demo').absolute()} has the events of an earlier run" in caplog.text
        assert told == is_told


# wandb


def wandb_records(path: Path) -> Iterator[WandbRecord]:
    """The records of a `.wandb` file, LevelDB's log format behind 7 bytes of its own.

    Blocks of 32 KiB; in them pieces of records, each behind its checksum (4 bytes), length (2) and kind (1): 1 is a
    whole record, 2, 3 and 4 the first, a middle and the last piece of one; fewer than 7 bytes end a block unused.
    """
    data, position, record = path.read_bytes(), 7, b""
    while position < len(data):
        rest_of_block = 32768 - position % 32768
        if rest_of_block < 7:
            position += rest_of_block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield WandbRecord.FromString(record)
            record = b""


def wandb_runs() -> list[tuple[Path, list[WandbRecord]]]:
    """Folder and records of every start, in order."""
    wandb.teardown()  # what writes the files is a process of its own
    files = sorted(Path("wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime)
    return [(file.parent, list(wandb_records(file))) for file in files]


def wandb_rows(records: list[WandbRecord]) -> list[dict]:
    """The history, as {name: value}."""
    histories = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key): json.loads(item.value_json) for item in history.item} for history in histories]


def wandb_only(records: list[WandbRecord], kind: str):
    """The one record of its kind."""
    (record,) = (getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind)
    return record


def test_wandb_has_one_run_with_both_starts_metrics_and_tables():
    run_id = run_and_resume("wandb")
    runs = wandb_runs()
    assert len(runs) == 2
    for (_, records), max_steps in zip(runs, (3, 4), strict=True):
        run = wandb_only(records, "run")
        assert (run.run_id, run.project, run.display_name) == (run_id, "digits", "demo")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["trainer"] == {"max_steps": max_steps, "ray_timeline": None}
        metric = wandb_only(records, "metric")
        assert (metric.glob_name, metric.step_metric) == ("*", "global_step")
        assert wandb_only(records, "exit").exit_code == 0
    assert wandb_only(runs[1][1], "run").resume

    first, second = (wandb_rows(records) for _, records in runs)
    assert [(row["global_step"], row.get("reward/overall")) for row in first] == [
        (0, None),
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [(row["global_step"], row.get("reward/overall")) for row in second] == [(3, 0.125), (4, 1.0)]
    assert all(row["_step"] == row["global_step"] for row in first + second)
    assert np.isnan(second[1]["actor/grad_norm"]) and second[1]["actor/pg_loss"] == float("inf")
    assert (first[0]["val/reward_score"], second[1]["reward/pass@1"]) == (0.5, 1.0)

    tables = [
        json.loads((folder / "files" / row["val/generations/path"]).read_text("utf-8"))
        for (folder, _), row in zip(runs, (first[0], second[1]), strict=True)
    ]
    columns = ["step", "input_1", "output_1", "label_1", "score_1", "input_2", "output_2", "label_2", "score_2"]
    assert tables[0] == {"columns": columns, "data": [[0, *SAMPLES[0], *SAMPLES[1]]]}
    assert tables[1] == {"columns": columns[:5], "data": [[4, *SAMPLES[0]]]}


def test_wandb_gets_a_row_of_its_own_for_a_step_that_lies_behind():
    """As where the server knows steps that a resumed run takes again: `_step` goes on, `global_step` goes back."""
    with make_tracker("wandb") as tracker:
        for step in (1, 2, 1, 2, 3):
            tracker.log_generations(SAMPLES[:1], step)
            tracker.log({"reward/overall": step / 4}, step)
    ((folder, records),) = wandb_runs()
    rows = [(row["_step"], row["global_step"], row["reward/overall"]) for row in wandb_rows(records)]
    assert rows == [(1, 1, 0.25), (2, 2, 0.5), (3, 1, 0.25), (4, 2, 0.5), (5, 3, 0.75)]
    tables = [json.loads(path.read_text()) for path in (folder / "files").rglob("*.table.json")]
    assert max((table["data"] for table in tables), key=len) == [[step, *SAMPLES[0]] for step in (1, 2, 1, 2, 3)]


def test_wandb_knows_that_a_run_failed():
    fail("wandb")
    ((_, records),) = wandb_runs()
    assert wandb_only(records, "exit").exit_code == 1


# swanlab


def swanlab_runs() -> list[tuple[Path, list[SwanlabRecord]]]:
    """Folder and records of every start, in order."""
    runs = []
    for file in sorted(Path("swan").glob("run-*/*.swanlab"), key=lambda path: path.stat().st_ctime):
        reader = DataStoreReader()
        reader.open(file)
        runs.append((file.parent, [SwanlabRecord.FromString(record) for record in reader]))
        reader.close()
    return runs


def swanlab_all(records: list[SwanlabRecord], kind: str) -> list:
    return [getattr(record, kind) for record in records if record.WhichOneof("record_type") == kind]


def test_swanlab_has_one_experiment_with_both_starts_metrics_and_texts():
    run_id = run_and_resume("swanlab")
    runs = swanlab_runs()
    assert len(runs) == 2
    for folder, records in runs:
        (start,) = swanlab_all(records, "start")
        assert (start.id, start.project, start.name) == (run_id, "digits", "demo")
        (finish,) = swanlab_all(records, "finish")
        assert finish.state == RunState.RUN_STATE_FINISHED
        assert "lr: 1.0e-06" in (folder / "files" / "config.yaml").read_text()

    first, second = (
        {(scalar.key, scalar.step): scalar.value.number for scalar in swanlab_all(records, "scalar")}
        for _, records in runs
    )
    rewards = {("reward/overall", step): step / 4 for step in (1, 2, 3)}
    assert first == {("val/reward_score", 0): 0.5, **rewards}
    assert np.isnan(second.pop(("actor/grad_norm", 4)))
    assert second == {
        ("reward/overall", 3): 0.125,
        ("reward/overall", 4): 1.0,
        ("actor/pg_loss", 4): float("inf"),
        ("reward/pass@1", 4): 1.0,
    }
    for (folder, records), step, texts in zip(runs, (0, 4), (TAGGED, TAGGED[:1]), strict=True):
        (media,) = swanlab_all(records, "media")
        assert (media.key, media.step) == ("val/generations", step)
        items = media.value.items
        assert [(folder / "media" / "text" / item.filename).read_text("utf-8") for item in items] == texts
        assert [item.caption for item in items] == ["sample 1, score 1.000", "sample 2, score 0.000"][: len(texts)]


def test_swanlab_knows_that_a_run_failed():
    fail("swanlab")
    ((_, records),) = swanlab_runs()
    (finish,) = swanlab_all(records, "finish")
    assert finish.state == RunState.RUN_STATE_CRASHED


# mlflow


def test_mlflow_has_one_run_with_both_starts_metrics_and_texts(store):
    run_id = run_and_resume("mlflow")
    (run,) = store.search_runs([store.get_experiment_by_name("digits").experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (run_id, "demo", "FINISHED")
    assert run.data.params == {
        "trainer.max_steps": "3",
        "trainer.ray_timeline": "null",
        "worker.actor.optim.lr": "1e-06",
    }

    history = store.get_metric_history(run_id, "reward/overall")
    assert [(point.step, point.value) for point in history] == [(1, 0.25), (2, 0.5), (3, 0.75), (3, 0.125), (4, 1.0)]
    assert np.isnan(run.data.metrics["actor/grad_norm"])
    assert run.data.metrics["actor/pg_loss"] > 1e300, "the store's word for infinity"
    assert (run.data.metrics["val/reward_score"], run.data.metrics["reward/pass_1"]) == (0.5, 1.0)

    folder = f"runs:/{run_id}/val/generations"
    texts = [mlflow.artifacts.load_text(f"{folder}/step_{step:06}.txt") for step in (0, 4)]
    assert texts == [f"{TAGGED[0]}\n[score] 1.0\n\n{TAGGED[1]}\n[score] 0.0", f"{TAGGED[0]}\n[score] 1.0"]


def test_mlflow_runs_go_to_the_experiment_that_the_user_named(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    with make_tracker("mlflow"):
        pass
    assert store.get_experiment_by_name("digits") is None
    (run,) = store.search_runs([store.get_experiment_by_name("mine").experiment_id])
    assert run.info.run_id == run_ids()["mlflow"]


def test_a_run_that_only_validates_has_a_run_of_its_own_at_mlflow(store):
    with make_tracker("mlflow") as tracker:
        tracker.log({"reward/overall": 0.5}, 1)
    kept = run_ids()
    with make_tracker("mlflow", resume_step=2, only_validates=True) as tracker:
        tracker.log({"val/reward_score": 0.25}, 2)
    assert run_ids() == kept
    runs = store.search_runs([store.get_experiment_by_name("digits").experiment_id])
    assert len(runs) == 2
    assert list(store.get_run(kept["mlflow"]).data.metrics) == ["reward/overall"]


def test_mlflow_knows_that_a_run_failed(store):
    fail("mlflow")
    assert store.get_run(run_ids()["mlflow"]).info.status == "FAILED"


def test_a_run_that_the_server_does_not_know_is_told_at_once_with_the_file_that_names_it(store):
    Path("run").mkdir()
    (Path("run") / RUN_IDS).write_text(json.dumps({"mlflow": "0" * 32}))
    with pytest.raises(mlflow.MlflowException, match="not found") as caught:
        make_tracker("mlflow", resume_step=2)
    notes = "\n".join(caught.value.__notes__)
    assert "trainer.logger=mlflow" in notes
    assert f"{'0' * 32}; without run/{RUN_IDS} it starts a new one" in notes


def test_training_goes_on_when_a_server_loses_what_it_is_told(store, caplog):
    """A file in the place of mlflow's folder of artifacts, as a disk that went away."""
    with make_tracker("mlflow") as tracker:
        tracker.log_generations(SAMPLES, step=0)
        shutil.rmtree("mlruns")
        Path("mlruns").write_text("")
        tracker.log_generations(SAMPLES, step=1)
        assert "trainer.logger=mlflow failed; training goes on" in caplog.text
        assert "NotADirectoryError" in caplog.text
        tracker.log({"reward/overall": 0.5}, step=1)
    run = store.get_run(run_ids()["mlflow"])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"reward/overall": 0.5})


# all with a server


@pytest.mark.parametrize("logger", ["mlflow", "swanlab", "wandb"])
def test_a_fresh_run_in_the_same_folder_is_a_new_one_to_the_server(logger, request):
    if logger == "mlflow":
        request.getfixturevalue("store")
    ids = []
    for _ in range(2):
        make_tracker(logger).close()
        ids.append(run_ids()[logger])
    assert ids[0] != ids[1]


def test_hyper_parameters_are_flat_and_of_kinds_that_every_library_takes():
    config = {"a": {"b": {"c": 1, "d": True}, "e": {}}, "f": [1, None], "g": None, "h": "text", "i": 0.5}
    assert hyper_parameters(config) == {
        "a.b.c": 1,
        "a.b.d": True,
        "a.e": "{}",
        "f": "[1, null]",
        "g": "null",
        "h": "text",
        "i": 0.5,
    }


# token maps


def log_token_maps(logger: str) -> list[TokenMap]:
    samples = [sample_of(["Ein", "  九", "</script>"], num_images=1), sample_of(["b"])]
    config = {"algorithm": {"token_weight_clip": [0.2, 3.0]}}
    with Tracker([logger], config, "digits", "demo", "run", total_steps=3) as tracker:
        tracker.log({"reward/overall": 0.5}, 2)
        tracker.log_token_maps(samples, 2, "train")
    return samples


def require_page_of(html: str, samples: list[TokenMap]) -> None:
    assert Page(html).responses == ["".join(sample.tokens) for sample in samples]
    assert "demo, step 2" in html


def test_tensorboard_shows_a_picture_of_each_token_map():
    samples = log_token_maps("tensorboard")
    events = EventAccumulator("board/digits/demo").Reload()
    for number, sample in enumerate(samples, start=1):
        (event,) = events.Images(f"train/token_maps/{number}")
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 2 and (shown == token_map_image(sample, (0.2, 3.0))).all()


def test_wandb_shows_token_maps_as_a_page():
    samples = log_token_maps("wandb")
    ((folder, records),) = wandb_runs()
    (row,) = wandb_rows(records)
    assert row["global_step"] == 2 and row["reward/overall"] == 0.5
    require_page_of((folder / "files" / row["train/token_maps/path"]).read_text("utf-8"), samples)


def test_swanlab_shows_token_maps_as_a_page():
    samples = log_token_maps("swanlab")
    ((folder, records),) = swanlab_runs()
    (media,) = swanlab_all(records, "media")
    (item,) = media.value.items
    assert (media.key, media.step) == ("train/token_maps", 2)
    (path,) = (folder / "media").rglob(item.filename)
    require_page_of(path.read_text("utf-8"), samples)


def test_mlflow_keeps_token_maps_as_a_page_among_the_artifacts(store):
    samples = log_token_maps("mlflow")
    page = mlflow.artifacts.load_text(f"runs:/{run_ids()['mlflow']}/train/token_maps/step_000002.html")
    require_page_of(page, samples)
