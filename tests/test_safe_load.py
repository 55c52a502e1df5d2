# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_safe_load.py
"""Checkpoint files are data: what they hold comes back, and what would run code or is broken is refused by name."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from verl.utils.safe_load import load_tensors


class Attack:
    """Unpickled, it touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def mesh_of(*shape: int) -> Any:
    """A mesh of one rank with as many dimensions as `shape` has."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=("ddp", "fsdp")[-len(shape) :])


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("mesh_shape", [(1,), (1, 1)])
def test_sharded_and_plain_tensors_come_back_with_their_placement(
    mesh_shape: tuple[int, ...], mmap: bool, lone_process_group, tmp_path: Path
) -> None:
    placements = [Replicate(), Shard(0)][-len(mesh_shape) :]
    sharded = DTensor.from_local(torch.randn(4, 3).bfloat16(), mesh_of(*mesh_shape), placements)
    state = {"state": {"w": {"exp_avg": sharded, "step": torch.tensor(3.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}
    torch.save(state, tmp_path / "optim.pt")
    loaded = load_tensors(tmp_path / "optim.pt", mmap=mmap)
    moment = loaded["state"]["w"]["exp_avg"]
    assert type(moment) is DTensor
    assert (moment.placements, moment.device_mesh.mesh.shape) == (tuple(placements), torch.Size(mesh_shape))
    assert torch.equal(moment.to_local(), sharded.to_local())
    assert loaded["state"]["w"]["step"] == 3
    assert loaded["param_groups"] == state["param_groups"]


@pytest.mark.parametrize("old_name", ["torch.distributed._tensor.api", "torch.distributed.tensor"])
def test_sharded_tensors_of_older_torch_releases_are_known_by_their_names_of_then(
    old_name: str, lone_process_group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed._tensor.api

    sharded = DTensor.from_local(torch.arange(3.0), mesh_of(1), [Shard(0)])
    monkeypatch.setattr(DTensor, "__module__", old_name)
    torch.save({"w": sharded}, tmp_path / "model.pt")
    monkeypatch.undo()
    assert torch.equal(load_tensors(tmp_path / "model.pt")["w"].to_local(), torch.arange(3.0))


def test_random_states_draw_the_same_numbers_after_they_come_back(tmp_path: Path) -> None:
    states = {"cpu": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}
    torch.save({"rng": states}, tmp_path / "extra.pt")
    expected = torch.rand(3), np.random.rand(3), [random.random() for _ in range(3)]
    loaded = load_tensors(tmp_path / "extra.pt")["rng"]
    torch.set_rng_state(loaded["cpu"])
    np.random.set_state(loaded["numpy"])
    random.setstate(loaded["random"])
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert [random.random() for _ in range(3)] == expected[2]


@pytest.mark.parametrize("array", [np.arange(6, dtype=">f8").reshape(2, 3), np.asfortranarray(np.eye(3, dtype="i2"))])
def test_arrays_of_numbers_come_back_in_any_byte_order_and_layout(array: np.ndarray, tmp_path: Path) -> None:
    torch.save({"array": array}, tmp_path / "array.pt")
    loaded = load_tensors(tmp_path / "array.pt")["array"]
    assert np.array_equal(loaded, array) and loaded.dtype == array.dtype.newbyteorder("=")


def test_arrays_written_by_numpy_1_have_its_name_for_the_function_that_makes_them(tmp_path: Path) -> None:
    torch.save(np.arange(3), tmp_path / "two.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "two.pt").read_bytes()
    assert b"cnumpy._core.multiarray\n_reconstruct\n" in content
    (tmp_path / "one.pt").write_bytes(content.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    assert np.array_equal(load_tensors(tmp_path / "one.pt"), np.arange(3))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_by_its_name_and_the_codes(zipped: bool, tmp_path: Path) -> None:
    touched, path = tmp_path / "touched", tmp_path / "model_world_size_1_rank_0.pt"
    torch.save({"w": torch.ones(2), "x": Attack(touched)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"^{path} would run code: it holds the pickled global posix.system, .*$"):
        load_tensors(path)
    assert not touched.exists()
    torch.load(path, weights_only=False)
    assert touched.exists(), "the attack is none"


@pytest.mark.parametrize(
    ("content", "name"),
    [(torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), (Path("a"), "getattr|pathlib")],
    ids=["a module", "a path"],
)
def test_objects_other_than_data_are_refused_by_their_class(content: Any, name: str, tmp_path: Path) -> None:
    torch.save({"x": content}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"a.pt would run code: it holds the pickled global ({name})"):
        load_tensors(tmp_path / "a.pt")


def test_a_program_in_place_of_tensors_is_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt would run code: it is a TorchScript program"):
        load_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize("array", [np.array([{}, None]), np.zeros(2, [("a", "O")]), np.array(["abc"])])
def test_arrays_of_anything_but_numbers_are_refused(array: np.ndarray, tmp_path: Path) -> None:
    torch.save({"x": array}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt is damaged.*an array of type '.*', which is not of numbers"):
        load_tensors(tmp_path / "a.pt")


class Impostor:
    """Pickled as a call of numpy's array with memory that it has not, and as a type that hides addresses."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> tuple:
        return self.parts


@pytest.mark.parametrize(
    "call",
    [
        Impostor(np.ndarray, ((2**40,), "f8")),
        Impostor(np.ndarray, ((4,), "O")),
        Impostor(np.dtype, ([("a", "O")],)),
    ],
    ids=["too large", "of objects", "with fields of objects"],
)
def test_numpy_is_not_called_as_a_file_likes(call: Impostor, tmp_path: Path) -> None:
    torch.save({"x": call}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt is damaged"):
        load_tensors(tmp_path / "a.pt")


def test_broken_and_foreign_files_are_refused_in_one_line_with_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(1000)}, path)
    whole = path.read_bytes()
    second_disk = b"PK\x06\x07" + (1).to_bytes(4, "little") + bytes(8) + (2).to_bytes(4, "little")  # an end of zip64
    causes = {
        b"": "is empty",
        whole[: len(whole) // 2]: "is cut short",
        whole[:-1]: "is cut short",
        whole[:10]: "is cut short",
        whole[:-42] + second_disk + whole[-22:]: "is cut short",
        b"a text": "is damaged, or not a file of torch.save",
        pickle.dumps([1, 2]): "is damaged, or not a file of torch.save",
        whole[:60] + b"\xff" * 40 + whole[100:]: "is damaged, or not a file of torch.save",
    }
    for content, cause in causes.items():
        path.write_bytes(content)
        with pytest.raises(ValueError) as refusal:
            load_tensors(path)
        message = str(refusal.value)
        assert message.startswith(f"{path} {cause}") and "\n" not in message and len(message) < 500


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, cause in {"pipe": "is not a regular file", "": "is not a regular file", "no": "No such file"}.items():
        with pytest.raises(ValueError, match=cause):
            load_tensors(tmp_path / name)
