"""Run a decoder one block at a time: one layer's weights in memory, the hidden states of all windows beside it.

    with BlockRunner(checkpoint, hidden_memory=2**31, spill=folder) as runner:
        hidden = runner.embed(windows)                                     # (N, T) token ids → (N, T, hidden)
        for block in runner.blocks(hidden):
            block.run({"mlp.down_proj": (moment := SecondMoment())})       # all windows through; hidden is overwritten
        nll, tokens = runner.losses(hidden, windows)                       # per window; logits are never whole

A large checkpoint and a small model (widths of its own, fewer layers) are run alike. The model is built without
weights; masks, rotary embeddings, sliding windows and per-layer types are what the stock model's own forward hands its
layers. Windows have one length; right padding needs no mask, as no earlier position sees it. In the loop the caller may

- observe: `block.run({weight name: observer}, around=f)`; an observer is called with the Linear's input (tokens, in),
  `f` with the block's input and output (rows, T, hidden); `block.observe` does the same and leaves hidden as it is;
- change `block.module`'s weights between `block.observe` and `block.run`, as sequential solvers do;
- train the block: `for rows, x in block.batches(): y = block(x)` with gradients, after `block.module.requires_grad_()`;
- not run the block at all, which leaves it out of the model.

`edit(tensor name, tensor)` changes a weight as it is read: a mask, a merged adapter, rounding. The hidden states are in
memory, or in a file in `spill` when they outgrow `hidden_memory`. `forward_pass` goes through all blocks, and
`backward_pass` back again from the end, with gradients; both leave what was found sealed on disk, and go on where an
earlier call stopped.
"""

from loram.importing import collecting_paused

with collecting_paused():  # of torch and transformers
    from loram.blockwise.hidden import Hidden
    from loram.blockwise.observers import Cosine, Fluctuation, MeanVariance, Norm, SecondMoment, shared_inputs
    from loram.blockwise.resuming import backward_pass, forward_pass
    from loram.blockwise.runner import Block, BlockRunner

__all__ = [
    "Block",
    "BlockRunner",
    "Cosine",
    "Fluctuation",
    "Hidden",
    "MeanVariance",
    "Norm",
    "SecondMoment",
    "backward_pass",
    "forward_pass",
    "shared_inputs",
]
