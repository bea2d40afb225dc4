"""A call where streams and graphs might give it other bits."""

import torch


def results_of_repeats(call):
    """Results of ``call`` alone, of two streams that make it at once, and of a CUDA graph."""
    found = [call() for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found.append(call())
    for _ in range(20):
        graph.replay()
    return found
