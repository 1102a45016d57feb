"""Graded responses for tests."""

from fireopd_jax.evaluation.responses import Graded


def responses(scores, *, name="s", questions=None, finals=None, file="s.jsonl", plain=None):
    """Return the responses to problems whose samples are correct (1) or not (0).

    `questions` are names of the prompts, by default all different.
    """
    return [
        Graded(
            row=i,
            response=f"response {j}",
            answer=str(i),
            correct=bool(score),
            sample=j,
            final=finals[i][j] if finals else str(i if score else -1),
            rule="text",
            plain=None if plain is None else bool(plain[i][j]),
            tokens=10 * (i + 1),
            finished=bool(score),
            set=name,
            question=questions[i] if questions else f"q{i}",
            origin=f"{file}:{i + 1}",
            prompt=f"what is {i}?",
        )
        for i, own in enumerate(scores)
        for j, score in enumerate(own)
    ]
