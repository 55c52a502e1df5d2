# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_protocol.py
"""A row's tensors and objects must never part, whatever is done to the batch."""

import pickle

import cloudpickle
import numpy as np
import pytest
import torch

from verl.protocol import DataProto, DataProtoItem, pad_dataproto_to_divisor, unpad_dataproto


def make_batch(rows: int = 6) -> DataProto:
    """Row i: `tokens` [10 i, 10 i + 1], `position_ids` of three dimensions, `name` "row<i>", `ids` a list of two."""
    tokens = 10 * torch.arange(rows).unsqueeze(-1) + torch.arange(2)  # (N, 2)
    return DataProto.from_dict(
        tensors={"tokens": tokens, "position_ids": tokens.unsqueeze(1).expand(rows, 4, 2).float()},
        non_tensors={"name": [f"row{row}" for row in range(rows)], "ids": [[row, row] for row in range(rows)]},
        meta_info={"temperature": 0.5},
    )


def rows_of(data: DataProto) -> list[int]:
    """Which rows of `make_batch` these are, after checking that every column says the same."""
    rows = (data.batch["tokens"][:, 0] // 10).tolist()
    assert data.batch["position_ids"][:, 2, 1].tolist() == [10 * row + 1 for row in rows]
    assert data.non_tensor_batch["name"].tolist() == [f"row{row}" for row in rows]
    assert data.non_tensor_batch["ids"].tolist() == [[row, row] for row in rows]
    assert len(data) == len(rows)
    return rows


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, None, 2), [0, 2, 4]),
        ([4, 0, 4], [4, 0, 4]),
        (torch.tensor([-1, 2]), [5, 2]),
        (np.array([3]), [3]),
        (torch.tensor([True, False, False, True, False, False]), [0, 3]),
        ([False, True, False, False, False, True], [1, 5]),
        ([], []),
    ],
)
def test_every_kind_of_index_moves_tensors_and_objects_together(index, expected):
    picked = make_batch()[index]
    assert rows_of(picked) == expected
    assert picked.meta_info == {"temperature": 0.5}


def test_an_int_gives_one_row_with_plain_values():
    item = make_batch()[np.int64(4)]
    assert isinstance(item, DataProtoItem)
    assert item.batch["tokens"].tolist() == [40, 41]
    assert item.non_tensor_batch == {"name": "row4", "ids": [4, 4]}
    assert item.meta_info == {"temperature": 0.5}


def test_iterating_visits_each_row_once():
    assert [item.non_tensor_batch["name"] for item in make_batch(3)] == ["row0", "row1", "row2"]


@pytest.mark.parametrize("rows", [[[1, 2], [3, 4]], np.array([[1, 2], [3, 4]]), [np.zeros(2), np.zeros(2)]])
def test_rows_of_equal_length_stay_objects_and_never_become_a_matrix(rows):
    data = DataProto.from_dict({"a": torch.zeros(2)}, non_tensors={"rows": rows})
    for batch in (data, data.repeat(2), DataProto.concat([data, data]), pickle.loads(pickle.dumps(data))):
        assert batch.non_tensor_batch["rows"].shape == (len(batch),)
        assert batch.non_tensor_batch["rows"].dtype == object
        assert list(batch.non_tensor_batch["rows"][-1]) == list(rows[1])


def test_length_comes_from_tensors_else_from_objects_else_is_zero():
    assert len(make_batch(5)) == 5
    assert len(DataProto(non_tensor_batch={"name": np.array(["a", "b"], dtype=object)})) == 2
    assert len(DataProto(meta_info={"step": 1})) == 0
    assert len(make_batch(5).select(batch_keys=[], non_tensor_batch_keys=[])) == 5


def test_building_from_columns_of_unequal_length_names_the_column():
    with pytest.raises(AssertionError, match=r"'b' begins with dimensions \[3\], 'a' with \[2\]"):
        DataProto.from_dict({"a": torch.zeros(2), "b": torch.zeros(3)})
    with pytest.raises(AssertionError, match=r"non_tensor_batch\['name'\] has 1 rows, the batch 2"):
        DataProto.from_dict({"a": torch.zeros(2)}, non_tensors={"name": ["x"]})


def test_objects_alone_make_a_batch():
    data = DataProto.from_dict(non_tensors={"name": ["x", "y"]}, meta_info={"step": 3})
    assert data.batch is None
    assert len(data) == 2
    assert (list(data.non_tensor_batch["name"]), data.meta_info) == (["x", "y"], {"step": 3})


@pytest.mark.parametrize("count", [0, 2, 3])
def test_more_or_less_than_one_batch_dimension_is_refused(count: int):
    tensors = {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3, 2)}
    assert DataProto.from_dict(tensors, num_batch_dims=1).batch.batch_size == torch.Size([4])
    with pytest.raises(AssertionError, match=f"num_batch_dims={count}, but batches have one dimension"):
        DataProto.from_dict(tensors, num_batch_dims=count)


