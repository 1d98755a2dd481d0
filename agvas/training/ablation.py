"""The paper's ablations (Table 3) of a checkpoint: a part is left out before tuning, and all others keep their weights.

Each anchor has a query and a hypernetwork of its own, and SPAM's tokens are left out of the prompt as a whole, so nothing has to be made
anew. A part that a checkpoint was trained with is missed by what was trained beside it: the tuning that follows is what it is judged by.
"""

from __future__ import annotations

from torch import nn

from agvas.config import ROLES, ablated
from agvas.model import AGVAS
from runtime.prompts import PromptEncoder


def leave_out(model: AGVAS, ablation: str) -> str:
    """Change a model in place to one of agvas.config.ABLATIONS; what was left out, in words.

    Raises:
        ValueError: another name; a model that lacks a part already.
    """
    before = model.config
    if before.mask_decoder.roles != ROLES or before.spam is None:
        found = f"{before.name}, which lacks a part already"
        raise ValueError(f"--ablation {ablation}: expected a whole AG-VAS, got {found}; give the checkpoint that it was made of")
    config = ablated(before, ablation)
    decoder = model.mask_decoder
    kept = [number for number, role in enumerate(ROLES) if role in config.mask_decoder.roles]
    decoder.roles = config.mask_decoder.roles
    decoder.queries = nn.Parameter(decoder.queries.detach()[kept].clone())
    decoder.hypernetworks = nn.ModuleList(decoder.hypernetworks[number] for number in kept)
    if config.spam is None:
        model.spam = None
    model.config = config
    model.prompt_encoder = PromptEncoder(model.tokenizer, config.prompts)
    left = [anchor for anchor in before.prompts.anchors if anchor not in config.prompts.anchors] + ["SPAM"] * (config.spam is None)
    return f"ablation {ablation}: {', '.join(left)} left out of {before.name}, all other parts keep their weights"
