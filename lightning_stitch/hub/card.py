"""The card of a stitched network: README.md with metadata that the hub reads, written with its own card classes."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_stitch.errors import StitchError
from lightning_stitch.hub.folder import CARD, PICTURE, shown_spec
from lightning_stitch.hub.picture import can_draw, draw_composition
from lightning_stitch.io import complete_or_absent
from lightning_stitch.recipe import Recipe, SourceRef
from lightning_stitch.sources import CombinedLicence, combine_licences, hub_words

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

import re

from lightning_stitch.hub.folder import shown_recipe
from lightning_stitch.sources import hub_repository

_COLUMNS = ("name", "kind", "budget", "accuracy", "balanced_accuracy", "auroc", "params", "macs", "seconds", "labels")
_HEADINGS = {"balanced_accuracy": "balanced accuracy", "auroc": "AUROC", "params": "M params", "macs": "M MACs"}


@dataclass(frozen=True, slots=True)
class CardDetails:
    """What the author says of a network beyond its recipe; it goes into the card.

    Attributes:
        dataset: The data set that it was made for: an id on the hub, or a name.
        metrics: What was measured, by name, such as {"accuracy": 0.93}.
        split: Which part of the data set the metrics are of.
        num_images: How many images that are.
        rows: Rows of a comparison table (`Comparison.rows`, or those in comparison.json).
        verdict: The comparison's sentence.
        command: The command that makes the network again.
        licence: The author's word on the licence, where the sources' licences do not tell it.
        licence_override: Why the network may be shared although a source's licence forbids it.
        limits: Sentences on what it should not be used for.

    Raises:
        StitchError: If a metric is no finite number, or stands without a data set, or a text holds half a character.
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
        check_whole([getattr(self, each.name) for each in fields(self)], "The card's details")


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

    Raises:
        StitchError: If a text holds half a character.
    """

    recipe: Recipe
    description: str
    loader: str
    task: str | None = None
    head: str | None = None
    class_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Refuse text that no file can hold, before the first file is written."""
        check_whole(self.class_names, "The class names")
        check_whole([self.description, self.recipe.to_dict()], "The recipe")

    @property
    def pipeline_tag(self) -> str:
        """The hub's word for what it does."""
        return "image-classification" if self.task in ("multiclass", "multilabel") else "image-feature-extraction"


def licence_of(recipe: Recipe) -> CombinedLicence:
    """The licence that follows from those of a recipe's sources."""
    return combine_licences({ref.name: ref.licence for ref in recipe.sources})


def check_licence(recipe: Recipe, details: CardDetails) -> CombinedLicence:
    """Refuse to share what a source's licence forbids to share; warn where nobody knows.

    Returns:
        The licence.

    Raises:
        StitchError: If a source's licence forbids it and `details.licence_override` gives no reason.
    """
    found = licence_of(recipe)
    if found.forbidding and not (details.licence_override or "").strip():
        raise StitchError(
            f"{found.why} Leave the source out, or, where you have the right to share it all the same, say why: "
            f"licence_override='written permission of ...'. It is written in the card."
        )
    if found.unknown and details.licence is None:
        warnings.warn(f"{found.why} The card says license: other. Where you know better, give licence=.", stacklevel=3)
    return found


def write_card(subject: CardSubject, folder: Path, details: CardDetails, *, name: str) -> None:
    """Write README.md, and beside it the composition as a picture where matplotlib is installed.

    Args:
        subject: What it is about.
        folder: Where to.
        details: What the author says.
        name: Title, and where it is loaded from: "ORG/NAME" once it is published, else the folder.
    """
    if can_draw():
        draw_composition(subject.recipe, folder / PICTURE)
    card = model_card(subject, details, name=name, picture=can_draw())
    # A link of that name is replaced; to write through it would change a file elsewhere.
    with complete_or_absent(folder / CARD) as file:
        file.write(str(card.content).encode())


