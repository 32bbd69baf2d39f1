"""The card of a stitched network: README.md with metadata that the hub reads, written with its own card classes."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_stitch.errors import StitchError
from lightning_stitch.hub.folder import CARD, PICTURE, public_recipe, public_spec
from lightning_stitch.hub.picture import can_draw, draw_composition
from lightning_stitch.io import complete_or_absent
from lightning_stitch.recipe import Recipe, SourceRef
from lightning_stitch.sources import CombinedLicence, combine_licences, hub_repository, hub_words
from lightning_stitch.tables import TESTED

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_COLUMNS = (
    *("name", "kind", "sources", "budget", "accuracy", "balanced_accuracy", "auroc"),
    *("params", "macs", "mean_macs", "seconds", "labels", "verdict"),
)
_HEADINGS = {
    **{"balanced_accuracy": "balanced accuracy", "auroc": "AUROC"},
    **{"params": "M params", "macs": "M MACs", "mean_macs": "M MACs on average"},
}
_METHOD = """Composed by lightning_stitch (`pip install lightning-stitch`) after StitchNet (Teerapittayanon, Comiter, \
McDanel and Kung, [arXiv 2301.01947](https://arxiv.org/abs/2301.01947)): fragments of pre-trained networks are joined \
by closed-form least squares, guided by Centered Kernel Alignment."""


@dataclass(frozen=True, slots=True)
class CardDetails:
    """What the author says of a network beyond its recipe; it goes into the card.

    Attributes:
        dataset: The data set that it was made for: an id on the hub, or a name.
        metrics: What was measured, by name, such as {"accuracy": 0.93}.
        split: Which part of the data set the metrics are of.
        num_images: How many images that are.
        rows: Rows of a comparison table (`Comparison.rows`, or those in comparison.json).
        verdict: The comparison's words; lines that begin with two spaces become a list.
        command: The command that makes the network again.
        licence: The author's word on the licence, where the sources' licences do not tell it.
        licence_override: Why the network may be shared although a source's licence forbids it.
        limits: Sentences on what it should not be used for.

    Raises:
        StitchError: If a metric is no finite number, or stands without a data set.
    """

    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    split: str = "test"
    num_images: int | None = None
    rows: Sequence[Mapping[str, Any]] = ()
    verdict: str | None = None
    command: str | None = None
    licence: str | None = None
    licence_override: str | None = None
    limits: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check the metrics."""
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise StitchError(f"A card's metrics are finite numbers; {name!r} is {value!r}.")
        if self.metrics and self.dataset is None:
            raise StitchError("Metrics say little without the data that they are of: give dataset= as well.")


@dataclass(frozen=True, slots=True)
class CardSubject:
    """What a card is about.

    Attributes:
        recipe: The network's structure.
        description: The network in words (`describe()`).
        loader: The class whose `from_pretrained` loads it: "StitchedNetwork" or "StitchedClassifier".
        task: "multiclass", "multilabel" or "regression"; None: it gives features.
        head: The head's name; None: there is none.
        class_names: Names of the outputs, where they are known.
    """

    recipe: Recipe
    description: str
    loader: str
    task: str | None = None
    head: str | None = None
    class_names: Sequence[str] | None = None


def check_licence(recipe: Recipe, details: CardDetails) -> None:
    """Refuse to share what a source's licence forbids without `licence_override`; warn where nobody knows."""
    licence = _licence_of(recipe)
    if licence.forbidding and not (details.licence_override or "").strip():
        raise StitchError(
            f"{licence.why} Leave the source out, or, where you have the right to share it all the same, say why: "
            f"licence_override='written permission of ...'. It is written in the card."
        )
    if licence.unknown and details.licence is None:
        words = f"{licence.why} The card says license: other. Where you know better, give licence=."
        warnings.warn(words, stacklevel=3)


def write_card(subject: CardSubject, folder: Path, details: CardDetails, *, name: str) -> None:
    """Write README.md, and beside it the composition as a picture where matplotlib is installed.

    The name is the title, and where it is loaded from: "ORG/NAME" once it is published, else the folder.
    """
    if can_draw():
        draw_composition(subject.recipe, folder / PICTURE)
    card = model_card(subject, details, name=name, picture=can_draw())
    # A link of that name is replaced; to write through it would change a file elsewhere.
    with complete_or_absent(folder / CARD) as file:
        # A name of bytes that are no UTF-8 is half a character in Python, and a question mark here.
        file.write(str(card.content).encode(errors="replace"))


def model_card(subject: CardSubject, details: CardDetails, *, name: str, picture: bool = True) -> ModelCard:
    """The card, as `write_card` writes it; its metadata can be read back with `huggingface_hub.ModelCard`."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    recipe = subject.recipe
    licence = _licence_of(recipe)
    word, word_name = hub_words(details.licence or licence.name)
    is_classifier = subject.task in ("multiclass", "multilabel")
    pipeline_tag = "image-classification" if is_classifier else "image-feature-extraction"
    results = [
        EvalResult(
            task_type=pipeline_tag,
            dataset_type=str(details.dataset),
            dataset_name=str(details.dataset),
            dataset_split=details.split,
            dataset_args=None if details.num_images is None else {"num_images": details.num_images},
            metric_type=metric,
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in details.metrics.items()
    ]
    base_models = [base for ref in recipe.sources if (base := _hub_name(ref)) is not None]
    data = ModelCardData(
        base_model=base_models or None,
        base_model_relation="merge" if base_models else None,
        # Only the hub's ids are allowed there; every data set is named in the text.
        datasets=[details.dataset] if details.dataset and details.dataset.count("/") == 1 else None,
        eval_results=results or None,
        model_name=name.rpartition("/")[2] or name,
        library_name="lightning-stitch",
        license=word,
        license_name=word_name,
        pipeline_tag=pipeline_tag,
        tags=["merge", "lightning-stitch", "stitchnet", "pytorch"],
        stitched_from=[_source_entry(ref) for ref in recipe.sources],
    )
    results_part = _results(details)
    parts = [
        f"# {inline(name)}",
        _summary(subject),
        f"![The composition: a tree of fragments, stitches between them]({PICTURE})" if picture else "",
        code_block(subject.description, "text"),
        "## Where its parts come from",
        _sources_table(recipe),
        _licence_words(licence, details),
        "## How to use it",
        _usage(subject, name),
        "## Results" if results_part else "",
        results_part,
        "## Limits",
        "\n".join(f"- {inline(limit)}" for limit in (*details.limits, *_limits(subject))),
        "## How to make it again",
        _how_to_make_again(recipe, details.command),
        "## Method",
        _METHOD,
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def licence_of(recipe: Recipe) -> str | None:
    """The licence that all sources are under; None: they differ, or one is not known."""
    return _licence_of(recipe).name


def _licence_of(recipe: Recipe) -> CombinedLicence:
    return combine_licences({ref.name: ref.licence for ref in recipe.sources})


def _hub_name(ref: SourceRef) -> str | None:
    """The source's repository on the hub, where it came from there."""
    prefix, colon, rest = ref.spec.partition(":")
    if colon:
        return rest.partition("@")[0] if prefix == "hf-hub" else None
    return hub_repository(ref.architecture) if ref.builder == "timm" and ref.revision else None


def _source_entry(ref: SourceRef) -> dict[str, Any]:
    spec = public_spec(ref)
    return {"source": spec, "revision": ref.revision, "weight_hash": ref.weight_hash, "license": ref.licence}


def _summary(subject: CardSubject) -> str:
    sources = ", ".join(code_span(public_spec(ref)) for ref in subject.recipe.sources)
    what = {
        "multiclass": "An image classifier",
        "multilabel": "An image tagger (several labels for each image)",
        "regression": "A regressor from images to numbers",
        None: "A network from images to features or classes",
    }[subject.task]
    if subject.class_names:
        what += f" of {', '.join(code_span(name) for name in subject.class_names[:20])}"
        what += ", ..." if len(subject.class_names) > 20 else ""
    head = f", with a {code_span(subject.head)} head" if subject.head not in (None, "none") else ""
    if not subject.recipe.stitches:
        return f"{what}, taken from {sources} without a stitch{head}."
    return f"{what}, stitched together from fragments of {sources}{head}."


def _sources_table(recipe: Recipe) -> str:
    rows = []
    for ref in recipe.sources:
        fragments = [
            f"{f.start or 'image'} .. {f.end or 'output'}"
            for f in (run.ref for run in recipe.runs)
            if f.source == ref.name
        ]
        revision = code_span(ref.revision[:12]) if ref.revision else "not known"
        licence, used = cell(ref.licence or "unknown"), cell("; ".join(fragments) or "none")
        rows.append([code_span(public_spec(ref)), revision, licence, used, code_span(ref.weight_hash[:19])])
    return _table(["source", "revision", "licence", "fragments", "weights"], rows)


def _licence_words(licence: CombinedLicence, details: CardDetails) -> str:
    why = inline(licence.why)
    if details.licence is not None:
        words = f"Licence: {inline(details.licence)}, as its author says. From the sources alone: {why}"
    elif licence.name is not None:
        words = f"Licence: {inline(licence.name)}. {why}"
    else:
        words = f"Licence: other; look at those of the sources. {why}"
    if not licence.forbidding:
        return words
    if details.licence_override:
        reason = inline(details.licence_override)
        return f"{words}\n\n**Shared in spite of that licence.** The author's reason: {reason}"
    return f"{words}\n\n**As long as that is so, it may not be published.**"


def _usage(subject: CardSubject, name: str) -> str:
    size = "x".join(map(str, subject.recipe.input_size))
    factories = [code_span(ref.architecture) for ref in subject.recipe.sources if ref.builder == "python"]
    option = ", trust_factory=True" if factories else ""
    lines = [
        "import lightning_stitch as ls",
        "",
        f"network = ls.{subject.loader}.from_pretrained({json.dumps(name, ensure_ascii=False)}{option})",
    ]
    if subject.loader == "StitchedClassifier":
        lines.append('rows = ls.predict_files(network, "folder_of_images")')
        if subject.recipe.stages is not None:
            least = math.ceil(subject.recipe.stages.points[0].mean_macs)  # what is less is refused
            lines.append(f"network.at(mean_macs={least})  # cheap; more is more careful")
    lines.append(f"outputs = network(images)  # float, in [0, 1], batch x {size}, not normalised")
    code = code_block("\n".join(lines), "python")
    if factories:
        return f"{code}\n\nIts structure is built by code that you must have and trust: {', '.join(factories)}."
    where = f"hf-hub:{name}" if name.count("/") == 1 and not Path(name).is_absolute() else f"local-dir:{name}"
    call = code_span(f"timm.create_model({json.dumps(where, ensure_ascii=False)}, pretrained=True)")
    return f"{code}\n\nNone of the sources is needed. After `import lightning_stitch.timm`, timm takes it, too: {call}."


def _results(details: CardDetails) -> str:
    parts = []
    if details.metrics:
        images = "" if details.num_images is None else f", {details.num_images} images"
        heading = f"value ({cell(details.dataset)}, {cell(details.split)}{images})"
        parts.append(_table(["metric", heading], [[cell(n), f"{v:.4g}"] for n, v in details.metrics.items()]))
    if details.rows:
        columns = [column for column in _COLUMNS if any(row.get(column) is not None for row in details.rows)]
        parts.append("What the search that composed it compared, all with the same head on the same test images:")
        headings = [_HEADINGS.get(column, column) for column in columns]
        parts.append(_table(headings, [[_number(row, column) for column in columns] for row in details.rows]))
    if details.verdict:
        lines = details.verdict.splitlines()
        parts.append("\n".join(f"- {inline(x.strip())}" if x.startswith("  ") else f"\n{inline(x)}\n" for x in lines))
        parts.append(inline(TESTED))
    return "\n\n".join(parts)


def _number(row: Mapping[str, Any], column: str) -> str:
    """A cell of the comparison; its file may come from anywhere, with words where numbers should be."""
    value = row.get(column)
    if value is None:
        return "-"
    if column in ("params", "macs", "mean_macs") and isinstance(value, int | float):
        return f"{value / 1e6:.2f}"
    if not isinstance(value, float):
        return cell(value)
    interval = row.get(f"{column}_low"), row.get(f"{column}_high")
    if all(isinstance(bound, int | float) for bound in interval):
        return f"{value:.3f} [{interval[0]:.2f}, {interval[1]:.2f}]"
    return f"{value:.1f}" if column == "seconds" else f"{value:.3f}"


def _limits(subject: CardSubject) -> list[str]:
    size = "x".join(map(str, subject.recipe.input_size[1:]))
    limits = [
        f"It was calibrated on images of {size} pixels; other sizes may run and were not looked at.",
        "It was composed on a few images of one task. On images of another kind its outputs mean little.",
        "What its sources were trained on, and what is unfair or missing there, is in its fragments, too.",
    ]
    if subject.head == "knn":
        limits.append("Its head keeps the features of the labelled images: something of them is in the file.")
    if any(ref.spec.startswith("local-dir:") or ref.builder == "python" for ref in subject.recipe.sources):
        limits.append("Not all sources can be fetched from a public place, so it cannot be made again from them alone.")
    return limits


def _how_to_make_again(recipe: Recipe, command: str | None) -> str:
    """In Markdown; the Python is left out where it would not make the same network."""
    from huggingface_hub.utils import yaml_dump

    parts = []
    if command:
        parts.append(code_block(command, "bash"))
    if recipe.is_chain and not recipe.taps[-1].statistics and recipe.stitches:
        parts.append("Or, with images of the task, in Python:" if command else "With images of the task:")
        parts.append(code_block(_python_that_composes(recipe), "python"))
    recipe_yaml = code_block(yaml_dump(public_recipe(recipe)).rstrip(), "yaml")
    summary = "<summary>The recipe, from which its structure is built</summary>"
    parts.append(f"<details>{summary}\n\n{recipe_yaml}\n\n</details>")
    return "\n\n".join(parts)


def _python_that_composes(recipe: Recipe) -> str:
    sources = "".join(f"    {_source_argument(ref)!r},\n" for ref in recipe.sources)
    pieces = "".join(f"    {(f.source, f.start, f.end)!r},\n" for f in (run.ref for run in recipe.runs))
    healed = ", heal=True" if recipe.healed else ""
    shared = ", share_weights=True" if recipe.share_weights else ""
    until = ', until="output"' if recipe.fragments[-1].end is None else ""
    return f"""import lightning_stitch as ls

settings = ls.CalibrationSettings(granularity="all"{until})
sources = ls.load_sources([
{sources}])
pool = ls.Pool(sources, {recipe.input_size}, settings=settings)
pool.calibrate(batches)  # floats in [0, 1], not normalised
candidate = pool.stitch([
{pieces}]{healed})
network = pool.assemble(candidate{shared})"""


def _source_argument(ref: SourceRef) -> str | dict[str, Any]:
    """What to give `load_sources` for the same weights."""
    repo = _hub_name(ref)
    # Some of timm's weights are in repositories of another layout, which only timm's own names lead to.
    pinned = ref.revision and repo and (ref.spec.startswith("hf-hub:") or repo.endswith(f"/{ref.architecture}"))
    spec = f"hf-hub:{repo}@{ref.revision}" if pinned else public_spec(ref)
    options: dict[str, Any] = {"spec": spec}
    if ref.name != re.split("[/:]", spec.partition("@")[0])[-1]:
        options["name"] = ref.name
    if ref.arguments:
        options["arguments"] = ref.arguments
    return options if len(options) > 1 else spec


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def code_block(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of backticks in it, so the text cannot end it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def code_span(text: object) -> str:
    """A span of code, in a line or in a table's cell; a pipe in it would end the cell, a backtick the span."""
    return f"`{_one_line(text).replace('|', '/').replace('`', chr(39)) or ' '}`"


def inline(text: object) -> str:
    """Words in a line, or a paragraph of their own: neither markup nor HTML, and no heading or list."""
    escaped = re.sub(r"[\\`*\[\]<>|~]", r"\\\g<0>", _one_line(text))
    # What only the start of a line makes a heading, a list or a rule.
    return re.sub(r"^(\d*)([#+=_.)-])", r"\1\\\2", escaped)


def cell(text: object) -> str:
    """Words in a table's cell, which end neither it nor the row."""
    return inline(_one_line(text).replace("|", "/"))


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
