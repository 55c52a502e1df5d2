# SPDX-License-Identifier: Apache-2.0
"""Import hook that lets a CUDA build of torchvision load beside a CPU-only torch.

`scripts/mend_torchvision.py` copies this file into an environment's site-packages with a `.pth` line that calls
`install`, so every Python of that environment has the hook, children included. It must stay cheap: it runs at each
start, and torch is imported only once somebody imports torchvision.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType

_library = None  # torch drops the operators again when the object that defined them is collected


class TorchvisionLoader(SourceFileLoader):
    """Loads torchvision after making sure that the operators which it decorates at import exist."""

    def exec_module(self, module: ModuleType) -> None:
        """Define the operators that the package's own binary could not, then run its `__init__`."""
        global _library
        import torch

        try:
            # Its binary defines the operators. Loading it twice is harmless, defining them twice is an error.
            torch.ops.load_library(Path(self.path).parent / "_C.so")
        except OSError:
            if _library is None:
                _library = torch.library.Library("torchvision", "DEF")
                for operator in ("nms", "qnms"):
                    _library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        super().exec_module(module)


class TorchvisionFinder:
    """Hands the import of torchvision, and of nothing else, to `TorchvisionLoader`."""

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return torchvision's usual spec with the loader replaced, None for any other module."""
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = TorchvisionLoader(spec.loader.name, spec.loader.path)
        return spec


def install(hide: Iterable[str] = ()) -> None:
    """Install the hook in this interpreter and make the packages in `hide` look as if they were not installed.

    transformers imports optional packages that it finds, so one that is found but broken takes it down. A None in
    `sys.modules` is the one form of absence that it believes.
    """
    sys.meta_path.insert(0, TorchvisionFinder)
    for name in hide:
        sys.modules.setdefault(name, None)
