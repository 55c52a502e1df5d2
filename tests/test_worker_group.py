# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_worker_group.py
"""One object drives many processes: rows come back in order, failures come back with their own traceback."""

import os
import re
import signal
import threading
import time

import psutil
import pytest
import ray
import torch
import torch.distributed as dist

from tests.pool import shared_processes
from verl.protocol import DataProto
from verl.single_controller import waiting
from verl.single_controller.dispatch import DP_COMPUTE_METRIC, DP_COMPUTE_PROTO, ONE_TO_ALL, register
from verl.single_controller.worker import Worker
from verl.single_controller.worker_group import WorkerGroup
from verl.single_controller.worker_processes import WorkerProcesses, detect_device, threads_of_worker


class ArithmeticWorker(Worker):
    def __init__(self, offset: int, **place) -> None:
        super().__init__(**place)
        self.offset = offset

    @register(ONE_TO_ALL)
    def location(self) -> tuple[int, int, int, int]:
        return self.rank, self.local_rank, dist.get_rank(), os.getpid()

    @register(DP_COMPUTE_PROTO)
    def tag_rows(self, data: DataProto, factor: int) -> DataProto:
        values = data.batch["value"] * factor + self.offset
        return DataProto.from_dict({"value": values, "rank": torch.full_like(values, self.rank)})

    @register(DP_COMPUTE_PROTO, shared_by="pair")
    def tag_rows_of_pair(self, data: DataProto) -> DataProto:
        everyone = torch.ones(1)
        dist.all_reduce(everyone)
        values = data.batch["value"] + data.batch["value"].sum()
        return DataProto.from_dict({"value": values, "ranks": torch.full_like(values, int(everyone))})

    @register(DP_COMPUTE_METRIC)
    def total(self, data: DataProto) -> float:
        total = data.batch["value"].sum()
        dist.all_reduce(total)
        return total.item()

    @register(ONE_TO_ALL)
    def fail_on_the_last_rank_while_others_wait(self) -> None:
        if self.rank == self.world_size - 1:
            raise KeyError("the pixel that broke the camel's back")
        dist.barrier()

    @register(ONE_TO_ALL)
    def die_on_the_last_rank_while_others_wait(self) -> None:
        if self.rank == self.world_size - 1:
            os._exit(7)
        dist.barrier()


class StillbornWorker(ArithmeticWorker):
    def __init__(self, **place) -> None:
        super().__init__(**place)
        if self.rank == 1:
            raise KeyError("no straw, no camel")


@pytest.fixture(scope="module")
def group(ray_cluster):
    group = WorkerGroup(shared_processes(2), ArithmeticWorker, {"pair": 2}, offset=100)
    yield group
    group.release()


@pytest.fixture
def doomed_group(ray_cluster):
    with WorkerProcesses(1, 2, "cpu") as processes:
        yield WorkerGroup(processes, ArithmeticWorker, offset=100)


def _pids_gone(pids: list[int], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.1)
    return False


def test_every_worker_knows_its_place_and_all_share_one_process_group(group) -> None:
    places = group.location()
    assert [place[:3] for place in places] == [(0, 0, 0), (1, 1, 1)]
    assert len({place[3] for place in places}) == 2


def test_rows_are_split_over_ranks_and_come_back_in_order(group) -> None:
    batch = DataProto.from_dict({"value": torch.arange(6)})
    answer = group.tag_rows(batch, factor=10)
    assert answer.batch["value"].tolist() == [100, 110, 120, 130, 140, 150]
    assert answer.batch["rank"].tolist() == [0, 0, 0, 1, 1, 1]


def test_ranks_that_share_their_rows_all_see_them_and_the_answer_comes_once(group) -> None:
    """0 + ... + 5 = 15, added to each row by both."""
    answer = group.tag_rows_of_pair(DataProto.from_dict({"value": torch.arange(6)}))
    assert answer.batch["value"].tolist() == [15, 16, 17, 18, 19, 20]
    assert answer.batch["ranks"].tolist() == [2] * 6


def test_reduced_numbers_come_back_once_and_cover_all_ranks(group) -> None:
    assert group.total(DataProto.from_dict({"value": torch.arange(6)})) == 15


def test_a_batch_that_does_not_divide_is_refused_before_any_worker_is_called(group) -> None:
    with pytest.raises(AssertionError):
        group.tag_rows(DataProto.from_dict({"value": torch.arange(5)}), factor=1)


def test_a_worker_that_raises_ends_the_call_with_its_own_traceback_and_leaves_no_process(doomed_group) -> None:
    pids = [place[3] for place in doomed_group.location()]
    start = time.monotonic()
    with pytest.raises(KeyError, match="camel's back") as failure:
        doomed_group.fail_on_the_last_rank_while_others_wait()
    assert time.monotonic() - start < 10
    assert "fail_on_the_last_rank_while_others_wait" in str(failure.value)
    assert _pids_gone(pids, seconds=10)


