# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_reward_calls.py
"""How the user's function is called: async, again where it fails, within a time limit, and with an importable file."""

import importlib.util
import sys
import time

import pytest

from tests.test_reward_function import TEXTS, make_batch
from verl.trainer.rewards import RewardClient
from verl.trainer.step_record import StepRecord
from verl.utils.tokenizer import text_decoder
from verl.workers.reward import calls
from verl.workers.reward.config import RewardConfig
from verl.workers.reward.function import reward_samples

PLAIN = """
    REWARD_TYPE = "sequential"
    def compute_score(sample):
        return {"overall": float(len(sample["response"]))}
"""
ASYNC = """
    REWARD_TYPE = "sequential"
    import asyncio
    running = most = 0
    async def compute_score(sample):
        global running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return {"overall": float(len(sample["response"]))}
"""


def attribute_of(manager, name):
    return manager.function._function.__globals__[name]


def score(manager, tokenizer, texts=TEXTS):
    batch = make_batch(tokenizer, texts)
    return manager.function.score(reward_samples(batch, 1, "train"))


# ---- async ----


@pytest.mark.parametrize("limit", [1, 2, 32])
def test_calls_of_an_async_function_run_together_up_to_the_limit_and_give_what_a_plain_one_gives(
    make_manager, tokenizer, limit
):
    manager = make_manager(ASYNC, max_concurrency=limit)
    results = score(manager, tokenizer).results
    assert attribute_of(manager, "most") == min(limit, len(TEXTS))
    assert results == score(make_manager(PLAIN), tokenizer).results
    assert [result["overall"] for result in results] == [len(text) for text in TEXTS]


def test_an_async_function_of_the_list_is_awaited_and_keeps_its_event_loop(make_manager, tokenizer):
    """A client that lives in the module, as HTTP clients do, is bound to the loop it was first used in."""
    manager = make_manager(
        """
        import asyncio
        loops = set()
        async def compute_score(samples):
            loops.add(asyncio.get_running_loop())
            return [{"overall": 0.5} for _ in samples]
        """
    )
    for _ in range(2):
        assert score(manager, tokenizer).results == [{"overall": 0.5}] * 3
    assert len(attribute_of(manager, "loops")) == 1


def test_an_async_failure_names_its_sample_and_ends_the_other_calls(make_manager, tokenizer):
    manager = make_manager(
        """
        REWARD_TYPE = "sequential"
        import asyncio
        ended = []
        async def compute_score(sample):
            if sample["ground_truth"] == "7":
                raise LookupError("no verdict")
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(sample["ground_truth"])
        """
    )
    with pytest.raises(RuntimeError, match="raised LookupError: no verdict for sample 1 .uid a") as failure:
        score(manager, tokenizer)
    assert isinstance(failure.value.__cause__, LookupError)
    assert sorted(attribute_of(manager, "ended")) == ["12", "fox"]


HIDDEN = f"""{ASYNC}
    import functools
    def logged(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)
        return wrapper
    class Scorer:
        async def __call__(self, sample):
            return await compute_score(sample)
    decorated, scorer = logged(compute_score), Scorer()
"""


@pytest.mark.parametrize("name", ["decorated", "scorer"])
def test_a_function_that_only_returns_something_to_await_is_awaited_all_the_same(make_manager, tokenizer, name):
    manager = make_manager(HIDDEN, name=name)
    assert score(manager, tokenizer).results == score(make_manager(PLAIN), tokenizer).results
    assert manager.function.module.most == len(TEXTS)


def test_sys_exit_in_a_task_that_the_function_began_names_the_function(make_manager, tokenizer):
    source = """
    REWARD_TYPE = "sequential"
    import asyncio, sys
    async def ask():
        sys.exit("no key")
    async def compute_score(sample):
        await asyncio.gather(ask())
    """
    manager = make_manager(source)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="my_reward.py:compute_score raised SystemExit: no key for one of 3"):
            score(manager, tokenizer)


# ---- once more ----

