"""The UNet's forward, on a CPU as a recorded graph.

For a few rows diffusers' Python takes as long as the kernels that it calls, and it needs the
interpreter's lock for each of them. A graph recorded once calls the same kernels without either.
`torch.jit` is on its way out, but what PyTorch names in its place, `torch.compile`, needs a C++
compiler wherever this runs, and `torch.export` gives Python again.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch


class UnetForward:
    """Calls a UNet, or what was recorded of it for inputs of that size.

    Args:
        unet: A diffusers `UNet2DConditionModel`.
    """

    def __init__(self, unet: Any) -> None:
        self._call = _PositionalCall(unet)
        self._graphs: dict[torch.Size, Any] = {}

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """The UNet's output.

        inputs: sample (rows, C, h, w), timestep (rows,), prompt embeddings (rows, tokens, width),
        and timestep_cond (rows, channels) of a UNet that takes one.
        """
        forward = self._graphs.get(inputs[0].shape[1:], self._call)
        return forward(*inputs)  # type: ignore[no-any-return]

    @torch.inference_mode()
    def record(self, *inputs: torch.Tensor) -> bool:
        """Use a graph for inputs like these, with any number of rows; returns whether there is one.

        It has to give exactly what the UNet gives. The UNet must not change from then on.

        inputs: as for a call, two rows or more.
        """
        others = tuple(torch.cat([one, torch.ones_like(one[:1])]) for one in inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of age, and for each Python condition on the way
                graph = torch.jit.trace(self._call, inputs, check_trace=False)  # type: ignore[no-untyped-call]
            is_same = torch.equal(graph(*others), self._call(*others))
        except RuntimeError:  # an operation that can't be recorded, or not for any number of rows
            return False
        if is_same:
            self._graphs[inputs[0].shape[1:]] = graph
        return is_same


class _PositionalCall(torch.nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.eval()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        prompt_embeds: torch.Tensor,
        timestep_cond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        prediction: torch.Tensor = self.unet(
            sample,
            timestep,
            encoder_hidden_states=prompt_embeds,
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return prediction
