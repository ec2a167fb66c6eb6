"""Exact and near-duplicates."""

from data_pipeline.deduplicate import Deduplicator

LINES = [f"a line long enough to count, number {n}" for n in range(10)]


def test_a_text_with_other_spacing_and_order_is_a_duplicate() -> None:
    deduplicator = Deduplicator()
    assert deduplicator.drop_reason("\n".join(LINES)) is None
    assert deduplicator.drop_reason("\n  ".join(reversed(LINES))) == "duplicate"


def test_a_text_with_most_lines_seen_is_a_near_duplicate() -> None:
    deduplicator = Deduplicator()
    deduplicator.drop_reason("\n".join(LINES))
    fresh = [f"a fresh line long enough to count, number {n}" for n in range(10)]
    assert deduplicator.drop_reason("\n".join(LINES[:6] + fresh[:4])) == "near_duplicate"
    assert deduplicator.drop_reason("\n".join(LINES[:5] + fresh[:5])) is None


def test_lines_seen_in_several_texts_add_up() -> None:
    deduplicator = Deduplicator()
    deduplicator.drop_reason("\n".join(LINES[:5]))
    deduplicator.drop_reason("\n".join(LINES[5:]))
    assert deduplicator.drop_reason("\n".join(LINES[2:8])) == "near_duplicate"


def test_short_lines_do_not_make_a_near_duplicate() -> None:
    deduplicator = Deduplicator()
    deduplicator.drop_reason("return x\nreturn y\n" + LINES[0])
    assert deduplicator.drop_reason("return x\nreturn y\n" + LINES[1]) is None
