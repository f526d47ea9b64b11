"""Clean questions: those that decontamination held against the training pairs and did not find in them."""

from dataclasses import dataclass

import polars as pl

from sdpo_data.config import read_section
from sdpo_data.decontaminate import DecontaminateConfig, read_documents, touched_items
from sdpo_data.run import Run
from sdpo_data.tables import CONTAMINATION, check

KEY = ["task", "item_id"]


@dataclass(frozen=True)
class Clean:
    """What a run's decontamination knows of the questions."""

    matched: pl.DataFrame
    """task and item_id of those that the pairs were held against."""
    touched: pl.DataFrame
    """task and item_id of those that stand in a pair which is still trained on."""

    def keep(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Keep the rows of clean questions; one that no pair was held against is not known to be clean."""
        known = frame.join(self.matched, on=KEY, how="semi", maintain_order="left")
        return known.join(self.touched, on=KEY, how="anti", maintain_order="left")


def read_clean(run: Run) -> Clean | None:
    """Read which questions are clean, by the rules in `decontaminate.rules`; None before decontamination.

    Raises:
        SdpoError: contamination.parquet, or what it was made from, is not there or is not what it must be.
    """
    path = run.path / "contamination.parquet"
    if not path.exists():
        return None
    config = read_section(run, "decontaminate", DecontaminateConfig)
    documents, _ = read_documents(run, config)
    found = touched_items(check(run.contamination, CONTAMINATION, str(path)), run.pairs, config.rules)
    return Clean(documents.select(KEY).unique(), found.select(KEY))