FAILS_ONCE = """
    REWARD_TYPE = {kind!r}
    failed = set()
    def check(samples):
        for sample in samples:
            if sample.pop("ground_truth") == "7" and "7" not in failed:
                failed.add("7")
                raise ConnectionError("429 Too Many Requests")
    {start} compute_score(given):
        samples = given if {kind!r} == "batch" else [given]
        check(samples)
        results = [{{"overall": float(len(sample["response"]))}} for sample in samples]
        return results if {kind!r} == "batch" else results[0]
"""


@pytest.mark.parametrize("start", ["def", "async def"])
@pytest.mark.parametrize("kind", ["batch", "sequential"])
def test_a_failure_that_does_not_repeat_is_told_and_its_second_result_used(make_manager, tokenizer, kind, start):
    """The function also takes a key out of what it is given, which the second call is given again."""
    scored = score(make_manager(FAILS_ONCE.format(kind=kind, start=start)), tokenizer)
    assert scored.results == score(make_manager(PLAIN), tokenizer).results
    (told,) = scored.failures
    assert "raised ConnectionError: 429 Too Many Requests for sample" in told
    assert ("sample 1 (uid a" if kind == "sequential" else "samples 0 to 2") in told
    assert told.endswith("the second call succeeded, and its result is used")


@pytest.mark.parametrize("kind", ["batch", "sequential"])
def test_the_second_call_gets_what_the_first_got_and_the_first_failure_is_told_beside_the_second(
    make_manager, tokenizer, kind
):
    source = f"""
    REWARD_TYPE = {kind!r}
    calls = 0
    def compute_score(given):
        global calls
        calls += 1
        sample = given[0] if {kind!r} == "batch" else given
        sample["extra"].pop("level")
        sample["response_tokens"].clear()
        raise ConnectionError("429") if calls == 1 else ValueError("bad")
    """
    with pytest.raises(RuntimeError, match="raised ValueError: bad for .*the first call raised ConnectionError: 429"):
        score(make_manager(source), tokenizer)


def test_there_is_a_pause_before_the_second_call(make_manager, tokenizer, monkeypatch):
    for start in ("def", "async def"):
        manager = make_manager(FAILS_ONCE.format(kind="sequential", start=start))
        monkeypatch.setattr(calls, "RETRY_PAUSE_SECONDS", 0.3)
        began = time.monotonic()
        score(manager, tokenizer)
        assert time.monotonic() - began >= 0.3


def test_a_step_counts_its_retried_calls_and_warns_of_them(make_manager, tokenizer, tmp_path, ray_cluster, caplog):
    config = make_manager(FAILS_ONCE.format(kind="sequential", start="def")).config
    batch, record = make_batch(tokenizer), StepRecord(1)
    with RewardClient(config, str(tmp_path)) as client:
        client.load(text_decoder(tokenizer))
        for _ in range(2):
            client.receive(batch.select(), client.send(batch, 1), record)
    assert record.metrics["reward/retried"] == 1
    assert caplog.text.count("429 Too Many Requests for sample 1") == 1


# ---- leaving otherwise than by an Exception ----


@pytest.mark.parametrize("start", ["def", "async def"])
@pytest.mark.parametrize("kind", ["batch", "sequential"])
@pytest.mark.parametrize(
    ("leave", "message"),
    [
        ("import sys; sys.exit('no key for the judge')", "raised SystemExit: no key for the judge for sample"),
        ("raise Strange('odd')", "raised Strange: odd for sample"),
        ("import asyncio; raise asyncio.CancelledError('gone')", "raised CancelledError: gone for sample"),
    ],
)
def test_sys_exit_and_what_is_no_exception_name_function_and_sample(
    make_manager, tokenizer, leave, message, kind, start
):
    source = f"""
    REWARD_TYPE = {kind!r}
    class Strange(BaseException): ...
    {start} compute_score(given):
        {leave}
    """
    with pytest.raises(RuntimeError, match=message) as failure:
        score(make_manager(source), tokenizer)
    assert "my_reward.py:compute_score" in str(failure.value)


def test_a_file_that_exits_is_an_error_with_its_name(make_manager):
    with pytest.raises(ValueError, match="my_reward.py raised SystemExit: 3"):
        make_manager("raise SystemExit(3)")


# ---- in time ----


