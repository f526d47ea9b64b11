"""H4 (ARC, HellaSwag, MMLU, TruthfulQA) of every step with standard errors, and the report.

Names load on first use, so that the report never imports torch or lm_eval.
"""

from importlib import import_module

_HOME = {
    "CompareConfig": "contrasts",
    "EvalConfig": "plan",
    "Report": "report",
    "compare_models": "compare",
    "evaluate": "evaluation",
    "prefix_lm": "harness",
    "score_held_out": "held_out",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sdpo_eval' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"sdpo_eval.{_HOME[name]}"), name)
