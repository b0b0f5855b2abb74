from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from eval.results import PromptResult, Report
from tests.eval.samples import BASELINE, prompt, report, strategy


def test_summary_by_hand() -> None:
    first = {"accepted_lengths": [3, 1], "drafted": 6, "accepted": 2, "distinct_trigram_share": 1.0}
    second = {"accepted_lengths": [4], "drafted": 3, "accepted": 3, "distinct_trigram_share": 0.5}
    prompts = [
        prompt(0, 10, 1.0, proposals_at=[2, 2], accepted_at=[1, 1], tokens_equal=True, **first),
        prompt(1, 20, 1.0, proposals_at=[1, 1, 1], accepted_at=[1, 1, 1], tokens_equal=False, **second),
    ]
    found = strategy(prompts)
    assert found.tokens_per_second is not None
    assert found.speedup_median is not None
    assert found.speedup_pooled is not None
    assert found.tokens_per_second.value == pytest.approx(15.0)
    assert found.speedup_median.value == pytest.approx(np.median([10 / 5, 20 / 5]))
    assert found.speedup_pooled.value == pytest.approx(15 / 5)
    assert found.prefill_seconds == pytest.approx(0.015)
    assert found.acceptance_length == pytest.approx(8 / 3)
    assert found.acceptance_rate == pytest.approx(5 / 9)
    assert found.acceptance_at == pytest.approx([2 / 3, 2 / 3, 1.0])
    assert (found.equal, found.compared, found.failed, found.left_out) == (1, 2, 0, 0)
    assert found.distinct_trigram_share == pytest.approx(0.75)


def test_a_tree_has_no_acceptance_rate_and_the_baseline_no_speedup() -> None:
    assert strategy([prompt(0, 10, 1.0, drafted=6, accepted=2)], chain=False).acceptance_rate is None
    base = strategy(BASELINE, None)
    assert base.speedup_median is None
    assert base.speedup_pooled is None
    assert base.acceptance_length == 1.0
    assert base.acceptance_rate is None


def test_zero_acceptance_is_a_number() -> None:
    prompts = [
        prompt(0, 3, 1.0, accepted_lengths=[1, 1], drafted=4, accepted=0, proposals_at=[2], accepted_at=[0])
    ]
    found = strategy(prompts)
    assert (found.acceptance_length, found.acceptance_rate, found.acceptance_at) == (1.0, 0.0, [0.0])


def test_prompts_refuse_contradictions() -> None:
    with pytest.raises(ValidationError, match="error text"):
        PromptResult(index=0, status="failed")
    with pytest.raises(ValidationError, match="no new_tokens"):
        PromptResult(index=0, status="failed", error="x", new_tokens=3)
    with pytest.raises(ValidationError, match="token_count"):
        PromptResult.model_validate({"index": 0, "token_count": 3})
    with pytest.raises(ValueError, match="share an index"):
        strategy([prompt(0, 1, 1.0), prompt(0, 1, 1.0)])
    with pytest.raises(ValidationError, match="none of the report's strategies"):
        Report(**{**report().model_dump(), "baseline": "nobody"})
