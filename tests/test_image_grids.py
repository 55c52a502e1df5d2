# SPDX-License-Identifier: Apache-2.0
# python -m pytest tests/test_image_grids.py
"""Image tokens lie where the pixels lie that they were made of, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from tests.batches import random_image
from tests.family_models import IMAGE_TEXT_MODELS, make_family_model
from tests.test_families import bare_model
from verl.data.image_grids import ImageGrids
from verl.models.token_grid import TokenGrid
from verl.utils.tokenizer import get_processor

SIZES = ((64, 64), (128, 64), (60, 92))


def image_tokens(model: torch.nn.Module, processor, image: Image.Image) -> torch.Tensor:
    """(V, H), what the model's tower makes of an image, a row for each of its tokens."""
    inputs = processor(text=[processor.image_token], images=[image], return_tensors="pt")
    names = ("pixel_values", "image_grid_thw", "image_sizes")
    given = {name: inputs[name] for name in names if name in inputs}
    features = model.model.get_image_features(**given, return_dict=True).pooler_output
    return (torch.cat(list(features)) if isinstance(features, (list, tuple)) else features).flatten(0, -2)


@pytest.mark.parametrize("name", IMAGE_TEXT_MODELS)
@torch.no_grad()
def test_the_token_that_changes_most_lies_where_the_picture_was_changed(name: str, tmp_path: Path) -> None:
    path = make_family_model(name, tmp_path)
    model, processor = bare_model(path), get_processor(path)
    grids = ImageGrids(processor, AutoConfig.from_pretrained(path))
    for width, height in SIZES:
        image = random_image((width, height), 0)
        before = image_tokens(model, processor, image)
        (whole,) = grids.lay_out(np.zeros((1, len(before)), dtype=np.float32), [image])
        rows, columns = whole.values.shape[1:]
        left, top, right, bottom = whole.box
        for row, column in {(0, 0), (0, columns - 1), (rows - 1, 0)}:
            x0, x1 = (round(width * (left + (right - left) * (column + step) / columns)) for step in (0, 1))
            y0, y1 = (round(height * (top + (bottom - top) * (row + step) / rows)) for step in (0, 1))
            changed = image.copy()
            changed.paste((255, 255, 255), (x0, y0, x1, y1))
            moved = (image_tokens(model, processor, changed) - before).norm(dim=1)[None].numpy()
            (found,) = grids.lay_out(moved, [image])
            assert found.values.sum() == pytest.approx(moved.sum(), rel=1e-5)
            assert np.unravel_index(found.values[0].argmax(), (rows, columns)) == (row, column), (width, height)


def test_tiles_and_their_overview_are_laid_over_the_picture() -> None:
    """Two tiles of two by two side by side, then the picture as a whole, whose tokens cover two fields each."""
    grid = TokenGrid(2, 2, tile_rows=1, tile_columns=2, has_overview=True)
    values = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 10, 20, 30, 40]], dtype=np.float32)
    expected = [[1 + 5, 2 + 5, 5 + 10, 6 + 10], [3 + 15, 4 + 15, 7 + 20, 8 + 20]]
    assert grid.lay_out(values)[0].tolist() == expected


def test_tokens_that_belong_to_no_image_are_refused(tmp_path: Path) -> None:
    path = make_family_model("Qwen2.5-VL", tmp_path)
    grids = ImageGrids(get_processor(path), AutoConfig.from_pretrained(path))
    with pytest.raises(ValueError, match="1 images have 4 tokens, but 5 are given"):
        grids.lay_out(np.zeros((1, 5)), [random_image((56, 56), 0)])
