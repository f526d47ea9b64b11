"""Published scores of the Open LLM Leaderboard v1, met by `h4-v1` where a hub is reachable: `pytest -m network`."""

import pytest

from sdpo_data.assets import require_hub
from sdpo_data.tables import SdpoError
from sdpo_eval import EvalConfig, evaluate

ARC, HELLASWAG, MMLU, TRUTHFULQA = "arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"
# The leaderboard cut questions longer than a model reads; here they are refused: MMLU has some of 3,100 tokens,
# ARC and HellaSwag some of over 1,024.
PUBLISHED = [
    ("openai-community/gpt2", {TRUTHFULQA: 40.67}),
    ("EleutherAI/pythia-160m", {ARC: 22.78, HELLASWAG: 30.34, TRUTHFULQA: 44.26}),
    ("facebook/opt-125m", {ARC: 22.87, HELLASWAG: 31.47, TRUTHFULQA: 42.87}),
    ("mistralai/Mistral-7B-v0.1", {ARC: 59.98, HELLASWAG: 83.31, MMLU: 64.16, TRUTHFULQA: 42.15}),
]


@pytest.mark.network
@pytest.mark.parametrize(
    ("model", "task", "published"), [(model, *score) for model, scores in PUBLISHED for score in scores.items()]
)
def test_published_scores(model, task, published):
    """Within 0.3 points: the leaderboard ran in half precision, in which some near ties fall the other way."""
    import torch

    try:
        require_hub(f"The published score of {model}")
    except SdpoError as silence:
        pytest.skip(str(silence))
    if not torch.cuda.is_available() and (task != TRUTHFULQA or "7B" in model):
        pytest.skip("millions of tokens, or billions of weights, are for a GPU")
    dtype = "bfloat16" if "7B" in model else "float32"
    got = evaluate(model, EvalConfig(protocol="h4-v1", tasks=[task], data_dir="hub", dtype=dtype))
    assert got["n"].to_list() == got["n_full"].to_list()
    assert got["value"][0] == pytest.approx(published, abs=0.3)
