"""The plan as the stored dtypes hold it, after rounding.

Each update is the stored tensor after the edit minus the stored tensor before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from steer2edit.architecture import Site
from steer2edit.lowering.new_biases import stored_bias
from steer2edit.lowering.resolve import Resolved
from steer2edit.lowering.rewrite import edited_blocks
from steer2edit.plan import Assign, Bias, Edit, EditPlan, LowRank, NewBias


def stored_plan(resolved: Resolved) -> EditPlan:
    """The plan that a rewritten checkpoint holds, roundings included.

    Applied to the base by hooks, it gives what the checkpoint gives, up to the noise of float32. Memory is that of the edited
    matrices in float32.
    """
    edits = tuple(_stored(resolved, edit, site) for edit, site in resolved.edits.values())
    return replace(resolved.plan, edits=edits)


def _stored(resolved: Resolved, edit: Edit, site: Site) -> Edit:
    if isinstance(edit, NewBias):
        return stored_bias(resolved, edit)
    if isinstance(edit, Assign):
        after = torch.cat([block.new.float() for block in edited_blocks(resolved.checkpoint, edit, site)])
        return replace(edit, values=after[list(edit.rows)])
    # a subtraction gives new memory: a block's is used again for the next
    blocks = edited_blocks(resolved.checkpoint, edit, site)
    update = torch.cat([block.new.float() - block.old.float() for block in blocks])
    if update.ndim == 1:
        return Bias(edit.tensor, update)
    update = update if site.orientation == "out_in" else update.T.contiguous()
    out, width = update.shape
    if out <= width:
        return LowRank(edit.tensor, torch.eye(out), update)
    return LowRank(edit.tensor, update, torch.eye(width))