def model_card(subject: CardSubject, details: CardDetails, *, name: str, picture: bool = True) -> ModelCard:
    """The card; its metadata can be read back with `huggingface_hub.ModelCard`.

    Args:
        subject: What it is about.
        details: What the author says.
        name: Title, and where it is loaded from.
        picture: Whether the picture lies beside it.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    licence = licence_of(subject.recipe)
    word, word_name = hub_words(details.licence or licence.name)
    results = [
        EvalResult(
            task_type=subject.pipeline_tag,
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
    base_models = [base for ref in subject.recipe.sources if (base := hub_name(ref)) is not None]
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
        pipeline_tag=subject.pipeline_tag,
        tags=["merge", "lightning-stitch", "stitchnet", "pytorch"],
        stitched_from=[_source_entry(ref) for ref in subject.recipe.sources],
    )
    parts = [
        f"# {inline(name)}",
        _summary(subject),
        f"![The composition: fragments in a row, stitches between them]({PICTURE})" if picture else "",
        fenced(subject.description, "text"),
        "## Where its parts come from",
        _sources_table(subject.recipe),
        _licence_words(licence, details),
        "## How to use it",
        _usage(subject, name),
        *(["## Results", *_results(details)] if details.metrics or details.rows or details.verdict else []),
        "## Limits",
        "\n".join(f"- {inline(limit)}" for limit in (*details.limits, *_limits(subject))),
        "## How to make it again",
        how_to_make_again(subject.recipe, details.command),
        "## Method",
        "Composed by lightning_stitch (`pip install lightning-stitch`) after StitchNet (Teerapittayanon, Comiter, "
        "McDanel and Kung, [arXiv 2301.01947](https://arxiv.org/abs/2301.01947)): fragments of pre-trained "
        "networks are joined by closed-form least squares, guided by Centered Kernel Alignment.",
    ]
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _source_entry(ref: SourceRef) -> dict[str, Any]:
    return {
        "source": shown_spec(ref),
        "revision": ref.revision,
        "weight_hash": ref.weight_hash,
        "license": ref.licence,
    }


def _summary(subject: CardSubject) -> str:
    sources = ", ".join(span(shown_spec(ref)) for ref in subject.recipe.sources)
    what = {
        "multiclass": "An image classifier",
        "multilabel": "An image tagger (several labels for each image)",
        "regression": "A regressor from images to numbers",
        None: "A network from images to features or classes",
    }[subject.task]
    names = ""
    if subject.class_names:
        shown = ", ".join(span(name) for name in subject.class_names[:20])
        names = f" of {shown}" + (", ..." if len(subject.class_names) > 20 else "")
    head = f", with a {span(subject.head)} head" if subject.head not in (None, "none") else ""
    origin = (
        f"taken from {sources} without a stitch"
        if len(subject.recipe.fragments) == 1
        else f"stitched together from fragments of {sources}"
    )
    return f"{what}{names}, {origin}{head}."


def _sources_table(recipe: Recipe) -> str:
    lines = ["| source | revision | licence | fragments | weights |", "| --- | --- | --- | --- | --- |"]
    for ref in recipe.sources:
        used = "; ".join(
            f"{f.start or 'image'} .. {f.end or 'output'}" for f in recipe.fragments if f.source == ref.name
        )
        revision = span(ref.revision[:12]) if ref.revision else "not known"
        lines.append(
            f"| {span(shown_spec(ref))} | {revision} | {cell(ref.licence or 'unknown')} | {cell(used or 'none')} | "
            f"{span(ref.weight_hash[:19])} |"
        )
    return "\n".join(lines)


def _licence_words(licence: CombinedLicence, details: CardDetails) -> str:
    why = inline(licence.why)
    if details.licence is not None:
        words = f"Licence: {inline(details.licence)}, as its author says. From the sources alone: {why}"
    elif licence.name is not None:
        words = f"Licence: {inline(licence.name)}. {why}"
    else:
        words = f"Licence: other; look at those of the sources. {why}"
    if licence.forbidding:
        reason = details.licence_override
        words += (
            f"\n\n**Shared in spite of that licence.** The author's reason: {inline(reason)}"
            if reason
            else "\n\n**As long as that is so, it may not be published.**"
        )
    return words


def _usage(subject: CardSubject, name: str) -> str:
    size = "x".join(map(str, subject.recipe.input_size))
    trust = any(ref.builder == "python" for ref in subject.recipe.sources)
    option = ", trust_factory=True" if trust else ""
    lines = [
        "import lightning_stitch as ls",
        "",
        f"network = ls.{subject.loader}.from_pretrained({json.dumps(name, ensure_ascii=False)}{option})",
    ]
    if subject.loader == "StitchedClassifier":
        lines.append('rows = ls.predict_files(network, "folder_of_images")')
    lines.append(f"outputs = network(images)  # float, in [0, 1], batch x {size}, not normalised")
    words = fenced("\n".join(lines), "python")
    if not trust:
        where = f"hf-hub:{name}" if name.count("/") == 1 and not Path(name).is_absolute() else f"local-dir:{name}"
        call = f"timm.create_model({json.dumps(where, ensure_ascii=False)}, pretrained=True)"
        words += (
            "\n\nNone of the sources is needed. timm takes it as well, once `lightning_stitch` is imported: "
            f"{span(call)}."
        )
    else:
        paths = ", ".join(span(ref.architecture) for ref in subject.recipe.sources if ref.builder == "python")
        words += f"\n\nIts structure is built by code that you must have and trust: {paths}."
    return words


def _results(details: CardDetails) -> list[str]:
    found = []
    if details.metrics:
        images = "" if details.num_images is None else f", {details.num_images} images"
        heading = f"| metric | value ({cell(details.dataset)}, {cell(details.split)}{images}) |\n| --- | --- |"
        found.append("\n".join([heading, *(f"| {cell(n)} | {v:.4g} |" for n, v in details.metrics.items())]))
    if details.rows:
        columns = [column for column in _COLUMNS if any(row.get(column) is not None for row in details.rows)]
        lines = [" | ".join(_HEADINGS.get(column, column) for column in columns), " | ".join("---" for _ in columns)]
        lines += [" | ".join(_cell(row, column) for column in columns) for row in details.rows]
        found.append("What the search that composed it compared, all with the same head on the same test images:")
        found.append("\n".join(f"| {line} |" for line in lines))
    if details.verdict:
        found.append(inline(details.verdict))
    return found


def _cell(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return "-"
    # A comparison.json may come from anywhere, with words where numbers should be.
    if column in ("params", "macs") and isinstance(value, int | float):
        return f"{value / 1e6:.2f}"
    if not isinstance(value, float):
        return cell(value)
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    if isinstance(low, int | float) and isinstance(high, int | float):
        return f"{value:.3f} [{low:.2f}, {high:.2f}]"
    return f"{value:.1f}" if column == "seconds" else f"{value:.3f}"


def _limits(subject: CardSubject) -> list[str]:
    size = "x".join(map(str, (subject.recipe.input_size)[1:]))
    limits = [
        f"It was calibrated on images of {size} pixels; other sizes may run and were not looked at.",
        "It was composed on a few images of one task. On images of another kind its outputs mean little.",
        "What its sources were trained on, and what is unfair or missing there, is in its fragments, too.",
    ]
    if subject.head == "knn":
        limits.append(
            "Its head keeps the features of the labelled images, so something of those images is in the file."
        )
    if any(ref.spec.startswith("local-dir:") or ref.builder == "python" for ref in subject.recipe.sources):
        limits.append("Not all sources can be fetched from a public place, so it cannot be made again from them alone.")
    return limits


def check_whole(value: Any, what: str) -> None:
    """Refuse half a character (a lone surrogate, which JSON can spell), which no file in UTF-8 can hold.

    Raises:
        StitchError: If there is one.
    """
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.start + 20]
        raise StitchError(
            f"{what} hold half a character ({text[error.start]!a} in {around!a}), which no file can hold. Write that "
            f"text anew."
        ) from error


def hub_name(ref: SourceRef) -> str | None:
    """The source's repository on the hub, where it came from there."""
    prefix, colon, rest = ref.spec.partition(":")
    if colon:
        return rest.partition("@")[0] if prefix == "hf-hub" else None
    return hub_repository(ref.architecture) if ref.builder == "timm" and ref.revision else None


