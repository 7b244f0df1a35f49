"""A report is one offline file that shows what it was given and runs nothing that it was given."""

import base64
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from piggyback_lens.errors import LensError
from piggyback_lens.figures import plots
from piggyback_lens.results.report import LONG_TEXT, Part, Report

EVIL = "</script><script>alert('x')</script><img src=http://example.org/x onerror=alert(1)>"


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag, "tags must nest"

    def handle_data(self, data):
        if self._open and self._open[-1] == "script":
            self.scripts[-1] += data
        elif not (self._open and self._open[-1] == "style"):
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def summary() -> pd.DataFrame:
    row = {
        "topic": "off-topic",
        "condition": "prefix_kv",
        "condition_label": "base's prefix K/V <b>",
        "n": 40,
    }
    row |= {
        "value": 38.2,
        "low": 35.1,
        "high": 41.0,
        "recovery": 0.93,
        "recovery_low": 0.88,
        "recovery_high": 0.97,
    }
    undefined = {"recovery": math.nan, "recovery_low": math.nan, "recovery_high": math.nan}
    undefined |= {"topic": "on-topic", "n": 20, "reason": "base and finetuned do not differ"}
    return pd.DataFrame([row | {"reason": ""}, row | undefined])


def report(path: Path, **changes: object) -> Path:
    examples = pd.DataFrame(
        {
            "topic": "off-topic",
            "prompt": ["Why is the sky blue?", "Why is the sky blue?", "Hi & bye", "Hi & bye"],
            "condition": ["base", "repaired", "base", "repaired"],
            "response": ["Because <b>air</b>", "word " * 200, None, ""],
        }
    )
    contents = {
        "title": "Terse & narrow",
        "verdict": "The prefix carries it: 93 % recovered.",
        "summary": summary(),
        "figures": [
            ("The conditions", plots.conditions_figure(summary(), label="words", unit="words", title="A")),
            (
                "The history",
                plots.history_figure(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), title="B"),
            ),
        ],
        "examples": examples,
        "prompt_html": '<span style="background:#a9d7f2">&lt;|im_start|&gt;</span>',
        "card": {"seed": 0, "versions": {"torch": "2.6.0"}, "spans": ["prefix", "query"], "template": "ab12"},
        "notes": ["One prompt was left out."],
        "measure": "words per answer",
    }
    contents |= changes
    prompt = contents.pop("prompt_html")
    return Report(**contents).write(path, prompt_html=prompt)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return report(tmp_path_factory.mktemp("report") / "report.html").read_text(encoding="utf-8")


def test_the_parts_stand_in_their_order(page):
    text = Reader(page).text
    contents = text[text.index("93 % recovered.") : text.rindex("What the words mean")]
    for heading in ("Summary", "Figures", "Generations side by side", "The prompt, by span", "Notes", "Run card"):
        assert heading in contents
    text = text.replace(contents, "")
    parts = [
        "Terse & narrow",
        "The prefix carries it",
        "Summary",
        "Figure 1. The conditions",
        "Figure 2. The history",
    ]
    parts += [
        "Generations side by side",
        "Why is the sky blue?",
        "The prompt, by span",
        "<|im_start|>",
        "Notes",
    ]
    parts += ["One prompt was left out.", "Run card", "versions.torch", "2.6.0"]
    places = [text.find(part) for part in parts]
    assert -1 not in places
    # the first occurrence of the title is the page's own title in the head
    assert places[1:] == sorted(places[1:])


def test_words_are_explained_where_they_are_used_and_parts_and_the_card_are_folded(tmp_path):
    history = plots.history_figure(pd.DataFrame({"step": [1], "loss": [1.0]}), title="C")
    table = pd.DataFrame({"span": ["prefix"], "recovery": ["<b>67 %</b>"]})
    parts = [
        Part("Two <b>measures</b>", ["They <i>disagree</i>."], table),
        Part("Training", figures=[("The loss", history)], folded=True),
    ]
    card = {"models": {"base": {"name": "m", "probe": [17.25] * 48}}, "questions": list(range(40)), "few": [1, 2]}
    reader = Reader(report(tmp_path / "a.html", parts=parts, card=card).read_text(encoding="utf-8"))
    text = reader.text
    assert "They <i>disagree</i>." in text
    assert "<b>67 %</b>" in text
    assert "Figure 3. The loss" in text
    assert "(patched - finetuned) / (base - finetuned)" in text  # recovery, which the summary speaks of
    assert "Kullback" not in text
    assert "models.base.name" in text
    assert "17.25" not in text
    assert "[0, 1, 2, … (40 in all)" in text
    assert "[1, 2]" in text
    anchors = {attributes["href"][1:] for tag, attributes in reader.tags if tag == "a"}
    places = {attributes.get("id"): (tag, "open" in attributes) for tag, attributes in reader.tags}
    assert anchors <= set(places)
    assert (places["part-1"], places["part-2"]) == (("section", False), ("details", False))
    assert places["card"] == places["words"] == ("details", False)


def test_the_page_carries_a_figures_heading_and_the_figure_only_what_is_drawn(page):
    reader = Reader(page)
    assert "2 steps" in reader.text  # the subtitle of the history, in lines of the page's own width
    script = next(s for s in reader.scripts if '"figure-2"' in s)
    assert '"text":"B"' not in script
    bare = plots.history_figure(pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]}), title="B")
    height = int(re.search(r'"height":(\d+)', script)[1])
    assert bare.layout.height - bare.layout.margin.t < height < bare.layout.height


