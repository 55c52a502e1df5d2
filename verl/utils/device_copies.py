# SPDX-License-Identifier: Apache-2.0
"""Copies from host memory to a device without blocking the host."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`.

    A copy from ordinary memory makes the host wait until the device has finished all earlier work, and afterwards the
    device waits for the host. Source: torch's tutorial on `pin_memory` and `non_blocking`.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