def how_to_make_again(recipe: Recipe, command: str | None) -> str:
    """In Markdown; the Python is left out where it would not make the same network."""
    from huggingface_hub.utils import yaml_dump

    words = []
    if command:
        words.append(fenced(command, "bash"))
    if recipe.is_chain and not recipe.taps[0].statistics and None not in recipe.stitches:
        words.append("Or, with images of the task, in Python:" if command else "With images of the task:")
        words.append(fenced(_composing(recipe), "python"))
    words.append(
        "<details><summary>The recipe, from which its structure is built</summary>\n\n"
        f"{fenced(yaml_dump(shown_recipe(recipe)).rstrip(), 'yaml')}\n\n</details>"
    )
    return "\n\n".join(words)


def _pinned(ref: SourceRef) -> str:
    """What to give `load_sources` for the same weights."""
    repo = hub_name(ref)
    # Some of timm's weights are in repositories of another layout, which only timm's own names lead to.
    pinned = ref.revision and repo and (ref.spec.startswith("hf-hub:") or repo.endswith(f"/{ref.architecture}"))
    spec = f"hf-hub:{repo}@{ref.revision}" if pinned else shown_spec(ref)
    options: dict[str, Any] = {"spec": spec}
    if ref.name != re.split("[/:]", spec.partition("@")[0])[-1]:
        options["name"] = ref.name
    if ref.arguments:
        options["arguments"] = ref.arguments
    return repr(options if len(options) > 1 else spec)


def _composing(recipe: Recipe) -> str:
    """The same network, made by hand."""
    sources = "".join(f"    {_pinned(ref)},\n" for ref in recipe.sources)
    pieces = "".join(f"    {(f.source, f.start, f.end)!r},\n" for f in recipe.fragments)
    healed = ", heal=True" if recipe.healed else ""
    shared = ", share_weights=True" if recipe.share_weights else ""
    until = ', until="output"' if recipe.fragments[-1].end is None else ""
    return "\n".join(
        (
            "import lightning_stitch as ls",
            "",
            f'settings = ls.CalibrationSettings(granularity="all"{until})',
            f"sources = ls.load_sources([\n{sources}])",
            f"pool = ls.Pool(sources, {recipe.input_size}, settings=settings)",
            "pool.calibrate(batches)  # floats in [0, 1], not normalised",
            f"found = pool.stitch([\n{pieces}]{healed})",
            f"network = pool.assemble(found{shared})",
        )
    )


def fenced(text: str, language: str) -> str:
    """A block of code; its fence is longer than any run of backticks in it, so the text cannot end it."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def span(text: object) -> str:
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
