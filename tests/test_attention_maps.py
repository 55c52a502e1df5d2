# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_attention_maps.py
"""Maps of chosen rows are what eager attention shows, add up to the masses, and leave every other stream as it was."""

from __future__ import annotations

import pytest
import torch

from tests.batches import answer_at_random, make_prompts
from tests.probe import RESPONSE_LENGTH, RESPONSES_PER_PROMPT, make_config, start_alone
from tests.test_attention_recorder import FAMILIES, Case, answered, eager_maps
from tests.test_attention_recorder import RESPONSE_LENGTH as FEW_TOKENS
from verl.models.attention_maps import MapRequest
from verl.models.attention_recorder import record_attention_mass
from verl.models.kernels import attention_map
from verl.protocol import DataProto
from verl.utils.attention_metrics import KeyKind

LAYOUTS = {
    "padded": ("worker.actor.padding_free=false",),
    "packed": ("worker.actor.share_prompts=false",),
    "shared prompts": ("worker.actor.share_prompts=true",),
}
GROUPS = 2


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return answered(request.param)


@pytest.fixture(scope="module")
def batch(tiny_model_path: str, tmp_path_factory: pytest.TempPathFactory) -> DataProto:
    """Eight rows, the first four with images; a row's response is interrupted, as by a tool's answer."""
    prompts = make_prompts(tiny_model_path, tmp_path_factory.mktemp("prompts"))
    batch = answer_at_random(prompts, RESPONSES_PER_PROMPT, RESPONSE_LENGTH)
    row = int(batch.batch["response_mask"][:4].sum(dim=1).argmax())
    batch.batch["response_mask"][row, 1] = 0
    return batch


def by_definition(case: Case, maps: list[torch.Tensor], row: int, heads: slice) -> torch.Tensor:
    """(T, V) float64 from attention maps (N, H, S, S) of some layers, mean over `heads` and then over the layers."""
    kinds = case.kinds[row]
    columns = (kinds == KeyKind.RESPONSE).nonzero()[:, 0].tolist()
    is_prompt = torch.isin(kinds, torch.tensor([KeyKind.TEXT, KeyKind.VISION, KeyKind.PROMPT], dtype=kinds.dtype))
    tokens = []
    for column in columns:
        to_keys = [attention[row, heads, column - 1].double().mean(dim=0) for attention in maps]  # (S,) each
        tokens.append(sum(to_key[kinds == KeyKind.VISION] / to_key[is_prompt].sum() for to_key in to_keys) / len(maps))
    return torch.stack(tokens)


def test_maps_are_what_eager_attention_shows_of_every_layer_and_group(case: Case, monkeypatch) -> None:
    """Rows 0 and 1 have images, row 2 has none, row 4 no response; blocks of a single query are enough."""
    monkeypatch.setitem(attention_map.SCORES_AT_ONCE, "cpu", 1)
    request = MapRequest(rows=(0, 1, 2, 4), head_groups=GROUPS, keeps_layers=True)
    with torch.no_grad(), record_attention_mass(case.model, case.kinds, FEW_TOKENS, maps=request) as recorder:
        case.model(**case.inputs, use_cache=False)
    maps = recorder.maps(case.kinds[:, -FEW_TOKENS:] == KeyKind.RESPONSE)
    eager = eager_maps(case)
    num_heads = eager[0].shape[1]
    assert maps.keys() == {0, 1, 2} and maps[2].vision.shape[1] == 0
    for row in (0, 1):
        found, size = maps[row], num_heads // GROUPS
        assert found.layers == tuple(case.layers)
        expected = by_definition(case, eager, row, slice(None))
        assert expected.std() > 1e-3
        torch.testing.assert_close(torch.from_numpy(found.vision).double(), expected, atol=1e-5, rtol=0)
        for place, layer_map in enumerate(eager):
            of_layer = by_definition(case, [layer_map], row, slice(None))
            assert found.layer_masses[place, :, 1] == pytest.approx(of_layer.sum(dim=1).numpy(), abs=1e-5)
            for group in range(GROUPS):
                heads = slice(group * size, (group + 1) * size)
                of_group = by_definition(case, [layer_map], row, heads)
                of_found = torch.from_numpy(found.group_vision[place, group]).double()
                torch.testing.assert_close(of_found, of_group, atol=1e-5, rtol=0)
                assert found.group_masses[place, group, :, 1] == pytest.approx(of_group.sum(dim=1).numpy(), abs=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_add_up_to_the_masses_and_other_streams_stay_as_they_are(
    layout: str, tiny_model_path: str, batch: DataProto, lone_process_group
) -> None:
    worker = start_alone(make_config(tiny_model_path, "worker.rollout.collect_attentions=true", *LAYOUTS[layout]))
    plain = worker.compute_log_probs(batch)
    assert not plain.non_tensor_batch
    wanted = torch.tensor([True, False, True, True, False, False, True, False])
    asked = DataProto(
        batch=batch.batch.clone(recurse=False).set("is_mapped", wanted), non_tensor_batch=batch.non_tensor_batch
    )
    found = worker.compute_log_probs(asked)
    assert set(found.batch.keys()) == set(plain.batch.keys())
    for name, values in plain.batch.items():
        assert torch.equal(found.batch[name], values), name
    for row, one in enumerate(found.non_tensor_batch["attention_maps"]):
        assert (one is not None) == wanted[row]
        if one is None:
            continue
        mask = batch.batch["response_mask"][row].bool()
        masses = plain.batch["attention_mass"][row, mask]
        assert one.vision.shape == (int(mask.sum()), plain.batch["attention_keys"][row, 1])
        assert one.vision.sum(axis=1) == pytest.approx(masses[:, 1].numpy(), abs=1e-6)
        assert one.layer_masses.mean(axis=0) == pytest.approx(masses.numpy(), abs=1e-6)
        assert one.group_masses is None and one.group_vision is None


def test_groups_that_do_not_divide_the_heads_are_refused(case: Case) -> None:
    request = MapRequest(rows=(0,), head_groups=5)
    with pytest.raises(ValueError, match="head_groups=5 does not divide the 4 heads"):
        with torch.no_grad(), record_attention_mass(case.model, case.kinds, FEW_TOKENS, maps=request):
            case.model(**case.inputs, use_cache=False)
