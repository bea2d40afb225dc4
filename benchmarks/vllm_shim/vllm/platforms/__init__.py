"""Stands for ``vllm.platforms`` where only vLLM's kernels are carried: one NVIDIA GPU."""

import torch


class CudaPlatform:
    def is_rocm(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def is_device_capability_family(self, family: int, device_id: int | None = None) -> bool:
        """Whether the device has a capability of a family as vLLM writes it: 100 is 10.x."""
        return torch.cuda.get_device_capability(device_id)[0] == family // 10


current_platform = CudaPlatform()
