"""One training step: forward, loss, backward and optimiser, replayed as one CUDA graph where there is a GPU.

The same lines run on both devices. On a GPU they run as they stand for the first steps and are then recorded
once; from there on each step is one launch. What changes from step to step (inputs, labels, rate, draws) lies
in tensors that the recording reads. Nothing here waits for the device.
"""

import torch
from torch import Tensor, nn

from training.losses import LossFunction
from training.ranks import ALONE, Ranks

_STEPS_BEFORE_RECORDING = 3  # in which cuDNN, cuBLAS and the optimiser make what they keep


class Step:
    """Takes the steps of one network and its optimiser, whose learning rate it makes a tensor."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        ranks: Ranks = ALONE,
        record: bool = True,
    ) -> None:
        """Prepare; `record=False` launches each operation by itself on a GPU too."""
        self._network = ranks.joint(network)
        self._optimizer = optimizer
        self._device = device
        self._ranks = ranks
        self._bf16 = has_bf16(device)
        self._rate = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._draws = torch.Generator(device)
        # With several ranks the gradients travel while the backward pass runs, which is not recorded.
        self._records = record and device.type == "cuda" and ranks.size == 1
        self._recorded: tuple[LossFunction, torch.Size] | None = None
        self._steps_with_it = 0

    def take(
        self, inputs: Tensor, labels: Tensor, function: LossFunction, *, rate: float, draw: int
    ) -> Tensor:
        """Move the weights along one batch; return its mean loss, a tensor () of its own on the device.

        `draw` seeds what the loss draws. With several ranks the loss is the mean over all of them.
        """
        self._rate.fill_(rate)
        self._draws.manual_seed(draw)
        if self._records:
            return self._replay(inputs, labels, function)
        return self._ranks.mean(self._operations(inputs, labels, function))

    def _operations(self, inputs: Tensor, labels: Tensor, function: LossFunction) -> Tensor:
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            logits = self._network(inputs)
        loss = function(logits, labels, self._draws)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.detach()

    def _replay(self, inputs: Tensor, labels: Tensor, function: LossFunction) -> Tensor:
        if (function, inputs.shape) != self._recorded:  # at first, and where loss or side change
            self._recorded, self._steps_with_it = (function, inputs.shape), 0
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._steps_with_it += 1
        if self._steps_with_it <= _STEPS_BEFORE_RECORDING:
            return self._aside(inputs, labels, function)
        if self._steps_with_it == _STEPS_BEFORE_RECORDING + 1:
            self._record(inputs, labels, function)
        self._inputs.copy_(inputs)
        self._labels.copy_(labels)
        self._graph.replay()
        return self._loss.clone()

    def _aside(self, inputs: Tensor, labels: Tensor, function: LossFunction) -> Tensor:
        """Take a step as it stands, on the stream that will record, since what is kept must belong to it."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            loss = self._operations(inputs, labels, function)
        here.wait_stream(self._stream)
        return loss

    def _record(self, inputs: Tensor, labels: Tensor, function: LossFunction) -> None:
        """Record the operations without running them."""
        self._inputs, self._labels = inputs.clone(), labels.clone()
        self._graph = torch.cuda.CUDAGraph()
        self._graph.register_generator_state(self._draws)
        self._tell_optimizer(recording=True)
        # thread_local: a loader's thread may pin memory meanwhile.
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            self._loss = self._operations(self._inputs, self._labels, function)
        self._tell_optimizer(recording=False)

    def _tell_optimizer(self, *, recording: bool) -> None:
        """Adam wants to know: it warns of a step that could be recorded and is not, and the reverse fails."""
        for group in self._optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = recording


def has_bf16(device: torch.device) -> bool:
    """Say whether bfloat16 is faster than float32 here: on a GPU that has it, or AVX512_BF16 or AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
