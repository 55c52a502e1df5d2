# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_reward_faults.py
"""Reward functions that hang, crash, fork, flood the console or leak: each ends in bounded time, told by its name."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import psutil
import pytest
import ray

from tests.processes import are_gone, processes_marked
from tests.test_reward_function import TEXTS, make_batch
from tests.test_training_run import ROOT
from verl.single_controller import waiting
from verl.trainer import rewards
from verl.trainer.rewards import RewardClient
from verl.trainer.step_record import StepRecord
from verl.utils.machine_memory import memory_in_use
from verl.utils.tokenizer import text_decoder
from verl.workers.reward import calls, output_log
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.output_log import Output
from verl.workers.reward.supervision import Limits

MIB = 2**20
SOON = Limits(grace_s=0.5)


@pytest.fixture
def start(tmp_path: Path, tokenizer, ray_cluster) -> Iterator[Callable[..., RewardClient]]:
    """From the source of a function's file to its loaded client, with the run's folder in `tmp_path`."""
    clients = []

    def make(source: str, limits: Limits | None = None, **settings: float) -> RewardClient:
        path = tmp_path / "faulty.py"
        path.write_text(dedent(source))
        client = RewardClient(RewardConfig(reward_function=str(path), **settings), str(tmp_path / "run"), limits)
        clients.append(client)
        client.load(text_decoder(tokenizer))
        return client

    yield make
    for client in clients:
        client.__exit__()


def pid_of(client: RewardClient) -> int:
    return ray.get(client._process._location).pid


def supervisor_of(client: RewardClient) -> psutil.Process:
    pid = f'"pid": {pid_of(client)},'
    processes = (process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE)
    (found,) = (process for process in processes if any(pid in argument for argument in process.cmdline()))
    return found


@contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


# ---- calls that do not end ----

HANGS = {
    "an alarm of its own": "signal.setitimer(signal.ITIMER_REAL, 0); time.sleep(600)",
    "a blocked alarm": "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM]); time.sleep(600)",
    "native code": "sum(range(10**14))",
    "a stopped process": "os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_call_that_no_signal_can_interrupt_ends_with_its_process_and_names_function_and_sample(
    hang: str, start, tokenizer
) -> None:
    source = f"""
    REWARD_TYPE = "sequential"
    import os, signal, time
    def main(sample):
        if sample["ground_truth"] == "7":
            {HANGS[hang]}
        return {{"overall": 1.0}}
    """
    client = start(source, SOON, timeout_s=0.3)
    how = r"was stopped .*\(SIGSTOP\)" if hang == "a stopped process" else ".* and could not be interrupted"
    with within(15), pytest.raises(RuntimeError, match=r"faulty.py:main " + how) as failure:
        client.validate(make_batch(tokenizer), step=4)
    told = str(failure.value)
    assert "in the call for sample 1 (uid a, ground_truth '7', response 'What is the sum?')" in told
    assert (
        "worker.reward.timeout_s=0.3" in told and ". It was scoring 3 samples of the validation after step 4. " in told
    )
    assert told.endswith("goes on from the last checkpoint") and len(told) < 600
    assert are_gone([pid_of(client)])


def test_a_list_that_no_signal_can_interrupt_names_its_samples(start, tokenizer) -> None:
    client = start("def main(samples):\n    sum(range(10**14))\n", SOON, timeout_s=0.3)
    with (
        within(15),
        pytest.raises(RuntimeError, match="in the call for samples 0 to 2, starting with sample 0 "),
    ):
        client.validate(make_batch(tokenizer), step=1)


WELL = "def main(samples):\n    return [{'overall': 1.0} for _ in samples]\n"


def test_a_process_that_is_stopped_before_a_call_can_begin_ends_the_wait(start, tokenizer) -> None:
    client = start(WELL, SOON, timeout_s=0.3)
    os.kill(pid_of(client), signal.SIGSTOP)
    with within(15), pytest.raises(RuntimeError, match=r"was stopped \(SIGSTOP\).* It was scoring 3 samples of the"):
        client.validate(make_batch(tokenizer), step=1)


def test_a_supervisor_that_is_stopped_too_does_not_make_the_wait_endless(start, tokenizer, monkeypatch) -> None:
    """2 x 3 + 2 calls of 0.1 s and pauses of 0.1 s, and twice the grace: 2.6 s."""
    monkeypatch.setattr(calls, "RETRY_PAUSE_SECONDS", 0.1)
    client = start(WELL, SOON, timeout_s=0.1)
    supervisor = supervisor_of(client)
    supervisor.suspend()
    try:
        os.kill(pid_of(client), signal.SIGSTOP)
        message = r"^no answer came within 3 s from the reward function .*faulty.py:main, scoring 3 samples "
        with within(10), pytest.raises(RuntimeError, match=message):
            client.validate(make_batch(tokenizer), step=1)
    finally:
        supervisor.resume()


def test_a_wait_for_the_function_is_told_with_its_process_and_what_it_is_about(
    start, tokenizer, monkeypatch, caplog
) -> None:
    """Also without a time limit."""
    monkeypatch.setattr(waiting, "REPORT_SECONDS", 0.3)
    client = start(
        "import time\ndef main(samples):\n    time.sleep(1)\n    return [{'overall': 1.0} for _ in samples]\n"
    )
    caplog.clear()
    with caplog.at_level("INFO", "verl"):
        client.receive(make_batch(tokenizer), client.send(make_batch(tokenizer), 7), StepRecord(7))
    lines = [record.message for record in caplog.records if "still waiting" in record.message]
    assert 2 <= len(lines) <= 3
    assert f"(process {pid_of(client)} of node {ray.util.get_node_ip_address()}" in lines[0]
    assert "faulty.py:main" in lines[0] and "scoring 3 samples of step 7" in lines[0]


# ---- what it started ----

STARTS_OTHERS = """
    import ctypes, multiprocessing, os, subprocess, sys, time
    from pathlib import Path

    def wait():
        time.sleep(600)

    def daemon(folder):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                Path(folder, "daemon").write_text(str(os.getpid()))
                time.sleep(600)
            os._exit(0)

    def main(samples, folder, end):
        if Path(folder, "pids").exists():  # called again
            exec(end)
        daemon(folder)
        others = [
            subprocess.Popen(["sleep", "600"]),
            subprocess.Popen(["sleep", "600"], start_new_session=True),
            subprocess.Popen(["sleep", "600"], start_new_session=True, env={}),
            subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600"]),
        ]
        pool = multiprocessing.get_context("fork").Process(target=wait)
        pool.start()
        while not Path(folder, "daemon").exists() or not Path(folder, "daemon").read_text():
            time.sleep(0.02)
        pids = [*(other.pid for other in others), pool.pid, int(Path(folder, "daemon").read_text())]
        Path(folder, "pids.tmp").write_text(" ".join(map(str, pids)))
        Path(folder, "pids.tmp").rename(Path(folder, "pids"))
        time.sleep(1.5)  # one that left group and environment is known after a second
        exec(end)
        return [{"overall": 1.0} for _ in samples]
