"""Log probabilities against transformers' own logits in float32, of the answer and of the prompt, picture included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_vlm.sampling import SamplingParams

from .cases import noise_cases
from .ranks import Ranks
from .reference import reference_for
from .test_parity import prompt_of

TOLERANCE = 1e-4
MAX_TOKENS = 8


@torch.inference_mode()
def reference_rows(checkpoint: Path, case, answer: list[int]) -> torch.Tensor:
    """float64 log probabilities at every position of prompt and answer, [tokens, vocabulary]."""
    reference = reference_for(checkpoint)
    inputs = reference._inputs(case.prompt, case.images)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs.pop("mm_token_type_ids", None)
    return torch.log_softmax(reference.model(**inputs).logits[0].double(), dim=-1)


@pytest.mark.parametrize(("num_ranks", "budget"), [(1, 7), (1, 8192), (2, 64)])
def test_log_probabilities_equal_those_of_transformers(
    num_ranks: int, budget: int, ranks: Ranks, tiny_checkpoint: Path
) -> None:
    cases = noise_cases(with_images=True)[:4]
    executor = {1: "inline", 2: "ray"}[num_ranks]
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=num_ranks, budget=budget, executor=executor, transport="direct")
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=5, prompt_logprobs=3)
    outputs = llm.generate([prompt_of(case, "pixels", tiny_checkpoint) for case in cases], params, use_tqdm=False)
    for case, output in zip(cases, outputs, strict=True):
        prompt, answer = output.prompt_token_ids, output.outputs[0]
        rows = reference_rows(tiny_checkpoint, case, answer.token_ids)
        assert output.prompt_logprobs is not None and answer.logprobs is not None
        assert output.prompt_logprobs[0] is None
        told = [*output.prompt_logprobs[1:], *answer.logprobs]
        assert len(told) == len(prompt) - 1 + MAX_TOKENS
        for position, entry in enumerate(told):
            assert entry is not None
            row = rows[position]
            token = [*prompt, *answer.token_ids][position + 1]
            num_top = 3 if position < len(prompt) - 1 else 5
            assert num_top <= len(entry) <= num_top + 1
            for token_id, logprob in entry.items():
                assert logprob.logprob == pytest.approx(row[token_id].item(), abs=TOLERANCE)
            # Which tokens are the likeliest: every one above the least reported, ties apart, is reported.
            least = sorted((one.logprob for one in entry.values()), reverse=True)[num_top - 1]
            assert set(torch.nonzero(row > least + 2 * TOLERANCE).flatten().tolist()) <= set(entry)
            assert abs(entry[token].rank - 1 - int((row > row[token]).sum())) <= 1
        assert answer.cumulative_logprob == pytest.approx(
            sum(rows[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer.token_ids)), abs=1e-3
        )
