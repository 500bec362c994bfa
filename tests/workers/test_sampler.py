import torch

from dist_vlm.kernels import sample
from dist_vlm.workers.plan import SamplingRow
from dist_vlm.workers.sampler import sample_tokens


def test_greedy_and_drawn_rows_share_a_batch():
    logits = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    rows = [
        SamplingRow(),
        SamplingRow(temperature=1.5, seed=11),
        SamplingRow(),
        SamplingRow(temperature=0.7, top_k=5, top_p=0.9, seed=12, sample_index=2),
    ]
    tokens = sample_tokens(logits, rows, [10, 11, 12, 13])
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    for index in (1, 3):
        row = rows[index]
        alone = sample.draw(
            logits[index : index + 1],
            temperature=torch.tensor([row.temperature]),
            top_k=torch.tensor([row.top_k]),
            top_p=torch.tensor([row.top_p]),
            seed=torch.tensor([row.seed]),
            sample_index=torch.tensor([row.sample_index]),
            position=torch.tensor([10 + index]),
        )
        assert tokens[index].item() == alone.item()


def test_a_row_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 300, generator=generator)
    rows = [SamplingRow(temperature=1.0, seed=100 + i) for i in range(8)]
    positions = list(range(20, 28))
    together = sample_tokens(logits, rows, positions).tolist()
    order = [5, 2, 7, 0]
    fewer = sample_tokens(logits[order], [rows[i] for i in order], [positions[i] for i in order]).tolist()
    assert fewer == [together[i] for i in order]
