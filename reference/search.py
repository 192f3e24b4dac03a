"""Beam search and diverse beam search over whole rows of log-probabilities: the definition.

Nothing is cached: every beam is computed anew in each step. The rules for when beams end are those
of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Model = Callable[[list[int]], Float32]
Beams = dict[tuple[int, ...], np.float32]  # tokens -> sum of their log-probabilities
Answers = list[tuple[np.float32, tuple[int, ...]]]  # scores and tokens


def beam_search(
    model: Model,
    prompt: Sequence[int],
    num_beams: int,
    max_tokens: int,
    stop_token_ids: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    num_groups: int = 1,
    diversity_penalty: float = 0.0,
) -> list[tuple[list[int], float]]:
    """The num_beams best answers, the best first: (tokens, score).

    model: token ids -> the log-probabilities of the token after them, float32 (vocab_size,).
    An answer ends after a stop token or max_tokens tokens. Its score is the sum of its
    log-probabilities over length ** length_penalty. In each step all continuations of all beams are
    ranked by their sums. Of the best (1 + number of stop tokens, at least 2) * num_beams, those
    among the first num_beams that end are answers; the first num_beams that do not end go on.

    num_groups (Vijayakumar et al. 2016, arXiv 1610.02424): each group of num_beams / num_groups
    beams is a search by itself. In a step groups take turns, and diversity_penalty is taken off a
    token's log-probability for each beam of an earlier group that has chosen it in this step (the
    paper's Hamming diversity).
    """
    if num_beams == 1:  # greedy decoding, which ends with its first answer
        early_stopping = True
    width = num_beams // num_groups
    groups: list[Beams] = [{(): np.float32(0)} for _ in range(num_groups)]
    answers: list[Answers] = [[] for _ in range(num_groups)]
    for length in range(1, max_tokens + 1):
        chosen: list[int] = []
        for index, beams in enumerate(groups):
            if not beams:
                continue
            groups[index] = _step(
                *(model, prompt, beams, answers[index], chosen, width, length, max_tokens),
                *(frozenset(stop_token_ids), length_penalty, early_stopping, diversity_penalty),
            )
    found = [answer for group in answers for answer in group]
    found.sort(key=lambda answer: -answer[0])
    return [(list(tokens), float(score)) for score, tokens in found]


def _step(
    model: Model,
    prompt: Sequence[int],
    beams: Beams,
    answers: Answers,
    chosen: list[int],
    width: int,
    length: int,
    max_tokens: int,
    stops: frozenset[int],
    length_penalty: float,
    early_stopping: bool | str,
    diversity_penalty: float,
) -> Beams:
    """One step of one group; changes answers and chosen. Returns the next beams; none: it ends."""
    rows = np.stack([model([*prompt, *tokens]) for tokens in beams])
    counts = np.bincount(np.array(chosen, np.int64), minlength=rows.shape[1]).astype(np.float32)
    rows = rows - np.float32(diversity_penalty) * counts
    sums = rows + np.array(list(beams.values()), np.float32)[:, None]
    num_kept = max(2, 1 + len(stops)) * width
    order = np.argsort(-sums, axis=None, kind="stable")[:num_kept]
    names, vocab = list(beams), rows.shape[1]
    kept = [((*names[i // vocab], int(i % vocab)), sums.flat[i]) for i in order]
    going: Beams = {}
    for rank, (tokens, score) in enumerate(kept):
        if tokens[-1] not in stops and length < max_tokens:
            if len(going) < width:
                going[tokens] = score
        elif rank < width:
            answers.append((np.float32(score / np.float32(length**length_penalty)), tokens))
    answers.sort(key=lambda answer: -answer[0])
    del answers[width:]
    chosen += [tokens[-1] for tokens in going]
    if not going or (len(answers) >= width and early_stopping is True):
        return {}
    if len(answers) >= width:
        reach = max_tokens if early_stopping == "never" and length_penalty > 0 else length
        best = next(iter(going.values())) / np.float32(reach**length_penalty)
        if not best > answers[-1][0]:
            return {}
    return going


def contrastive_choice(expert: Float32, amateur: Float32, alpha: float, temperature: float) -> int:
    """The next token of contrastive decoding (Li et al. 2022, arXiv 2210.15097).

    expert, amateur: log-probabilities of a large and a small model, float32 (vocab_size,). Of the
    tokens whose probability for the expert is at least alpha times the largest (the paper's
    plausibility constraint) the one with the largest log p_expert - log p_amateur; of equals the
    one that the expert prefers. temperature: of the amateur; below 1 it is surer of itself.
    """
    scaled = amateur / np.float32(temperature)
    scaled = scaled - np.log(np.sum(np.exp(scaled - scaled.max()))) - scaled.max()
    plausible = expert >= expert.max() + np.log(np.float32(alpha))
    scores = np.where(plausible, expert - scaled, np.float32(-np.inf))
    best = np.flatnonzero(scores == scores.max())
    return int(best[np.argmax(expert[best])])


def similarity_choice(
    probabilities: Float32, candidates: Float32, context: Float32, alpha: float
) -> int:
    """Which candidate contrastive search takes (Su et al. 2022, arXiv 2202.06417).

    probabilities: of the k most probable next tokens, float32 (k,). candidates: the last hidden
    state that each of them would have, after the final norm, (k, hidden). context: those of all
    tokens so far, (tokens, hidden). The score is (1 - alpha) * probability - alpha * the largest
    cosine similarity to any token of the context: likely, but nothing that is said already.
    """
    own = candidates / np.linalg.norm(candidates, axis=1, keepdims=True)
    others = context / np.linalg.norm(context, axis=1, keepdims=True)
    penalty = (own @ others.T).max(axis=1)
    return int(np.argmax(np.float32(1 - alpha) * probabilities - np.float32(alpha) * penalty))