HANGS = {
    "sleep": "time.sleep(60)",
    "every exception caught": "while True:\n"
    + 12 * " "
    + "    try: time.sleep(60)\n"
    + 12 * " "
    + "    except Exception: pass",
    "a regular expression": "re.match('(a+)+$', 'a' * 40 + 'b')",
}


@pytest.mark.parametrize("hang", HANGS)
def test_a_call_that_hangs_ends_at_the_limit_and_names_its_sample(make_manager, tokenizer, hang):
    source = f"""
    REWARD_TYPE = "sequential"
    import re, time
    def compute_score(sample):
        if sample["ground_truth"] == "7":
            {HANGS[hang]}
        return {{"overall": 1.0}}
    """
    start = time.monotonic()
    message = "raised TimeoutError: the call took longer than worker.reward.timeout_s=0.2 for sample 1 .uid a"
    with pytest.raises(RuntimeError, match=message):
        score(make_manager(source, timeout_s=0.2), tokenizer)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("start", ["def", "async def"])
def test_a_list_that_hangs_is_not_halved(make_manager, tokenizer, start):
    sleep = "await asyncio.sleep(60)" if start == "async def" else "time.sleep(60)"
    source = f"""
    import asyncio, time
    calls = 0
    {start} compute_score(samples):
        global calls
        calls += 1
        {sleep}
    """
    manager = make_manager(source, timeout_s=0.1)
    with pytest.raises(RuntimeError, match="timeout_s=0.1 for samples 0 to 2 together; the first is sample 0"):
        score(manager, tokenizer)
    assert attribute_of(manager, "calls") == 2


def test_only_the_slow_one_of_many_async_calls_is_ended(make_manager, tokenizer):
    source = """
    REWARD_TYPE = "sequential"
    import asyncio
    slow = {"7"}
    async def compute_score(sample):
        if sample["ground_truth"] in slow:
            slow.clear()
            await asyncio.sleep(60)
        return {"overall": 1.0}
    """
    scored = score(make_manager(source, timeout_s=0.2), tokenizer)
    assert scored.results == [{"overall": 1.0}] * 3
    assert len(scored.failures) == 1 and "timeout_s=0.2 for sample 1" in scored.failures[0]


def test_an_async_function_that_blocks_is_ended_and_told_what_it_does(make_manager, tokenizer, monkeypatch):
    monkeypatch.setattr(calls, "ALARM_REPEAT_SECONDS", 0.1)
    source = """
    REWARD_TYPE = "sequential"
    import time
    async def compute_score(sample):
        time.sleep(60)
    """
    with pytest.raises(RuntimeError, match="an async function must await what takes time.* for sample 0"):
        score(make_manager(source, timeout_s=0.1), tokenizer)


CATCHES = {
    "return in finally": "try:\n            time.sleep(60)\n        finally:\n            return {'overall': 9.0}",
    "a bare except": "try:\n            time.sleep(60)\n        except: pass\n        return {'overall': 9.0}",
}


@pytest.mark.parametrize("catch", CATCHES)
def test_a_call_that_catches_its_interruption_has_failed_all_the_same(make_manager, tokenizer, catch):
    source = f'REWARD_TYPE = "sequential"\nimport time\ndef compute_score(sample):\n        {CATCHES[catch]}\n'
    with pytest.raises(RuntimeError, match="the call took longer than worker.reward.timeout_s=0.1 for sample 0"):
        score(make_manager(source, timeout_s=0.1), tokenizer)


def test_what_an_iterable_takes_to_make_is_part_of_the_call(make_manager, tokenizer):
    source = """
    import time
    class Lazy:
        def __iter__(self):
            time.sleep(60)
            yield {"overall": 1.0}
    def compute_score(samples):
        return {"overall": (1.0 if i == 0 else time.sleep(60) for i in range(3))} if len(samples) < 0 else Lazy()
    """
    with pytest.raises(RuntimeError, match="worker.reward.timeout_s=0.1 for samples 0 to 2"):
        score(make_manager(source, timeout_s=0.1), tokenizer)


def test_a_limit_that_is_not_reached_changes_nothing_and_leaves_no_alarm(make_manager, tokenizer):
    import signal

    before = signal.getsignal(signal.SIGALRM)
    assert score(make_manager(PLAIN, timeout_s=30), tokenizer).results == score(make_manager(PLAIN), tokenizer).results
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == before