def test_from_single_dict_sorts_tensors_from_object_arrays():
    data = DataProto.from_single_dict({"a": torch.zeros(2, 3), "name": np.array(["x", "y"], dtype=object)})
    assert list(data.batch.keys()) == ["a"]
    assert list(data.non_tensor_batch) == ["name"]
    with pytest.raises(ValueError, match=r"'name' is a list; it must be a torch.Tensor or a numpy array"):
        DataProto.from_single_dict({"name": ["x", "y"]})


def test_select_keeps_what_is_named_and_everything_of_a_kind_not_mentioned():
    data = make_batch()
    selected = data.select(batch_keys=["tokens"])
    assert set(selected.batch.keys()) == {"tokens"}
    assert set(selected.non_tensor_batch) == {"name", "ids"}
    assert selected.meta_info == {"temperature": 0.5}
    assert not data.select(meta_info_keys=[]).meta_info


@pytest.mark.parametrize("kind", ["batch", "non_tensor_batch", "meta_info"])
@pytest.mark.parametrize("method", ["select", "pop"])
def test_asking_for_an_unknown_key_names_it_and_what_there_is_and_takes_nothing(method, kind):
    data = make_batch()
    known = {"batch": "tokens", "non_tensor_batch": "name", "meta_info": "temperature"}[kind]
    with pytest.raises(KeyError, match=rf"{kind} has no \['tokenz'\]; it has \[.*'{known}'.*\]"):
        getattr(data, method)(**{f"{kind}_keys": [known, "tokenz"]})
    assert rows_of(data) == list(range(6))
    assert data.meta_info == {"temperature": 0.5}


def test_asking_for_tensors_where_there_are_none_is_an_error():
    with pytest.raises(KeyError, match=r"batch has no \['tokens'\]; it has \[\]"):
        DataProto(meta_info={"step": 1}).select(batch_keys=["tokens"])


def test_a_selection_shares_tensors_but_not_the_set_of_keys():
    data = make_batch()
    selected = data.select()
    selected.batch["new"] = torch.zeros(6)
    selected.non_tensor_batch["new"] = selected.non_tensor_batch["name"]
    selected.meta_info["new"] = 1
    assert "new" not in data.batch.keys() | data.non_tensor_batch.keys() | data.meta_info.keys()
    selected.batch["tokens"][0, 0] = -1
    assert data.batch["tokens"][0, 0] == -1


def test_a_deep_selection_shares_nothing():
    data = make_batch()
    selected = data.select(deepcopy=True)
    selected.batch["tokens"].zero_()
    selected.non_tensor_batch["ids"][3].append("changed")
    assert rows_of(data) == list(range(6))


def test_pop_moves_keys_from_one_batch_to_another_and_union_brings_them_back():
    data = make_batch()
    taken = data.pop(batch_keys=["tokens"], non_tensor_batch_keys=["ids"], meta_info_keys=["temperature"])
    assert (set(data.batch.keys()), set(data.non_tensor_batch), data.meta_info) == ({"position_ids"}, {"name"}, {})
    assert (set(taken.batch.keys()), set(taken.non_tensor_batch)) == ({"tokens"}, {"ids"})
    assert data.union(taken) is data
    assert rows_of(data) == list(range(6))
    assert data.meta_info == {"temperature": 0.5}


def test_union_accepts_a_key_in_both_when_its_content_is_equal_even_nan():
    left = DataProto.from_dict(
        {"a": torch.tensor([1.0, float("nan")])},
        {"o": [{"x": np.array([1, 2])}, (torch.tensor([3]), float("nan"))]},
        {"m": [1.0]},
    )
    assert len(left.union(pickle.loads(pickle.dumps(left)))) == 2


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("batch key 'a'", DataProto.from_dict({"a": torch.tensor([1.0, 3.0]), "b": torch.zeros(2)})),
        ("batch key 'a'", DataProto.from_dict({"a": torch.tensor([1, 2])})),
        ("non_tensor_batch key 'o'", DataProto.from_dict({"b": torch.zeros(2)}, {"o": [[1], [3]]})),
        ("meta_info key 'm'", DataProto.from_dict({"b": torch.zeros(2)}, meta_info={"m": 2})),
    ],
)
def test_union_names_a_key_that_differs_and_adds_nothing(kind, other):
    left = DataProto.from_dict({"a": torch.tensor([1.0, 2.0])}, {"o": [[1], [2]]}, {"m": 1})
    with pytest.raises(ValueError, match=f"{kind} is in both with different content"):
        left.union(other)
    assert set(left.batch.keys()) == {"a"}


