import pytest
import torch

from dist_vlm.workers.plan import NewSequence, SamplingRow, Slice
from dist_vlm.workers.slots import SlotTable


def table(**changes):
    sizes = {"num_slots": 3, "max_model_len": 20, "block_size": 8, "device": torch.device("cpu"), **changes}
    return SlotTable(**sizes)


def sequence(slot, tokens):
    return NewSequence(slot, tuple(tokens), len(tokens), (), SamplingRow())


def test_a_slot_is_taken_released_and_taken_again():
    slots = table()
    slots.take(sequence(1, [5, 6, 7]))
    assert slots.token_ids[1, :3].tolist() == [5, 6, 7]
    with pytest.raises(RuntimeError, match="slot 1 is taken"):
        slots.take(sequence(1, [1]))
    slots.release(1)
    with pytest.raises(RuntimeError, match="free"):
        slots.sequence(1)
    with pytest.raises(RuntimeError, match="free already"):
        slots.release(1)
    slots.take(sequence(1, [9]))
    slots.append_blocks(Slice(1, 0, 1, (2,), True))
    assert slots.block_ids[1, 0] == 2, "the block table begins anew"


def test_blocks_are_appended_and_must_cover_the_slice():
    slots = table()
    slots.take(sequence(0, range(12)))
    slots.append_blocks(Slice(0, 0, 8, (4,), False))
    slots.append_blocks(Slice(0, 8, 4, (1,), True))
    assert slots.block_ids[0, :2].tolist() == [4, 1]
    with pytest.raises(RuntimeError, match="2 blocks do not cover 17 positions"):
        slots.append_blocks(Slice(0, 12, 5, (), True))


def test_sampled_tokens_land_at_their_positions_and_past_the_end_nowhere():
    slots = table(max_model_len=4)
    slots.write_sampled([0, 2], [3, 4], torch.tensor([8, 9]))
    assert slots.token_ids.tolist() == [[0, 0, 0, 8], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_slot_taken_anew_before_its_blocks_go_up_has_its_own_blocks(monkeypatch):
    """A step that is not recorded brings none up, so a slot may have had several sequences since the last one did."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    slots = table(num_slots=64, max_model_len=512, device=device)
    for turn in range(5):
        for slot in range(64):
            slots.take(sequence(slot, [1]))
            slots.append_blocks(Slice(slot, 0, 1, tuple(range(100 * turn + slot, 100 * turn + slot + 60)), True))
            if turn < 4:
                slots.release(slot)
    written = []

    def upload(rows, dtype, device):
        written.extend((slot, place) for slot, place, _ in rows)
        return torch.tensor(rows, dtype=dtype, device=device)

    monkeypatch.setattr("dist_vlm.workers.slots.upload", upload)
    slots.upload_blocks()
    assert len(set(written)) == len(written) == 64 * 60, "of two writes to one place a GPU may keep either"
    assert slots.block_tables[:64, :60].cpu().tolist() == [list(range(400 + slot, 460 + slot)) for slot in range(64)]
    slots.upload_blocks()
    assert len(written) == 64 * 60, "what went up is not sent again"
