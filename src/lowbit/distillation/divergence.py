"""KL(unquantized ‖ quantized) of the next-token distributions, and its gradient in the student's hidden states.

    KL = Σ_v p_v (log p_v − log q_v),   ∂KL/∂z_v = q_v − p_v      z: the student's logits, q = softmax(z)

mean over every position of every window. The teacher's hidden states behind its last norm are computed once, block by
block; its logits are made again for some positions at a time, so that [tokens, vocabulary] is never held. Logits come
from each model's own head, in the compute dtype; probabilities are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.calibrate.blocks import BlockRunner, HiddenStates, Progress
from lowbit.distillation.student import Changes, Student

LOGIT_BYTES = 48 << 20  # of one array of logits, float32; five are held at once


class TokenDivergence:
    """The teacher's outputs for all windows of a student.

    teacher  runs the unquantized model; its head stays loaded
    """

    def __init__(self, teacher: BlockRunner, student: Student, progress: Progress | None = None):
        self._teacher, self._student = teacher, student
        with torch.no_grad():
            states = teacher.run(student.ids, None, progress)
            self._wanted: HiddenStates = teacher.through_last_norm(student.ids, states)
        teacher.load_outside()
        self._positions = 0

    @torch.no_grad()
    def mean(self, windows: Tensor, changes: Changes, batch: int) -> float:
        """Mean KL in nats over some windows, `batch` of them at a time; the changes are prepared."""
        total = 0.0
        for part in windows.split(batch):
            behind = self._student.forward(part, changes)
            heads = self._student.runner.behind_blocks(self._student.ids[part], behind)
            total += self._compare(heads.flatten(0, 1), part, None)
        return total / (len(windows) * self._student.ids.shape[1])

    def gradients(self, windows: Tensor, changes: Changes, found: Changes) -> float:
        """Mean KL over the windows; adds the gradients of the sum over their tokens in all changes to `found`, since
        those of the mean are small for half precision. The changes are prepared."""
        student = self._student
        kept, behind = student.forward_kept(windows, changes)
        behind = behind.clone().requires_grad_()
        with torch.enable_grad():
            heads = student.runner.behind_blocks(student.ids[windows], behind)
        gradient = torch.empty_like(heads)
        tokens = heads.shape[0] * heads.shape[1]
        divergence = self._compare(heads.detach().flatten(0, 1), windows, gradient.view(tokens, -1))
        heads.backward(gradient)
        assert behind.grad is not None
        student.collect(len(student.parts) - 1, changes, found)
        student.backward(kept, behind.grad, changes, found)
        return divergence / tokens

    def _compare(self, heads: Tensor, windows: Tensor, gradient: Tensor | None) -> float:
        """Σ KL over tokens [n, H]; fills its gradient, [n, H], if there is one."""
        wanted = self._wanted.values[windows].flatten(0, 1).to(heads.device)
        total = torch.zeros((), dtype=torch.float64)
        start = 0
        while start < len(heads):
            stop = min(start + self._chunk(heads), len(heads))
            with torch.no_grad():
                log_p = self._teacher.logits(wanted[start:stop]).float().log_softmax(-1)
            x = heads[start:stop].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                z = self._student.runner.logits(x)
            log_q = z.detach().float().log_softmax(-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64).cpu()
            if gradient is not None:
                z.backward(log_q.exp_().sub_(p).to(z.dtype))
                assert x.grad is not None
                gradient[start:stop] = x.grad
            start = stop
        return total.item()

    def _chunk(self, heads: Tensor) -> int:
        """Positions whose logits are held at once."""
        if not self._positions:
            with torch.no_grad():
                vocabulary = self._student.runner.logits(heads[:1]).shape[1]
            self._positions = max(1, LOGIT_BYTES // (4 * vocabulary))
        return self._positions
