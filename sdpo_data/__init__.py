"""Preference pairs: read them, score them with a reference model, cut them into steps, easiest first.

Names load on first use, so that partitioning never imports torch and
`python -m sdpo_data.partition` runs its module once.
"""

from importlib import import_module

_HOME = {
    "DecontaminateConfig": "decontaminate",
    "ExportConfig": "export",
    "PairsConfig": "pairs",
    "PartitionConfig": "partition",
    "Run": "run",
    "ScoreConfig": "score",
    "ScoreStore": "store",
    "SdpoError": "tables",
    "TrainerSettings": "training",
    "check_pairs": "doctor",
    "decontaminate_pairs": "decontaminate",
    "describe_partition": "cards",
    "divide_pairs": "partition",
    "export_steps": "export",
    "find_contamination": "matching",
    "fix_pairs": "repair",
    "load_model": "models",
    "model_key": "models",
    "open_run": "run",
    "partition_pairs": "partition",
    "read_pairs": "pairs",
    "rescore_sample": "score",
    "score_completions": "prefix",
    "score_pairs": "score",
    "touched_items": "decontaminate",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'sdpo_data' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"sdpo_data.{_HOME[name]}"), name)
