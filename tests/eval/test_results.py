from __future__ import annotations

import pytest
from pydantic import ValidationError

from eval.results import PromptResult, Report
from tests.eval.samples import prompt, report, strategy


def test_prompts_refuse_contradictions() -> None:
    with pytest.raises(ValidationError, match="error text"):
        PromptResult(index=0, status="failed")
    with pytest.raises(ValidationError, match="no new_tokens"):
        PromptResult(index=0, status="failed", error="x", new_tokens=3)
    with pytest.raises(ValidationError, match="it was in a batch"):
        PromptResult(index=0)
    with pytest.raises(ValidationError, match="token_count"):
        PromptResult.model_validate({"index": 0, "token_count": 3})
    with pytest.raises(ValueError, match="share an index"):
        strategy([prompt(0, 1, 1.0), prompt(0, 1, 1.0)])
    with pytest.raises(ValidationError, match="none of the report's strategies"):
        Report(**{**report().model_dump(), "baseline": "nobody"})
    with pytest.raises(ValidationError, match="none of the report's strategies"):
        report(sampled=[strategy([prompt(0, 1, 1.0)])])
