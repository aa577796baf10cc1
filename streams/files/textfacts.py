"""Text facts that papers compare on, on a yearly schedule: zsRE, CounterFact, KnowEdit."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

from streams.base import StreamConfig
from streams.files.entry import EntryData, EntryQuestion, QuestionCollector
from streams.files.entry_stream import EntryStream
from streams.files.fields import suffixes
from streams.files.records import plain
from streams.files.textfacts_files import Source, load
from testbed.core.registry import STREAMS

_KNOWEDIT = {"prompt": "prompt", "target": "target_new", "previous": "ground_truth", "subject": "subject"}
_NESTED = {"locality": "locality", "portability": "portability"}

_KNOWEDIT_ZSRE = suffixes("knowedit_portability/data/ZsRE/ZsRE-test-all.json")

COUNTERFACT = Source(
    "CounterFact",
    (("counterfact.json", "counterfact-train.json", "counterfact-edit.json", "counterfact/counterfact-train.json"),),
    {
        "ROME": {
            "prompt": "requested_rewrite.prompt",
            "target": "requested_rewrite.target_new.str",
            "previous": "requested_rewrite.target_true.str",
            "subject": "requested_rewrite.subject",
            "relation": "requested_rewrite.relation_id",
            "rephrase": "paraphrase_prompts",
            "hard": "neighborhood_prompts",
            "hard_answer": "requested_rewrite.target_true.str",
        },
        "flat": _KNOWEDIT | {"rephrase": "rephrase_prompt", "hard": "locality_prompt", "hard_answer": "locality_ground_truth"},
    },
)
ZSRE = Source(
    "zsRE",
    ((*suffixes("zsre/data/zsre/fullTest/edit_data.json"), "zsre_mend_eval.json", "zsre_mend_edit.json", "zsre_mend_train.json"),),
    {
        "postEdit": {"prompt": "requested_rewrite", "target": "target_new", "previous": "target_old"},
        "MEND": {
            "prompt": "src",
            "target": "alt",
            "previous": "answers",
            "subject": "subject",
            "rephrase": "rephrase",
            "text": "loc",
            "text_answer": "loc_ans",
        },
    },
    queries="query_data.json",
    further=(_KNOWEDIT_ZSRE, _KNOWEDIT | _NESTED),
)
KNOWEDIT = Source(
    "KnowEdit",
    (_KNOWEDIT_ZSRE, suffixes("knowedit_portability/data/wiki_counterfact/test_cf.json")),
    {"KnowEdit": _KNOWEDIT | _NESTED | {"rephrase": "rephrase_prompt", "rephrase_too": "rephrase"}},
)


class TextFacts(EntryStream):
    """A set of text facts. Raises `BadStream` where its files cannot be used."""

    source: ClassVar[Source]

    def read(self, config: StreamConfig) -> EntryData:
        return load(self.source, config)

    @cached_property
    def _old_answers(self) -> dict[str, set[str]]:
        """For each subject that is edited or trained on: its answers before the edit."""
        out: dict[str, set[str]] = {}
        for e in self._data.entries:
            if e.role != "probe" and e.subject and e.previous:
                out.setdefault(plain(e.subject), set()).add(plain(e.previous))
        return out

    def is_unaffected(self, collector: QuestionCollector, question: EntryQuestion) -> bool:
        """Besides, no prompt may name an edited subject where the answer is the one that the edit replaces."""
        if not super().is_unaffected(collector, question):
            return False
        words, answer = plain(question.prompt).split(), plain(question.answer or "")
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 9, len(words) + 1)))
        return not any(answer in self._old_answers.get(span, ()) for span in spans)


@STREAMS.register("counterfact-yearly")
class CounterFactYearly(TextFacts):
    """CounterFact, as ROME published it or in the flat form with one rephrase and one neighbour."""

    summary = "CounterFact: false statements about known subjects, with neighbours (needs --data-root)"
    licence = "CounterFact (ROME): MIT; facts: Wikidata, CC0"
    size = "21,919 records; 10,000 in the flat train file"
    source = COUNTERFACT


@STREAMS.register("zsre-yearly")
class ZsreYearly(TextFacts):
    """zsRE, in the layout of postEdit or of MEND; with portability where KnowEdit's file lies under the same root."""

    summary = "zsRE: answers to questions about entities, unrelated questions beside (needs --data-root)"
    licence = "zsRE (Levy et al., MEND, postEdit): MIT; questions: Wikipedia, CC BY-SA; unrelated questions: NQ, CC BY-SA 3.0"
    size = "10,720 records in postEdit's file"
    source = ZSRE


@STREAMS.register("knowedit-yearly")
class KnowEditYearly(TextFacts):
    """KnowEdit's ZsRE and WikiData-counterfact, with portability and locality."""

    summary = "KnowEdit: ZsRE and WikiCounterfact with portability and locality (needs --data-root)"
    licence = "KnowEdit (zjunlp): MIT; the copy read here carries no licence file; facts: Wikidata, CC0"
    size = "2,140 records in both files"
    source = KNOWEDIT