# ---- its file in other processes ----


def test_spawned_processes_find_the_file_and_its_neighbours_and_ray_tasks_get_its_functions(
    tokenizer, tmp_path, ray_cluster
):
    """A pool that forks would not need to; one that spawns, as on CUDA, imports the file by name."""
    (tmp_path / "grading_helpers.py").write_text("def length_of(text):\n    return len(text)\n")
    (tmp_path / "pooled_reward.py").write_text(
        "import multiprocessing\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from dataclasses import dataclass\n"
        "import ray\n"
        "import grading_helpers\n"
        "@dataclass\n"
        "class Verdict:\n"
        "    score: float\n"
        "def judge(text):\n"
        "    return Verdict(float(grading_helpers.length_of(text)))\n"
        "def judge_by_ray(text):\n"
        "    return Verdict(float(len(text)))\n"
        "def main(samples):\n"
        "    texts = [sample['response'] for sample in samples]\n"
        "    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:\n"
        "        pooled = list(pool.map(judge, texts))\n"
        "    remote = ray.get([ray.remote(num_cpus=0)(judge_by_ray).remote(text) for text in texts])\n"
        "    assert all(isinstance(verdict, Verdict) for verdict in pooled + remote)\n"
        "    assert pooled == remote\n"
        "    return [{'overall': verdict.score} for verdict in pooled]\n"
    )
    with RewardClient(RewardConfig(reward_function=f"{tmp_path}/pooled_reward.py"), str(tmp_path)) as client:
        client.load(text_decoder(tokenizer))
        scores, _ = client.validate(make_batch(tokenizer), step=1)
    assert scores == [len(text) for text in TEXTS]


def test_a_file_named_like_a_module_hides_nothing(make_manager, tmp_path, tokenizer):
    """Neither one that is loaded nor one that is only installed."""
    import math

    assert "this" not in sys.modules
    for name in ("math", "this"):
        body = "def compute_score(samples):\n    return [{'overall': 0.5} for _ in samples]\n"
        (tmp_path / f"{name}.py").write_text(body)
        config = RewardConfig(reward_function=f"{tmp_path}/{name}.py:compute_score")
        manager = type(make_manager(PLAIN))(config, tokenizer)
        assert score(manager, tokenizer).results == [{"overall": 0.5}] * 3
        assert manager.function.module.__name__.startswith("user_code_")
    assert sys.modules["math"] is math
    assert "site-packages" not in importlib.util.find_spec("this").origin
    assert not importlib.util.find_spec("this").origin.startswith(str(tmp_path))


def test_a_file_that_changes_or_goes_while_a_run_has_it_changes_nothing(tmp_path, tokenizer, ray_cluster):
    path = tmp_path / "edited.py"
    path.write_text('REWARD_TYPE = "sequential"\ndef main(sample):\n    return {"overall": 1.0}\n')
    with RewardClient(RewardConfig(reward_function=str(path)), str(tmp_path)) as client:
        client.load(text_decoder(tokenizer))
        for change in (lambda: path.write_text('REWARD_TYPE = "proto"\n'), path.unlink):
            change()
            assert client.validate(make_batch(tokenizer), step=1)[0] == [1.0] * 3


def test_weights_that_do_nothing_are_told_of_once(tmp_path, tokenizer, ray_cluster, caplog):
    path = tmp_path / "weighs.py"
    path.write_text(
        'REWARD_TYPE = "sequential"\ndef main(sample):\n    return {"overall": 1.0, "token_weights": [0.5]}\n'
    )
    for is_used, count in ((True, 0), (False, 1)):
        caplog.clear()
        config = RewardConfig(reward_function=str(path))
        with RewardClient(config, str(tmp_path), uses_token_weights=is_used) as client:
            client.load(text_decoder(tokenizer))
            for step in (1, 2):
                batch = make_batch(tokenizer)
                client.receive(batch, client.send(batch, step), StepRecord(step))
        told = [record for record in caplog.messages if "token_weights, which have no effect" in record]
        assert len(told) == count