"""

ENDS = {
    "a crash": "ctypes.string_at(0)",
    "sudden death": "os._exit(1)",
    "SIGKILL": "os.kill(os.getpid(), 9)",
    "an error": "1 / 0",
    "a stop": "os.kill(os.getpid(), 19)",
    "nothing": "",
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_that_the_function_started_outlives_its_process(end: str, start, tokenizer, tmp_path, capfd) -> None:
    """Whether a run ends well, by its own error, or with a process that dies or has stopped."""
    settings = {"reward_function_kwargs": {"folder": str(tmp_path), "end": ENDS[end]}}
    client = start(STARTS_OTHERS, SOON, **settings, timeout_s=5 if end == "a stop" else None)
    messages = {
        "an error": "ZeroDivisionError",
        "a stop": "was stopped in the call for samples 0 to 2",
        **dict.fromkeys(
            ("a crash", "sudden death", "SIGKILL"), "^the reward function's process on node .* died without"
        ),
    }
    with within(20):
        if end == "nothing":
            client.validate(make_batch(tokenizer), step=1)
        else:
            with pytest.raises(RuntimeError, match=messages[end]):
                client.validate(make_batch(tokenizer), step=1)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 6
    if end in ("nothing", "an error"):
        assert not are_gone(pids[:1], 0)
        client.__exit__()
    assert are_gone([*pids, pid_of(client)])
    if end == "a crash":
        assert "in main" in _console(capfd, until="SIGSEGV") + (tmp_path / "run" / "reward.log").read_text()


def test_what_was_started_in_the_last_moment_is_found_by_its_group_or_its_environment(
    start, tokenizer, tmp_path
) -> None:
    source = f"""
    import os, subprocess, time
    from pathlib import Path
    def main(samples):
        in_group = os.fork()
        if in_group == 0:
            time.sleep(600)
        marked = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path({str(tmp_path)!r}, "pids").write_text(f"{{in_group}} {{marked.pid}}")
        os._exit(1)
    """
    client = start(source)
    supervisor = supervisor_of(client)
    supervisor.suspend()  # lest it has looked in that moment
    threading.Timer(1.5, supervisor.resume).start()
    with within(20), pytest.raises(RuntimeError, match="died without a Python error"):
        client.validate(make_batch(tokenizer), step=1)
    assert are_gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])


def test_nothing_outlives_a_driver_and_a_raylet_that_are_killed(tmp_path, tiny_model_path) -> None:
    """Not even a reward process that has stopped. The supervisor goes last."""
    (tmp_path / "faulty.py").write_text(dedent(STARTS_OTHERS))
    code = f"""
    import ray
    from tests.test_reward_function import make_batch
    from verl.trainer.rewards import RewardClient
    from verl.utils.tokenizer import get_tokenizer, text_decoder
    from verl.workers.reward.config import RewardConfig
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20)
    arguments = {{"folder": {str(tmp_path)!r}, "end": "os.kill(os.getpid(), 19)"}}
    config = RewardConfig(reward_function={f"{tmp_path}/faulty.py"!r}, reward_function_kwargs=arguments)
    tokenizer = get_tokenizer({tiny_model_path!r})
    client = RewardClient(config, {str(tmp_path)!r})
    client.load(text_decoder(tokenizer))
    with open({f"{tmp_path}/reward_pid"!r}, "w") as file:
        file.write(str(ray.get(client._process._location).pid))
    client.validate(make_batch(tokenizer), 1)
    """
    mark = f"{tmp_path}"
    driver = subprocess.Popen(
        [sys.executable, "-c", dedent(code)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "VERL_TEST_MARK": mark},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240  # Ray and the reward process start, on a busy machine in minutes
        while not (tmp_path / "pids").exists():
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        reward = psutil.Process(int((tmp_path / "reward_pid").read_text()))
        while reward.status() != psutil.STATUS_STOPPED:  # which it does to itself
            time.sleep(0.1)
        reward.parent().kill()
    finally:
        driver.kill()
        driver.wait()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert are_gone([reward.pid, *pids])
    # Ray's agents, without a guard of their cluster, take a minute.
    marked = {pid: psutil.Process(pid) for pid in processes_marked(mark)}
    agents = [process for process in marked.values() if process.name().startswith("ray::")]
    assert are_gone([pid for pid, process in marked.items() if process not in agents])
    for agent in agents:
        agent.kill()


# ---- what it prints ----


def test_what_is_printed_shows_on_the_console_and_is_kept_in_the_runs_folder(
    start, tokenizer, tmp_path, capfd
) -> None:
    source = """
    import os, subprocess, sys
    def main(samples):
        print("graded three")
        print("a warning", file=sys.stderr)
        subprocess.run(["echo", "from a child"])
        return [{"overall": 1.0} for _ in samples]
    """
    client = start(source)
    client.validate(make_batch(tokenizer), step=1)
    console = _console(capfd, until="from a child")
    assert "graded three" in console and "a warning" in console
    head, *lines = (tmp_path / "run" / "reward.log").read_text().splitlines()
    assert head.startswith("--- ") and head.endswith(f", process {pid_of(client)} on {os.uname().nodename} ---")
    assert set(lines) == {"graded three", "a warning", "from a child"}
    client.__exit__()
    start(source).validate(make_batch(tokenizer), step=1)
    _console(capfd, until="from a child")
    assert (tmp_path / "run" / "reward.log").read_text().count("graded three") == 2


def test_twenty_megabytes_go_to_the_file_and_one_line_to_the_console(start, tokenizer, tmp_path, capfd) -> None:
    source = """
    def main(samples):
        for number in range(200_000):
            print(f"{number:08d} " + "x" * 91)
        return [{"overall": 1.0} for _ in samples]
    """
    client = start(source)
    with within(60):
        client.validate(make_batch(tokenizer), step=1)
    log = tmp_path / "run" / "reward.log"
    console = _console(capfd, until=f"the reward function prints more than 64 KiB a minute; what follows is in {log}")
    assert len(console) < 2 * output_log.CONSOLE_BYTES_PER_MINUTE
    client.__exit__()
    assert are_gone([pid_of(client)])
    _, *lines = log.read_text().splitlines()
    assert [int(line[:8]) for line in lines] == list(range(200_000))


def test_the_file_is_bounded_in_rate_and_size_and_says_what_it_lacks(tmp_path, monkeypatch) -> None:
    """1000 lines of 10 bytes in a minute that takes 500 of them; then files of 2000 bytes; two stay."""
    monkeypatch.setattr(output_log, "FILE_BYTES_PER_MINUTE", 5_000)
    monkeypatch.setattr(output_log, "FILE_BYTES", 2_000)
    path, nowhere = tmp_path / "made" / "reward.log", os.open(os.devnull, os.O_WRONLY)
    output = Output(path, "title")
    output.take(b"".join(b"%09d\n" % number for number in range(1000)), nowhere)
    output.take(b"an end without a line's end", nowhere)
    output.close()
    os.close(nowhere)
    old, new = ((tmp_path / "made" / name).read_text().splitlines() for name in ("reward.log.1", "reward.log"))
    assert new[-1] == "[501 lines beyond 0 MiB a minute were dropped]" and new[-2] == f"{499:09d}"
    assert sum(path.stat().st_size for path in path.parent.iterdir()) < 2 * 2_100
    assert old[1] == f"{int(old[-1]) - len(old) + 2:09d}"


def test_a_folder_that_cannot_be_written_is_told_once_and_prints_go_on(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    shown, console = os.pipe()
    monkeypatch.setattr(output_log, "CONSOLE_OF_ERRORS", console)
    output = Output(tmp_path / "file" / "reward.log", "title")
    output.take(b"one\ntwo\n", console)
    output.close()
    os.close(console)
    with open(shown, "rb") as stream:
        lines = stream.read().decode().splitlines()
    assert lines[1:] == ["one", "two"]
    assert lines[0].endswith(
        "reward.log cannot be written (File exists); what the reward function prints is kept nowhere"
    )


def _console(capfd, until: str, seconds: float = 20) -> str:
    """What the driver showed until a text came, which Ray brings with a delay."""
    console, deadline = "", time.monotonic() + seconds
    while until not in console:
        assert time.monotonic() < deadline, console[-2000:]
        time.sleep(0.2)
        captured = capfd.readouterr()
        console += captured.out + captured.err
    return console


# ---- what it holds ----

LEAKS = """
    kept = []
    def main(samples, mib):
        kept.append(bytearray(b"x") * (mib * 2**20))
        return [{"overall": 1.0} for _ in samples]