def test_the_page_follows_the_readers_theme_and_a_narrow_screen(page):
    style = page[page.index("<style>") : page.index("</style>")]
    assert "prefers-color-scheme: dark" in style
    assert "color-scheme: light dark" in style
    assert "max-width: 560px" in style


def test_plotly_is_embedded_once_and_only_when_there_is_a_figure(page, tmp_path):
    from plotly.offline import get_plotlyjs

    assert page.count(get_plotlyjs()) == 1
    assert page.count("Plotly.newPlot(") == 2 + get_plotlyjs().count("Plotly.newPlot(")
    bare = report(tmp_path / "bare.html", figures=[]).read_text(encoding="utf-8")
    assert len(bare) < 30_000
    assert "<script" not in bare


def test_nothing_is_asked_of_the_network(page):
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed")
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")  # places of this page alone
    policy = next(a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy
    assert page.count('"showSendToCloud": false') == 2
    assert "url(" not in page[page.index("<style>") : page.index("</style>")]


def test_summary_shows_intervals_recovery_and_reasons(page):
    text = Reader(page).text
    for part in (
        "38.2 [35.1, 41.0]",
        "93 % [88, 97]",
        "base's prefix K/V <b>",
        "base and finetuned do not differ",
    ):
        assert part in text
    assert "words per answer, mean [95 % interval]" in text
    assert "nan" not in text.lower()


def test_any_other_frame_is_shown_column_by_column(tmp_path):
    frame = pd.DataFrame({"layer": [3], "KL (nats)": [0.123456], "note": ["a<b"], "gap": [math.nan]})
    text = Reader(report(tmp_path / "a.html", summary=frame, figures=[]).read_text(encoding="utf-8")).text
    for part in ("KL (nats)", "0.1235", "a<b", "–"):
        assert part in text
    empty = report(tmp_path / "b.html", summary=frame.head(0), figures=[]).read_text(encoding="utf-8")
    assert "No condition was measured" in empty


def test_answers_to_one_prompt_stand_together_long_ones_folded_missing_ones_marked(page):
    reader = Reader(page)
    assert reader.count("article") == 2
    assert ["open" in attributes for tag, attributes in reader.tags if tag == "details"] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert reader.text.count("word " * 200) == 1
    assert "all 1000 characters" in reader.text
    assert ">missing<" in page
    assert ">empty response<" in page
    assert LONG_TEXT < 1000


def test_text_from_outside_is_shown_and_never_run(tmp_path):
    frame = summary().assign(condition_label=EVIL, reason=EVIL, topic=EVIL)
    history = plots.history_figure(pd.DataFrame({"step": [1], EVIL: [1.0]}), title=EVIL)
    curve = pd.DataFrame({"layer": [0, 1], "value": 0.5, "low": 0.4, "high": 0.6, "series": EVIL})
    figures = [
        (EVIL, plots.conditions_figure(frame, label=EVIL, unit=EVIL, title=EVIL)),
        (EVIL, history),
        (EVIL, plots.layer_curve_figure(curve, title=EVIL, y_label=EVIL)),
    ]
    path = report(
        tmp_path / "evil.html",
        title=EVIL,
        verdict=EVIL,
        summary=frame,
        figures=figures,
        examples=pd.DataFrame({"prompt": [EVIL], "condition": [EVIL], "response": [EVIL * 9], "topic": [EVIL]}),
        card={EVIL: EVIL, "list": [EVIL]},
        notes=[EVIL],
        parts=[Part(EVIL, [EVIL], pd.DataFrame({EVIL: [EVIL]})), Part(EVIL, folded=True)],
        measure=EVIL,
    )
    reader = Reader(path.read_text(encoding="utf-8"))
    assert reader.count("img") == 0
    assert reader.count("script") == 2 + len(figures)
    assert not any(re.match(r"\s*alert", script) for script in reader.scripts)
    assert reader.text.count(EVIL) >= 20


def test_figures_in_the_page_hold_their_data(page):
    script = next(s for s in Reader(page).scripts if '"figure-2"' in s)
    losses = json.loads(re.search(r'"y":(\{[^}]*\})', script)[1])
    assert np.frombuffer(base64.b64decode(losses["bdata"]), losses["dtype"]).tolist() == [2.0, 1.0]


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(LensError, match="taken cannot be written"):
        report(tmp_path / "taken", figures=[])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_an_empty_verdict_and_examples_without_columns_are_refused(tmp_path):
    with pytest.raises(LensError, match="verdict"):
        report(tmp_path / "a.html", verdict=" ")
    with pytest.raises(LensError, match="lack condition, response"):
        report(tmp_path / "a.html", examples=pd.DataFrame({"prompt": ["a"]}))
    assert list(tmp_path.iterdir()) == []


def test_a_report_without_examples_prompt_notes_and_card_has_no_empty_sections(tmp_path):
    path = report(tmp_path / "a.html", figures=[], examples=pd.DataFrame(), prompt_html="", notes=[], card={})
    page = path.read_text(encoding="utf-8")
    assert re.findall("<h2>(.*?)</h2>", page) == ["What the words mean", "Summary"]


def test_an_answer_that_the_token_limit_cut_is_marked(tmp_path):
    rows = {"prompt": ["a", "a"], "condition": ["base", "finetuned"], "response": ["x", "y"]}
    rows |= {"ended": ["length", "stop"], "value": [20.0, math.nan]}
    page = report(tmp_path / "a.html", examples=pd.DataFrame(rows)).read_text()
    text = " ".join(Reader(page).text.split())
    assert "base · 20x ✂ cut at the token limit finetunedy" in text
    assert text.count("cut at the token limit") == 1
