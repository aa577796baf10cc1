"""Which answers depend on each other: the clusters that the bootstrap resamples.

Two questions of a split belong to one cluster where they share the subject of their edit, a picture (their own or their
edit's), or where they are the same question (picture and prompt), directly or through others: clusters are the connected
components. Questions about something unrelated to the edit beside which they are asked (`UNRELATED`) are not joined by its
subject, because any other edit could have stood there. Each split has clusters of its own; those around the same subject
share a number, so that statistics of several splits move together.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

UNRELATED = ("locality_far", "locality_text")


def number_clusters(events: pd.DataFrame, questions: pd.DataFrame) -> int:
    """Adds the columns `asked` and `cluster` to the questions; returns the number of clusters.

    asked: hash of the distinct question, the same in every run.
    events: subject, prompt, image, edit_id; questions: event_id, split, prompt, image.
    """
    fact = events["image"].fillna("").astype(str) + "\n" + events["prompt"]
    event = pd.DataFrame({"subject": events["subject"].where(events["subject"].notna(), fact), "photo": events["image"]})
    event = event.set_index(events["edit_id"]).reindex(questions["event_id"]).set_index(questions.index)
    event = event.where(~questions["split"].isin(UNRELATED), axis=0)
    same = questions["image"].fillna("").astype(str) + "\n" + questions["prompt"]
    questions["asked"] = pd.util.hash_array(same.to_numpy(object))
    own = pd.Series(pd.factorize(same)[0], questions.index)
    subjects = pd.Series(pd.factorize(event["subject"])[0], questions.index)
    pictures = pd.factorize(pd.concat([questions["image"], event["photo"]]))[0].reshape(2, -1)
    links = [own.to_numpy(), subjects.to_numpy(), *pictures]
    split = pd.factorize(questions["split"])[0]
    component = _components([np.where(link < 0, -1, link * (split.max() + 1) + split) for link in links])
    name = subjects.where(subjects >= 0, own + int(subjects.max()) + 1).groupby(component).transform("min")
    questions["cluster"] = pd.factorize(name)[0]
    return int(questions["cluster"].max()) + 1


def _components(links: list[np.ndarray]) -> np.ndarray:
    """The component of each row, where rows with the same number in a link are joined; -1 joins nothing."""
    rows, columns, size = [], [], len(links[0])
    for link in links:
        known = np.flatnonzero(link >= 0)
        codes, names = pd.factorize(link[known])
        rows.append(known)
        columns.append(codes + size)
        size += len(names)
    at, to = np.concatenate(rows), np.concatenate(columns)
    return connected_components(coo_matrix((np.ones(len(at), bool), (at, to)), shape=(size, size)), directed=False)[1][: len(links[0])]
