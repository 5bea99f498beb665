"""Retrieval: the sentences that share the most telling words with a question."""

from __future__ import annotations

from collections.abc import Sequence


def nearest(query: str, sentences: Sequence[str], count: int) -> list[int]:
    """The indices of the ``count`` of ``sentences`` nearest to ``query``, in the order of the sentences.

    Nearness is the cosine of the vectors of word counts, weighted by how rare a word is (TF-IDF; Salton and Buckley,
    "Term-weighting approaches in automatic text retrieval", 1988). Ties go to what was said last.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(token_pattern=r"\w+").fit(sentences)
    nearness = (vectors.transform(sentences) @ vectors.transform([query]).T).toarray()[:, 0]
    return sorted(sorted(range(len(sentences)), key=lambda i: (nearness[i], i))[-count:])
