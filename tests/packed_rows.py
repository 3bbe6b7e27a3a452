"""Sequences in groups, drawn at random, and what a layout lets a place of its row see."""

from __future__ import annotations

from hypothesis import strategies as st

from raywards.packing import Group, Layout, PackedRow

Grouped = tuple[list[list[int]], list[Group]]

# So few tokens, in sequences so short, that equal branches and branches that begin alike are drawn.
_tokens = st.integers(0, 3)


@st.composite
def grouped(draw: st.DrawFn) -> Grouped:
    """Sequences in any order, and groups that hold each once."""
    sequences: list[list[int]] = []
    for_groups: list[tuple[int, list[int]]] = []
    for _ in range(draw(st.integers(1, 4))):
        prefix = draw(st.lists(_tokens, max_size=5))
        branch = st.lists(_tokens, min_size=0 if prefix else 1, max_size=4)
        branches = draw(st.lists(branch, min_size=1, max_size=4))
        for_groups.append((len(prefix), [len(sequences) + i for i in range(len(branches))]))
        sequences += [prefix + branch for branch in branches]
    order = draw(st.permutations(range(len(sequences))))
    place = {index: at for at, index in enumerate(order)}
    groups = [Group(split, tuple(place[i] for i in members)) for split, members in for_groups]
    return [sequences[i] for i in order], groups


IDENTICAL: Grouped = ([[1, 2, 3], [1, 2, 3]], [Group(3, (0, 1))])
EQUAL_BRANCHES: Grouped = ([[1, 2, 3], [1, 2, 3], [1, 2]], [Group(1, (0, 1, 2))])
ONE_BEGINS_THE_OTHER: Grouped = ([[1, 2], [1, 2, 3]], [Group(2, (0, 1))])
NOTHING_SHARED: Grouped = ([[1, 2], [3], [1]], [Group(0, (1, 0)), Group(0, (2,))])
MANY_BRANCHES: Grouped = ([[0, 1, *[2] * n] for n in range(5)], [Group(2, (4, 0, 2, 1, 3))])
EDGES = [IDENTICAL, EQUAL_BRANCHES, ONE_BEGINS_THE_OTHER, NOTHING_SHARED, MANY_BRANCHES]


def members_in_order(groups: list[Group]) -> list[int]:
    """Indices of the sequences in the order of a row's rewards."""
    return [member for group in groups for member in group.members]


def seen_by(layout: Layout, place: int) -> list[int] | None:
    """The places that `place` attends to, in order; None where nothing is asked."""
    asked = [s for s in layout.segments if s.query_start <= place < s.query_end]
    assert len(asked) <= 1, "two segments ask at one place"
    if not asked:
        return None
    [segment] = asked
    hidden = segment.query_end - 1 - place  # the last query sees all, one before it one key less
    return [
        *range(segment.prefix_start, segment.prefix_end),
        *range(segment.own_start, segment.own_end - hidden),
    ]


def path_of(row: PackedRow, index: int) -> list[int]:
    """The places that hold a sequence's tokens, in order."""
    _, _, *stretches = row.layout.segments[row.owners[index]]
    return [*range(*stretches[:2]), *range(*stretches[2:])]
