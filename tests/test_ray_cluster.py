# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_ray_cluster.py
"""A cluster that a run starts lets in its own processes only; what the user has chosen stays."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from verl.trainer.ray_cluster import _write_timeline, require_cluster, token_authentication

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
AUTHENTICATION = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

RUN = """
import json, os, sys
from verl.trainer.config import load_config
from verl.trainer.ray_cluster import ray_session

def say(**content):
    sys.stdout.write(json.dumps(content) + "\\n")
    sys.stdout.flush()

with ray_session(load_config([])):
    import ray
    context = ray.get_runtime_context()
    say(address=context.gcs_address, folder=ray._private.worker._global_node.get_session_dir_path(),
        token=os.environ.get("RAY_AUTH_TOKEN"), works=ray.get(ray.remote(lambda: 6 * 7).remote()))
    sys.stdin.readline()
say(left=[name for name in os.environ if name.startswith("RAY_AUTH")])
"""

STRANGER = """
import pathlib, ray, sys
address, path = sys.argv[1:]
ray.init(address=address, logging_level="ERROR")
ray.get(ray.remote(lambda: pathlib.Path(path).touch()).remote())
"""


def environment(**variables: str) -> dict[str, str]:
    """Of a process that has neither a home folder nor any word about authentication, but for `variables`."""
    without = {name: value for name, value in os.environ.items() if name not in (*AUTHENTICATION, "HOME")}
    return {**without, "PYTHONPATH": str(ROOT), **variables}


def authentication() -> dict[str, str]:
    return {name: os.environ[name] for name in AUTHENTICATION if name in os.environ}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, Any]]:
    """What a process without a home folder says of its cluster, which ends with the tests."""
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", RUN], env=environment(), **pipes) as process:
        yield json.loads(process.stdout.readline())
        assert json.loads(process.communicate("\n", timeout=60)[0]) == {"left": []}


def enters(address: str, touched: Path, variables: Mapping[str, str]) -> str | None:
    """None if another process with these variables runs code in the cluster, or what it is told."""
    finished = subprocess.run(
        [sys.executable, "-c", STRANGER, address, str(touched)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (finished.returncode == 0) == touched.exists()
    return finished.stderr if finished.returncode else None


def test_only_who_has_the_token_runs_code_in_a_runs_cluster(cluster: dict[str, Any], tmp_path: Path) -> None:
    assert cluster["works"] == 42
    token = cluster["token"]
    keys = {
        "nothing": {},
        "a wrong token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token[:-1] + ("0" if token[-1] != "0" else "1")},
        "the token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
    }
    with ThreadPoolExecutor() as pool:
        tries = {name: pool.submit(enters, cluster["address"], tmp_path / name, keys[name]) for name in keys}
    told = {name: result.result() for name, result in tries.items()}
    assert told.pop("the token") is None
    for name, error in told.items():
        assert error is not None, f"with {name} a stranger runs code"
        assert "Authentication" in error


def test_the_token_is_random_and_in_no_arguments_and_no_logs(cluster: dict[str, Any]) -> None:
    token = cluster["token"]
    assert len(token) == 64 and set(token) <= set("0123456789abcdef")
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert token.encode() not in arguments.read_bytes()
        except OSError:  # the process has ended
            continue
    logs = [path for path in Path(cluster["folder"]).rglob("*") if path.is_file()]
    assert any(path.name.startswith("gcs_server") for path in logs)
    assert [path for path in logs if token.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "chosen",
    [
        {"RAY_AUTH_MODE": "disabled"},
        {"RAY_AUTH_MODE": "token"},
        {"RAY_AUTH_TOKEN_PATH": "/a/file"},
        {"RAY_AUTH_TOKEN": "an own token"},
        {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "an own token"},
    ],
)
def test_what_the_user_chose_stays(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    with token_authentication():
        inside = authentication()
    assert authentication() == chosen
    if chosen.get("RAY_AUTH_MODE") == "disabled":
        assert inside == chosen
        return
    assert "RAY_AUTH_MODE" not in inside, "`ray.init` sets it"
    own = {name: value for name, value in chosen.items() if name != "RAY_AUTH_MODE"}
    if own:
        assert inside == own
    else:
        assert len(inside["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize("mode", ["", "token"])
def test_a_mode_that_is_empty_or_said_to_be_token_keeps_strangers_out_as_well(mode: str, tmp_path: Path) -> None:
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", RUN], env=environment(RAY_AUTH_MODE=mode), **pipes) as process:
        said = json.loads(process.stdout.readline())
        assert said["works"] == 42
        assert "Authentication" in enters(said["address"], tmp_path / "touched", {})
        process.communicate("\n", timeout=60)


def test_a_mode_that_ray_would_take_for_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "tokens")
    with pytest.raises(ValueError, match="RAY_AUTH_MODE=tokens is neither token nor disabled"):
        require_cluster()


def test_a_process_has_one_secret_and_keeps_nothing_of_it_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray reads a token once, so that a second run in the same process has to come with the same."""
    for name in AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    tokens = []
    for _ in range(2):
        with token_authentication():
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
            os.environ["RAY_AUTH_MODE"] = "token"  # as `ray.init` does
        assert authentication() == {}
    assert tokens[0] == tokens[1]


def test_a_ray_that_would_let_anybody_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.trainer.ray_cluster import _start_ray

    for name in AUTHENTICATION:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("ray.init", lambda *args, **options: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    with pytest.raises(ValueError, match=f"Ray {ray.__version__} would let anybody into the run's cluster"):
        _start_ray(num_cpus=1)


def test_a_timeline_that_cannot_be_written_is_a_warning_and_its_folder_is_made(
    tmp_path: Path, ray_cluster, caplog: pytest.LogCaptureFixture
) -> None:
    _write_timeline(str(tmp_path / "new" / "timeline.json"))
    assert isinstance(json.loads((tmp_path / "new" / "timeline.json").read_text()), list)
    (tmp_path / "file").touch()
    _write_timeline(str(tmp_path / "file" / "timeline.json"))
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith(f"trainer.ray_timeline={tmp_path}/file/timeline.json could not be written")
