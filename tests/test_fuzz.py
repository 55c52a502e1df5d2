# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_fuzz.py
"""Whatever a user's files hold, they are taken or refused by key, row or file: never a hang, never another error."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.test_reward_function import make_batch
from verl.data.dataset import RLHFDataset
from verl.trainer.config import DataConfig, PPOConfig, load_config
from verl.utils.checkpoint import find_resume_point, is_model_only, read_kl_coef, step_folder, write_tracker
from verl.utils.checkpoint_folder import find_changes, publish, record_files, unfinished_folder, write_manifest
from verl.utils.safe_load import load_tensors


def tried(count: int) -> settings:
    """The same examples each time; what one writes, the next writes over."""
    unhealthy = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=unhealthy
    )


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "null", "~", "1e400", "-1", "[", "${x}", "a:b", "/", "\0", "𝒳"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def refusal_of(load: Callable[[], Any]) -> str | None:
    try:
        load()
    except ValueError as error:
        return str(error)
    return None


def names(told: str, text: str) -> bool:
    """Whether an error shows a text, perhaps with its unprintable characters escaped, or as YAML reads them."""
    return text in told or repr(text)[1:-1] in told or not text.isprintable() or "\\" in text


# ---- configurations ----


@tried(60)
@given(content=st.binary(max_size=60) | st.text("ab: -[]{}&*!|>?#'\"%@`,\n\t0", max_size=60).map(str.encode))
def test_a_file_of_any_bytes_is_taken_or_refused_as_the_file_or_by_a_key(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    told = refusal_of(lambda: load_config([f"config={path}"]))
    assert told is None or str(path) in told or "key" in told
    assert told is None or len(told) < 1500


def keys_of(section: type, prefix: str = "") -> list[str]:
    """Every key below a section, sections too."""
    keys = []
    for name, field in section.__dataclass_fields__.items():
        keys.append(prefix + name)
        if is_dataclass(field.type):
            keys += keys_of(field.type, f"{prefix}{name}.")
    return keys


KEYS = st.sampled_from(keys_of(PPOConfig)) | st.text(max_size=6)


@tried(60)
@given(tree=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_a_yaml_of_any_values_is_taken_or_refused_with_the_key(tree: dict[str, Any], tmp_path: Path) -> None:
    nested: dict[str, Any] = {}
    for key, value in tree.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                return  # one of the keys is a section of another
        place[name] = value
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(nested, allow_unicode=True))
    told = refusal_of(lambda: load_config([f"config={path}"]))
    if told is not None:
        assert str(path) in told or any(names(told, part) for key in tree for part in key.split("."))
        assert "Traceback" not in told and len(told) < 1500


@tried(60)
@given(key=KEYS, value=SCALARS | st.text(max_size=20))
def test_an_argument_of_any_text_is_taken_or_refused_with_the_key(key: str, value: Any) -> None:
    argument = f"{key}={value}"
    told = refusal_of(lambda: load_config([argument]))
    if told is not None:
        assert names(told, argument.partition("=")[0].rpartition(".")[2]) or names(told, argument)


# ---- rows ----


@tried(60)
@given(
    rows=st.lists(
        st.fixed_dictionaries({}, optional={"prompt": VALUES, "answer": VALUES, "images": VALUES, "videos": VALUES}),
        min_size=1,
        max_size=3,
    )
)
def test_rows_of_any_content_are_read_or_refused_by_row_or_file(
    rows: list[dict[str, Any]], tokenizer, private_cache, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(max_prompt_length=64, filter_overlong_prompts_workers=1)

    def read() -> None:
        dataset = RLHFDataset(str(path), tokenizer, None, config=config)
        for index in range(len(dataset)):
            dataset[index]

    told = refusal_of(read)
    if told is not None:
        assert re.search(r"rows\.jsonl|row \d+|prompt_key|answer_key|image_key|video_key", told), told
        assert len(told) < 1500


# ---- what reward functions return ----

RETURNED = VALUES | st.lists(
    st.fixed_dictionaries({"overall": VALUES}, optional={"token_weights": VALUES, "accuracy": VALUES}),
    min_size=2,
    max_size=4,
)


@tried(150)
@given(returned=RETURNED)
def test_results_of_any_form_are_taken_or_refused_with_the_function(
    returned: Any, make_manager: Callable[..., Any], tokenizer
) -> None:
    manager = make_manager("def compute_score(reward_inputs): ...\n")
    manager.function._calls._function = lambda _: returned
    batch = make_batch(tokenizer)
    try:
        scored = manager.score(batch)
    except (ValueError, RuntimeError) as error:
        assert "compute_score" in str(error) and len(str(error)) < 1500
    else:
        assert scored.batch["token_level_scores"].isfinite().all()


# ---- bytes of checkpoints ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint with every kind of file."""
    root = tmp_path_factory.mktemp("saved")
    folder = step_folder(str(root), 3)
    unfinished = Path(unfinished_folder(folder))
    (unfinished / "actor").mkdir()
    torch.save({"w": torch.arange(6.0).view(2, 3)}, unfinished / "actor" / "model_world_size_1_rank_0.pt")
    torch.save({"rng": torch.get_rng_state()}, unfinished / "actor" / "extra_state_world_size_1_rank_0.pt")
    torch.save({"epoch": 0, "position": 4}, unfinished / "dataloader.pt")
    (unfinished / "kl_coef.json").write_text('{"kl_coef": 0.25}')
    write_manifest(str(unfinished), 3, False, record_files(unfinished, *unfinished.rglob("*")))
    publish(folder)
    write_tracker(str(root), 3, None, None)
    return root


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut, overwritten or lengthened somewhere."""
    place, junk = draw(st.floats(0, 1)), draw(st.binary(min_size=1, max_size=40))
    kind = draw(st.sampled_from(["cut", "overwritten", "lengthened"]))

    def change(content: bytes) -> bytes:
        first = int(place * len(content))
        rest = {"cut": b"", "overwritten": junk + content[first + len(junk) :], "lengthened": junk + content[first:]}
        return content[:first] + rest[kind]

    return change


NAMES = (
    "actor/model_world_size_1_rank_0.pt",
    "actor/extra_state_world_size_1_rank_0.pt",
    "dataloader.pt",
    "kl_coef.json",
)


@tried(150)
@given(name=st.sampled_from([*NAMES, "manifest.json"]), change=changes())
def test_any_change_of_a_checkpoint_is_found_by_the_file(
    name: str, change: Callable[[bytes], bytes], saved: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(saved, root)
    path = root / "global_step_3" / name
    before = path.read_bytes()
    path.write_bytes(change(before))

    def check() -> None:
        point = find_resume_point(str(root), None, find_last=True)
        if (problem := find_changes(point.folder)) is not None:
            raise ValueError(problem)

    told = refusal_of(check)
    if path.read_bytes() != before and name != "manifest.json":
        assert told is not None
    if told is not None:
        assert str(root / "global_step_3") in told and len(told) < 1000


@tried(300)
@given(name=st.sampled_from(NAMES), change=changes())
def test_changed_files_without_a_manifest_are_read_or_refused_by_the_file(
    name: str, change: Callable[[bytes], bytes], saved: Path, tmp_path: Path
) -> None:
    path = tmp_path / "global_step_3" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(change((saved / "global_step_3" / name).read_bytes()))
    read = read_kl_coef if name == "kl_coef.json" else load_tensors
    told = refusal_of(lambda: read(str(path.parent) if name == "kl_coef.json" else path))
    if told is not None:
        assert str(path) in told and len(told) < 700


@tried(150)
@given(
    content=VALUES
    | st.dictionaries(st.sampled_from(["last_global_step", "best_global_step", "best_val_reward_score"]), VALUES)
)
def test_a_tracker_of_any_content_gives_a_whole_checkpoint(content: Any, saved: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    if not root.exists():
        shutil.copytree(saved, root)
    (root / "checkpoint_tracker.json").write_text(json.dumps(content))
    point = find_resume_point(str(root), None, find_last=True)
    assert point.step == 3 and not is_model_only(point.folder)
    assert point.best_score is None or isinstance(point.best_score, (int, float))
