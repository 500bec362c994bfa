import torch

from dist_vlm.workers.pack import lay_out, pack
from dist_vlm.workers.plan import ImageSpan, NewSequence, SamplingRow, Slice
from dist_vlm.workers.slots import SlotTable


def filled():
    """Slot 0: 10 prompt tokens with image x at 2..5; slot 2: 4 tokens, one of them generated."""
    slots = SlotTable(num_slots=3, max_model_len=16, block_size=4, device=torch.device("cpu"))
    slots.take(NewSequence(0, tuple(range(100, 110)), 10, (ImageSpan("x", 2, 4),), SamplingRow()))
    slots.take(NewSequence(2, (7, 8, 9, 6), 3, (), SamplingRow()))
    return slots


def packed(slots, slices, features):
    for piece in slices:
        slots.append_blocks(piece)
    layout = lay_out(slices, slots=slots, features=features, width=3)
    return pack(layout, slices, slots=slots, empty_features=torch.empty(0, 3))


def test_a_mixed_batch_by_hand():
    slots = filled()
    features = {"x": torch.arange(12.0).reshape(4, 3)}
    slices = [Slice(0, 0, 5, (6, 3), False), Slice(2, 0, 4, (1,), True)]
    batch = packed(slots, slices, features)
    assert batch.token_ids.tolist() == [100, 101, 102, 103, 104, 7, 8, 9, 6]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    # The prompt's length, and for a generated token its position + 1.
    assert batch.rotary_lengths.tolist() == [10, 10, 10, 10, 10, 3, 3, 3, 4]
    assert batch.slot_mapping.tolist() == [24, 25, 26, 27, 12, 4, 5, 6, 7]
    assert batch.query_starts.tolist() == [0, 5, 9]
    assert batch.context_lens.tolist() == [5, 4]
    assert batch.block_tables.tolist() == [[6, 3], [1, 0]]
    assert batch.logits_rows.tolist() == [8]
    assert batch.bounds == [(0, 5, 5), (5, 9, 4)]
    # Tokens 2..4 are the image's first three rows; its last comes with the next chunk.
    assert batch.feature_rows.tolist() == [-1, -1, 0, 1, 2, -1, -1, -1, -1]
    assert torch.equal(batch.image_features, features["x"][:3])


def test_the_rest_of_an_image_comes_with_the_next_chunk():
    slots = filled()
    features = {"x": torch.arange(12.0).reshape(4, 3)}
    packed(slots, [Slice(0, 0, 5, (6, 3), False)], features)
    batch = packed(slots, [Slice(0, 5, 5, (5,), True)], features)
    assert batch.feature_rows.tolist() == [0, -1, -1, -1, -1]
    assert torch.equal(batch.image_features, features["x"][3:])
    assert batch.slot_mapping.tolist() == [13, 14, 15, 20, 21]
    assert batch.logits_rows.tolist() == [4]


def test_images_of_several_sequences_are_counted_one_after_another():
    """Two in one sequence, then, in another, the second half of one of them: y's rows come last, and x's twice."""
    slots = SlotTable(num_slots=2, max_model_len=16, block_size=4, device=torch.device("cpu"))
    both = (ImageSpan("x", 1, 2), ImageSpan("y", 4, 3))
    slots.take(NewSequence(0, tuple(range(100, 108)), 8, both, SamplingRow()))
    slots.take(NewSequence(1, (7, 7, 8), 3, (ImageSpan("x", 0, 2),), SamplingRow()))
    packed(slots, [Slice(1, 0, 1, (3,), False)], {"x": torch.zeros(2, 3)})
    features = {"x": torch.arange(6.0).reshape(2, 3), "y": torch.arange(10.0, 19.0).reshape(3, 3)}
    batch = packed(slots, [Slice(1, 1, 2, (), True), Slice(0, 0, 8, (1, 2), True)], features)
    assert batch.feature_rows.tolist() == [0, -1, -1, 1, 2, -1, 3, 4, 5, -1]
    assert torch.equal(batch.image_features, torch.cat((features["x"][1:], features["x"], features["y"])))


def test_a_chunk_before_its_image_has_no_feature_rows():
    batch = packed(filled(), [Slice(0, 0, 2, (6,), False)], {})
    assert batch.feature_rows is None
    assert batch.image_features.shape == (0, 3)


def test_a_slice_whose_features_are_of_a_wrong_shape_is_computed_without_them():
    slots = filled()
    slots.take(NewSequence(1, (5, 5, 6), 3, (ImageSpan("z", 0, 2),), SamplingRow()))
    features = {"x": torch.zeros(3, 3), "z": torch.ones(2, 3)}
    slices = [Slice(0, 0, 5, (6, 3), False), Slice(1, 0, 3, (1,), True)]
    for piece in slices:
        slots.append_blocks(piece)
    layout = lay_out(slices, slots=slots, features=features, width=3)
    assert layout.unpackable == (0,)
    assert layout.feature_rows.tolist() == [-1, -1, -1, -1, -1, 0, 1, -1]
    assert [part.tolist() for part in layout.image_features] == [features["z"].tolist()]


def test_a_decode_step_reads_the_token_the_rank_sampled():
    slots = filled()
    packed(slots, [Slice(2, 0, 4, (1,), True)], {})
    slots.write_sampled([2], [4], torch.tensor([55]))
    batch = packed(slots, [Slice(2, 4, 1, (2,), True)], {})
    assert batch.token_ids.tolist() == [55]
    assert batch.context_lens.tolist() == [5]
    assert batch.feature_rows is None
    assert batch.image_features.shape == (0, 3)
