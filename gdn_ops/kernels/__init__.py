"""Ordinary Triton kernels, one file per operator. Nothing imports them before a launch."""
