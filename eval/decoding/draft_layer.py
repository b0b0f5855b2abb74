"""A drafter's own decoder layer: run like the target's layers, over a cache that grows with the committed texts."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.decoding.acceptance import Greedy
from eval.decoding.drafters.base import State
from eval.decoding.tree import Draft
from layerskip_model.context import Context
from layerskip_model.draft_layer import DraftLayer
from layerskip_model.errors import UserError
from layerskip_model.layer_runner import LayerRunner
from layerskip_model.runner import TOLERANCE, Runner

CHUNKS = [4, 3]  # rows of the sample that a layer is checked with


class LayerState(State):
    """A state of the same texts for layers of a drafter's own, beside the target's.

    What enters them for a place may be known later than the target's token there, so its lengths are its own: 0 at
    first, more by `extend`.
    """

    def __init__(self, runner: LayerRunner, target: State, max_nodes: int) -> None:
        """`max_nodes`: the most that is run after the committed ones, in one draft or `extend` after the first."""
        super().__init__(runner, target.texts, target.horizon, max_nodes, target.rule, target.streams)
        self._has_root = False

    def extend(self, inputs: Tensor, counts: list[int], *, with_root: bool = False) -> Tensor:
        """Run what enters the first layer at each row's next places, and commit to the first counts[b] of row b.

        [batch, n, width] -> what leaves the last layer, [batch, n, hidden]. The rest of a row is padding: what is
        committed does not see it. `with_root`: the last place of each row is node 0 of the drafts that follow, and
        committed by the next call; there are no other calls then.
        """
        context = self.chain_context(int(self._has_root), inputs.shape[1])
        outputs = self.runner.run(inputs.to(self.runner.dtype), 0, self.runner.num_layers, context)
        more = int(self._has_root) - int(with_root)
        self._has_root = with_root
        self._commit([count + more for count in counts])
        return outputs

    def _commit(self, counts: list[int]) -> None:
        """Make rows longer, with no transfer to the device where all of them grow alike."""
        self.cache.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        self._start = self.common_length()
        if len(set(counts)) == 1:
            self.length = self.length + counts[0]
        else:
            self.length = self.length + torch.tensor(counts).to(self.length.device)[:, None]

    def tree_context(self, level: Tensor, visible: Tensor, first: int, stop: int) -> Context:
        """The context to run nodes first..stop-1 of a draft, in the order of running; node 0 is the root.

        `level` below the root, [batch or 1, stop or more]; `visible`, who sees whom, [batch or 1, as many, as many].
        """
        level = level[:, :stop].expand(self.batch, -1)
        true = self._true[:, :stop].expand(self.batch, -1)
        draft = Draft(
            tokens=level,
            parents=level,
            position=self.length + level,
            slot=self.length + self._nodes[:, 1 : stop + 1],
            valid=true,
            candidate=true,
            visible=visible[:, :stop, :stop].expand(self.batch, -1, -1),
            in_order=True,
        )
        return self.context(draft, first, stop)


@torch.inference_mode()
def draft_layer_runner(runner: Runner, layer: DraftLayer) -> LayerRunner:
    """What runs a draft layer over a cache, fused where the target's layers are.

    Raises UserError where its states would not be what the layer's own forward makes in training.
    """
    inputs = _sample(layer)
    expected = layer(inputs)
    allowed = TOLERANCE[inputs.dtype] * expected.abs().max().item()
    difference = float("nan")
    for fused in [True, False] if runner.fused is not None else [False]:
        made = LayerRunner(
            runner.backbone,
            [layer.layer],
            [layer.kind],
            {layer.kind: runner.windows[layer.kind]},
            device=inputs.device,
            dtype=inputs.dtype,
            rope=layer.rope,
            fuse_layers=fused,
        )
        difference = (_in_chunks(made, inputs) - expected).abs().max().item()
        if difference <= allowed:
            return made
    raise UserError(
        f"a draft layer for model type '{runner.model_type}' cannot be decoded with here: its states are off by "
        f"{difference:.3g} (allowed {allowed:.3g}); use a Llama, Mistral, Qwen or Gemma model"
    )


def _sample(layer: DraftLayer) -> Tensor:
    """Some inputs to compare with, [1, rows, width], of the layer's dtype."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, sum(CHUNKS), layer.width, generator=generator).to(next(layer.layer.parameters()))


def _in_chunks(runner: LayerRunner, inputs: Tensor) -> Tensor:
    """What leaves the layer, run chunk by chunk."""
    rows = sum(CHUNKS)
    state = LayerState(runner, State(runner, [[0] * rows], rows, 1, Greedy()), rows)
    return torch.cat([state.extend(part, [part.shape[1]]) for part in inputs.split(CHUNKS, dim=1)], dim=1)
