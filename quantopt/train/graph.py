"""A training iteration as a CUDA graph: one launch in place of hundreds, whose latency limits small networks."""

from collections.abc import Callable

import torch
from torch import Tensor

_EAGER = 3  # iterations before the capture: they set up gradients, momentum and the libraries' workspaces


class Graphed:
    """`iteration(chosen)`, captured after a few calls and replayed from then on.

    chosen: int64 [batch], of the same size at each call. All other tensors that the iteration reads or writes must be
    the same objects at each call. generator: the source of its random numbers, on the device.
    """

    def __init__(
        self, iteration: Callable[[Tensor], None], chosen: Tensor, generator: torch.Generator
    ) -> None:
        self.iteration = iteration
        self.chosen = torch.empty_like(chosen)
        self.generator = generator
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream(chosen.device)
        self.calls = 0

    def __call__(self, chosen: Tensor) -> None:
        self.chosen.copy_(chosen)
        if self.calls < _EAGER:
            present = torch.cuda.current_stream(chosen.device)
            self.stream.wait_stream(present)
            with torch.cuda.stream(self.stream):
                self.iteration(self.chosen)
            present.wait_stream(self.stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                self.graph.register_generator_state(self.generator)
                with torch.cuda.graph(self.graph):
                    self.iteration(self.chosen)
            self.graph.replay()
        self.calls += 1
