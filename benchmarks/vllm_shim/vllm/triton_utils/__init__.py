"""Stands for ``vllm.triton_utils`` where only vLLM's kernels are carried: Triton is installed."""

# ruff: noqa: TID253 -- only vLLM's kernels import this module
import triton
import triton.language as tl
import triton.language.extra.libdevice as tldevice

__all__ = ["tl", "tldevice", "triton"]