def test_union_of_batches_of_different_length_is_an_error():
    with pytest.raises(ValueError, match="a batch of 6 rows has no union with one of 4 rows"):
        make_batch().union(DataProto.from_dict({"b": torch.zeros(4)}))
    assert len(make_batch().union(DataProto(meta_info={"step": 3}))) == 6
    assert len(DataProto(meta_info={"step": 3}).union(make_batch())) == 6


@pytest.mark.parametrize("cut", [lambda data: data.chunk(3), lambda data: data.split(2)])
def test_concat_undoes_chunk_and_split(cut):
    parts = cut(make_batch())
    assert [rows_of(part) for part in parts] == [[0, 1], [2, 3], [4, 5]]
    whole = DataProto.concat(parts)
    assert rows_of(whole) == list(range(6))
    assert whole.meta_info == {"temperature": 0.5}


def test_cutting_into_unequal_parts_is_refused_with_both_numbers():
    with pytest.raises(AssertionError, match="6 rows do not divide into 4 equal chunks; pad_dataproto_to_divisor"):
        make_batch().chunk(4)
    with pytest.raises(AssertionError, match="6 rows do not divide into parts of 4; pad_dataproto_to_divisor"):
        make_batch().split(4)


def test_concat_refuses_parts_whose_keys_or_facts_disagree():
    left, right = make_batch().chunk(2)
    right.batch["values"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"batch keys \['values'\] are in only one of part 0 and part 1"):
        DataProto.concat([left, right])
    right.pop(batch_keys=["values"])
    right.meta_info["temperature"] = 1.0
    with pytest.raises(ValueError, match="meta_info key 'temperature' is in both with different content"):
        DataProto.concat([left, right])
    with pytest.raises(ValueError, match="nothing to concatenate"):
        DataProto.concat([])


def test_repeat_puts_copies_next_to_each_other_or_in_turn():
    assert rows_of(make_batch(3).repeat(2)) == [0, 0, 1, 1, 2, 2]
    assert rows_of(make_batch(3).repeat(2, interleave=False)) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor])
def test_reorder_moves_objects_with_tensors_in_place(as_type):
    data = make_batch()
    assert data.reorder(as_type([3, 4, 2, 0, 1, 5])) is None
    assert rows_of(data) == [3, 4, 2, 0, 1, 5]


@pytest.mark.parametrize("indices", [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6]])
def test_reorder_refuses_what_would_lose_or_double_a_row(indices):
    with pytest.raises(ValueError, match="indices must name each of the 6 rows once"):
        make_batch().reorder(indices)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
def test_pickling_and_back_keeps_values_types_and_rows(pickler):
    data = make_batch()
    data.batch["flags"] = torch.tensor([True, False] * 3)
    data.batch["half"] = torch.full((6, 2), 1.5, dtype=torch.bfloat16)
    back = pickler.loads(pickler.dumps(data[[5, 1]]))
    assert rows_of(back) == [5, 1]
    assert back.batch["flags"].tolist() == [False, False]
    assert back.batch["half"].dtype == torch.bfloat16
    assert back.meta_info == {"temperature": 0.5}
    assert back.union(DataProto.from_dict({"new": torch.zeros(2)})).batch.batch_size == torch.Size([2])


def test_a_pickled_chunk_weighs_its_share_of_the_batch():
    data = DataProto.from_dict({"a": torch.zeros(64, 1000), "b": torch.zeros(64, 1).expand(64, 1000)})
    whole = len(pickle.dumps(data))
    assert all(len(pickle.dumps(part)) < 1.1 * whole / 8 for part in data.chunk(8))


def test_saving_to_disk_and_loading_gives_the_same_batch(tmp_path):
    path = tmp_path / "batch.pkl"
    make_batch().save_to_disk(path)
    assert rows_of(DataProto.load_from_disk(path)) == list(range(6))


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [
        (3, [0, 1, 2]),
        (2, [0, 1, 2, 0]),
        (8, [0, 1, 2, 0, 1, 2, 0, 1]),
    ],
)
def test_padding_reuses_leading_rows_and_unpadding_drops_them(divisor, expected):
    padded, pad_size = pad_dataproto_to_divisor(make_batch(3), divisor)
    assert rows_of(padded) == expected
    assert pad_size == len(expected) - 3
    assert rows_of(unpad_dataproto(padded, pad_size)) == [0, 1, 2]


def test_an_empty_batch_cannot_be_padded():
    with pytest.raises(ValueError, match="0 rows has nothing to pad with"):
        pad_dataproto_to_divisor(DataProto(), 2)


def test_to_moves_tensors_in_place_and_returns_the_batch():
    data = make_batch()
    assert data.to("cpu") is data
    assert data.batch["tokens"].device == torch.device("cpu")