"""


def test_memory_is_a_metric_and_its_growth_is_told_by_name_at_every_doubling(
    start, tokenizer, monkeypatch, caplog
) -> None:
    """From some 100 MiB after the first batch on, 100 MiB a batch."""
    monkeypatch.setattr(rewards, "GROWTH_TO_TELL", 150 * MIB)
    client = start(LEAKS, reward_function_kwargs={"mib": 100})
    held, told = [], []
    for step in range(1, 7):
        record, batch = StepRecord(step), make_batch(tokenizer)
        client.receive(batch, client.send(batch, step), record)
        held.append(record.metrics["perf/reward_memory_gb"] * 1024)
        told.append("faulty.py:main and its children hold" in caplog.text)
        caplog.clear()
    growth = [after - before for before, after in zip(held, held[1:], strict=False)]
    assert all(95 < step < 110 for step in growth)
    first = next(index for index, is_told in enumerate(told) if is_told)
    assert held[first] >= max(2 * held[0], held[0] + 150) > held[first - 1]
    assert told.count(True) == 1 + any(value >= 2 * held[first] for value in held)


def test_children_count_and_what_they_share_counts_once(start, tokenizer) -> None:
    source = """
    import multiprocessing, time
    shared = bytearray(b"x") * (100 * 2**20)
    def hold():
        own = bytearray(b"x") * (100 * 2**20)
        time.sleep(600)
    def main(samples):
        for _ in range(samples[0]["step"]):
            multiprocessing.get_context("fork").Process(target=hold, daemon=True).start()
        time.sleep(1)
        return [{"overall": 1.0} for _ in samples]
    """
    client = start(source)
    held = []
    for step in (0, 2):
        record, batch = StepRecord(step), make_batch(tokenizer)
        client.receive(batch, client.send(batch, step), record)
        held.append(record.metrics["perf/reward_memory_gb"] * 1024)
    assert held[0] > 100
    assert 200 < held[1] - held[0] < 260


def test_a_function_that_fills_the_machine_is_ended_by_name_before_the_machine_is_full(start, tokenizer) -> None:
    """The machine counts as full with nothing in use, and the function may grow by 300 MiB after its first batch."""
    limits = Limits(full_share=0.0, growth_share=300 * MIB / memory_in_use()[1])
    client = start(LEAKS, limits, reward_function_kwargs={"mib": 200})
    for _ in range(2):  # 200 in the first batch, and 200 more
        client.validate(make_batch(tokenizer), step=1)
    time.sleep(1.5)
    message = r"faulty.py:main and its children have grown from 0.\d to 0.\d GiB, and .* GiB are in use"
    with within(20), pytest.raises(RuntimeError, match=message):
        for _ in range(20):
            client.validate(make_batch(tokenizer), step=1)
            time.sleep(0.5)


def test_a_machine_that_is_full_of_other_things_is_no_reason_to_end_the_function(start, tokenizer) -> None:
    """It has 100 MiB when it is loaded, takes 100 in its first batch and 100 in its second, and may grow by 150."""
    source = "loaded = bytearray(b'x') * (100 * 2**20)\n" + dedent(LEAKS)
    limits = Limits(full_share=0.0, growth_share=150 * MIB / memory_in_use()[1])
    client = start(source, limits, reward_function_kwargs={"mib": 100})
    for step in (1, 2):
        assert client.validate(make_batch(tokenizer), step)[0] == [1.0] * len(TEXTS)
        time.sleep(1.5)
    assert not are_gone([pid_of(client)], 0)


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_goes_before_the_machines_memory(version: int, tmp_path) -> None:
    """3000 bytes in use; the kernel can reclaim 1000."""
    names = {
        1: (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
        2: ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    }[version]
    (tmp_path / "memory").mkdir()
    for name, text in zip(names, ("4000", "3000", f"anon 5\n{names[3]} 1000\n"), strict=False):
        (tmp_path / name).write_text(text)
    assert memory_in_use(tmp_path) == (2000, 4000)
    (tmp_path / names[0]).write_text("max" if version == 2 else str(2**63 - 4096))
    assert memory_in_use(tmp_path)[1] == psutil.virtual_memory().total
