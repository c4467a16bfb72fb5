"""The optimizers of a run: which parameters each one updates, their learning rates, and conditional steps."""

from argparse import Namespace

import torch
from torch import Tensor

from models.omnimotion import OmniMotion
from training.muon import Muon

Optimizers = dict[str, torch.optim.Optimizer]


def new_optimizers(model: OmniMotion, options: Namespace) -> Optimizers:
    """The optimizers by name: "adam", and with `--optimizer muon` also "muon" for the hidden matrices of the invertible
    network. Groups have OmniMotion's names; the time latent has none once it is frozen."""
    deform = list(model.deform.parameters())
    matrices = []
    if options.optimizer == "muon":
        # without the matrices of output layers, which have at most 5 rows
        matrices = [p for p in deform if p.ndim == 2 and min(p.shape) > 5]
        chosen = set(map(id, matrices))
        deform = [p for p in deform if id(p) not in chosen]
    groups = [{"params": deform, "lr": options.lr_deform, "name": "deform"},
              {"params": list(model.field.parameters()), "lr": options.lr_color, "name": "color"}]
    if model.time_latent.frozen is None:
        groups.append({"params": list(model.time_latent.parameters()), "lr": options.lr_feature, "name": "feature"})
    out = {"adam": torch.optim.Adam(groups, fused=True)}
    if matrices:
        out["muon"] = Muon([{"params": matrices, "name": "deform_matrices"}], lr=options.lr_deform)
    return out


def parameter_groups(optimizers: Optimizers) -> dict[str, dict]:
    """The groups of all optimizers by name; "lr" is the current learning rate."""
    return {group["name"]: group for optimizer in optimizers.values() for group in optimizer.param_groups}


def copy_moments(optimizers: Optimizers, earlier: Optimizers) -> None:
    """Copy the moments of the parameters of `optimizers` from the `earlier` ones."""
    for name, optimizer in optimizers.items():
        moments = earlier[name].state
        for group in optimizer.param_groups:
            optimizer.state.update({p: moments[p] for p in group["params"] if p in moments})


def step_where(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` (0-d bool) is true, else no change. The CPU does not wait for `finite`."""
    if optimizer.defaults.get("fused") and all(group["fused"] for group in optimizer.param_groups):
        optimizer.grad_scale = None
        optimizer.found_inf = (~finite).float()
        optimizer.step()
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    before = [(p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}) for p in parameters]
    optimizer.step()
    for p, (value, moments) in zip(parameters, before, strict=True):
        p.data.copy_(torch.where(finite, p.data, value))
        for name, moment in optimizer.state[p].items():
            moment.copy_(torch.where(finite, moment, moments.get(name, torch.zeros_like(moment))))


def fits(state: dict, optimizer: torch.optim.Optimizer) -> bool:
    """Whether a saved optimizer state belongs to parameters of the same number and shapes."""
    saved_groups = state["param_groups"]
    groups = optimizer.param_groups
    if [len(group["params"]) for group in saved_groups] != [len(group["params"]) for group in groups]:
        return False
    for saved_group, group in zip(saved_groups, groups, strict=True):
        for key, p in zip(saved_group["params"], group["params"], strict=True):
            moments = state["state"].get(key, {}).values()
            if any(moment.ndim and moment.shape != p.shape for moment in moments):
                return False
    return True
