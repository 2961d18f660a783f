"""Several sequences in each step: a step of decode reads every weight whatever it computes, so n of them cost little
more than one. Only on the exact path; what ships is proven by the kernels of one token, which are what a user runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qalora_runtimes.behaviour import Question
from qalora_runtimes.protocol import Job

SIDE_BY_SIDE = 16  # sequences at once, at most
POSITIONS = 1024  # of prompts and answers side by side, where the logits of all of them are in memory together


def groups_of(job: Job, cells: int) -> list[list[int]]:
    """Groups of the job's sequences, by number, that are decoded at once, the longest first; none unless it decodes.

    cells: positions that the sequences of a group may have together; a longer sequence is a group by itself.
    """
    if "decode" not in job.passes:
        return []
    groups, taken = [list[int]()], 0
    for number in sorted(range(len(job.sequences)), key=lambda i: -len(job.sequences[i])):
        length = len(job.sequences[number])
        if groups[-1] and (len(groups[-1]) == SIDE_BY_SIDE or taken + length > cells):
            groups.append([])
            taken = 0
        groups[-1].append(number)
        taken += length
    return groups


def steps_of(job: Job, group: Sequence[int]) -> Iterator[tuple[int, list[int], list[int]]]:
    """(position in its sequence, token of each sequence that is so long, numbers of these positions in the job).

    group: of groups_of, the longest sequence first, so that those still going are always its first ones.
    """
    starts = [0]
    for sequence in job.sequences:
        starts.append(starts[-1] + len(sequence))
    for at in range(len(job.sequences[group[0]])):
        going = [number for number in group if at < len(job.sequences[number])]
        yield at, [int(job.sequences[number][at]) for number in going], [starts[number] + at for number in going]


def questions_together(
    questions: Sequence[Question], cells: int, *, most: int = SIDE_BY_SIDE, padded: bool = False
) -> list[list[Question]]:
    """Neighbours in groups of `most` at most, prompts and answers within `cells` positions together.

    padded: every sequence takes as many positions as the longest of its group.
    """
    groups = list[list[Question]]()
    for question in questions:
        room = [len(each.prompt) + each.tokens for each in [*(groups[-1] if groups else []), question]]
        if not groups or len(room) > most or (max(room) * len(room) if padded else sum(room)) > cells:
            groups.append([])
        groups[-1].append(question)
    return groups
