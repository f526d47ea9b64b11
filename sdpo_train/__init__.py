"""Stepwise DPO (arXiv 2403.19270): each step starts from, and refers to, the model of the step before.

Not TRL's SDPOTrainer, which is Self-Distillation Policy Optimization. Names load on first use.
"""

from importlib import import_module

_HOME = {"ARMS": "arms", "TrainConfig": "config", "run_sdpo": "steps"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sdpo_train' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"sdpo_train.{_HOME[name]}"), name)