def test_a_worker_that_raises_when_it_is_built_is_told_of_by_its_own_traceback(ray_cluster) -> None:
    with WorkerProcesses(1, 2, "cpu") as processes, pytest.raises(KeyError, match="no straw, no camel"):
        WorkerGroup(processes, StillbornWorker, offset=0)


def test_a_module_that_the_processes_cannot_import_is_told_of_by_its_own_error(ray_cluster) -> None:
    """As on a node where something is not installed. Processes that have ended stay ended."""
    with WorkerProcesses(1, 2, "cpu", ["no_such_package"]) as processes:
        with pytest.raises(ModuleNotFoundError, match="no_such_package"):
            WorkerGroup(processes, ArithmeticWorker, offset=0)
        with pytest.raises(RuntimeError, match="ArithmeticWorker was called on workers that were shut down"):
            WorkerGroup(processes, ArithmeticWorker, offset=0)


def test_a_worker_that_dies_ends_the_call_with_its_rank_and_node_and_leaves_no_process(doomed_group) -> None:
    """Not with the broken collective of the rank that waited for it, which is heard of first."""
    pids = [place[3] for place in doomed_group.location()]
    here = re.escape(ray.util.get_node_ip_address())
    start = time.monotonic()
    message = rf"^rank 1 on node {here} \(Ray node \w+\) died .* goes on from the last checkpoint$"
    with pytest.raises(RuntimeError, match=message) as failure:
        doomed_group.die_on_the_last_rank_while_others_wait()
    assert time.monotonic() - start < 20
    assert isinstance(failure.value.__cause__, ray.exceptions.ActorDiedError)
    assert _pids_gone(pids, seconds=10)


def test_a_wait_for_a_rank_that_has_stopped_is_told_with_method_rank_node_and_time(group, monkeypatch, caplog) -> None:
    """Rank 1 stops for a second and a half; rank 0 has answered by then and is not among those awaited."""
    monkeypatch.setattr(waiting, "REPORT_SECONDS", 0.5)
    pid = group.location()[1][3]
    os.kill(pid, signal.SIGSTOP)
    alarm = threading.Timer(1.7, os.kill, (pid, signal.SIGCONT))
    alarm.start()
    with caplog.at_level("INFO", "verl"):
        assert [place[0] for place in group.location()] == [0, 1]
    alarm.join()
    lines = [record.message for record in caplog.records if "still waiting" in record.message]
    assert 2 <= len(lines) <= 4
    here = re.escape(ray.util.get_node_ip_address())
    place = rf"ArithmeticWorker.location on rank 1 of node {here} \(Ray node \w+\)"
    assert re.fullmatch(rf"still waiting, since \d\d:\d\d:\d\d \([01] s\), for {place}", lines[0])


def test_ranks_that_are_awaited_are_told_by_node(group) -> None:
    assert re.fullmatch(r"ranks 0, 1 of node [\d.]+ \(Ray node \w+\)", group.processes._places_of([0, 1]))


def test_groups_live_side_by_side_in_the_same_processes(group) -> None:
    other = WorkerGroup(group.processes, ArithmeticWorker, offset=7)
    batch = DataProto.from_dict({"value": torch.zeros(2, dtype=torch.int64)})
    assert other.tag_rows(batch, factor=1).batch["value"].tolist() == [7, 7]
    assert group.tag_rows(batch, factor=1).batch["value"].tolist() == [100, 100]
    assert [place[3] for place in other.location()] == [place[3] for place in group.location()]
    other.release()
    assert group.tag_rows(batch, factor=1).batch["value"].tolist() == [100, 100]


def test_asking_for_more_devices_than_ray_sees_names_the_keys_and_both_numbers(ray_cluster) -> None:
    with pytest.raises(ValueError, match=r"trainer.nnodes=3 x trainer.n_gpus_per_node=50 .* 150 CPUs.*Ray sees"):
        WorkerProcesses(num_nodes=3, workers_per_node=50, device="cpu")
    with pytest.raises(ValueError, match=r"asks for 2 GPUs, but Ray sees 0"):
        WorkerProcesses(num_nodes=1, workers_per_node=2, device="cuda")


def test_a_worker_on_a_gpu_has_its_share_of_the_nodes_cores_unless_the_user_says_how_many(monkeypatch) -> None:
    node = {"CPU": 192.0, "GPU": 8.0}
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert threads_of_worker("cuda", node) == "24"
    assert threads_of_worker("cuda", {"CPU": 4.0, "GPU": 8.0}) == "1"
    assert threads_of_worker("cpu", node) == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert {threads_of_worker(device, node) for device in ("cuda", "cpu")} == {"6"}


def test_the_device_follows_what_ray_sees(ray_cluster) -> None:
    assert detect_device() == "cpu"
