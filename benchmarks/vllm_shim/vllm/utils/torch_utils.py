"""Stands for ``vllm.utils.torch_utils`` where only vLLM's kernels are carried."""

import torch


def async_tensor_h2d(
    x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """A copy on the device."""
    return x.to(device=device, dtype=dtype, non_blocking=True)
