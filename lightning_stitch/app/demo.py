"""Pages in Gradio: compose a network for a few labelled images, and predict with one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_stitch.composing import Pool
from lightning_stitch.data import decode_images, select_readable
from lightning_stitch.errors import StitchError
from lightning_stitch.hub import composition_figure
from lightning_stitch.training import StitchedClassifier, compose

_BUDGETS = ["none", "75%", "50%", "33%"]
_AN_HOUR = 3600
_MOST_SHOWN = 5
_STAGES = {
    "sources": "running each source once over your images",
    "search": "scoring stitches, running what follows them",
    "rank": "choosing by images left out",
    "assemble": "making the network",
}


def demo_of(subject: Pool | StitchedClassifier) -> Any:
    """A page in Gradio, for `serve`.

    Args:
        subject: A pool (`Pool.prepare`): the page takes a few labelled images and a budget, composes, shows picture
            and verdict, predicts, and gives the classifier to download. A classifier with a network: it predicts.

    Raises:
        StitchError: If Gradio is not installed, or the classifier has no network or no classes.
    """
    try:
        import gradio
    except ImportError as error:
        raise StitchError("The app needs Gradio: pip install 'lightning-stitch[app]'") from error
    if isinstance(subject, StitchedClassifier) and (subject.network is None or subject.task != "multiclass"):
        raise StitchError("The app shows a classifier that has its network, and classes rather than labels or numbers.")
    with gradio.Blocks(title="lightning_stitch", analytics_enabled=False, delete_cache=(_AN_HOUR, _AN_HOUR)) as demo:
        if isinstance(subject, Pool):
            _composing_page(gradio, subject)
        else:
            _about(gradio, subject)
            _predicting_page(gradio, lambda state: subject, gradio.State())
    return demo


def _about(gradio: Any, model: StitchedClassifier) -> None:
    assert model.network is not None
    gradio.Markdown(f"# {' · '.join(_plain(name) for name in (model.class_names or ['A classifier']))}")
    with gradio.Accordion("The network", open=False):
        gradio.Plot(composition_figure(model.network.recipe), show_label=False)
        gradio.Code(model.network.describe(), language=None, show_label=False)


def _predicting_page(gradio: Any, model_of: Callable[[Any], StitchedClassifier | None], state: Any) -> None:
    """An image goes in, its classes come out."""

    def predict(file: str | None, held: Any) -> dict[str, float] | None:
        model = model_of(held)
        if file is None:
            return None
        if model is None or model.network is None:
            raise gradio.Error("Compose a network first.", print_exception=False)
        shape = model.network.recipe.input_size
        (row,) = _in_words(gradio, lambda: model.predict(decode_images([file], shape)))
        return dict(row["probabilities"])

    with gradio.Row():
        image = gradio.File(file_types=["image"], label="An image to predict", height=140, elem_id="image")
        label = gradio.Label(num_top_classes=_MOST_SHOWN, label="Its class", elem_id="label")
    image.change(predict, [image, state], label)


def _composing_page(gradio: Any, pool: Pool) -> None:
    """Labelled images and a budget go in; a network with its picture, verdict and files comes out."""

    def add(name: str, files: list[str] | None, held: list[tuple[str, str]]) -> tuple[Any, ...]:
        name = name.strip()
        if not name or not files:
            raise gradio.Error("Name the class, and choose its images.", print_exception=False)
        readable, problems = _in_words(
            gradio, lambda: select_readable([Path(file) for file in files], skip_unreadable=True)
        )
        for file in problems:
            gradio.Warning(f"Left out, as it cannot be read as an image: {file.name}")
        held = [*held, *((str(file), name) for file in readable)]
        return held, held, "", None, f"{len(held)} images of {len({label for _, label in held})} classes."

    def clear() -> tuple[Any, ...]:
        return [], [], "No images yet."

    def run(
        held: list[tuple[str, str]],
        budget: str,
        progress: Any = gradio.Progress(),  # noqa: B008 (where Gradio looks for it)
    ) -> tuple[Any, ...]:
        if not held:
            raise gradio.Error("Add labelled images first: at least two of each of two classes.", print_exception=False)
        files, labels = zip(*held, strict=True)
        words = None if budget.strip() in ("", "none") else budget
        model = _in_words(gradio, lambda: compose(pool, files, labels, budget=words, progress=_Told(progress)))
        assert model.network is not None
        archive = _archive(model)
        figure = composition_figure(model.network.recipe)
        return (
            model,
            _verdict(model, labels),
            gradio.Plot(figure, visible=True),
            gradio.Code(model.network.describe(), visible=True),
            gradio.DownloadButton(value=archive, interactive=True),
        )

    names = ", ".join(_plain(part.name) for part in pool.parts)
    size = "x".join(map(str, pool.image_shape[1:]))
    gradio.Markdown(
        f"# A classifier from a few images\nComposed of fragments of {names}, for images of {size} pixels, without "
        f"training: at least two classes, a few images of each."
    )
    held, model = gradio.State([]), gradio.State()
    with gradio.Row():
        name = gradio.Textbox(label="A class", placeholder="cup", elem_id="class")
        files = gradio.File(
            file_count="multiple", file_types=["image"], label="Its images", height=140, elem_id="files"
        )
    with gradio.Row():
        adding = gradio.Button("Add images", elem_id="add")
        clearing = gradio.Button("Start again", elem_id="clear")
    counted = gradio.Markdown("No images yet.", elem_id="counted")
    gallery = gradio.Gallery(label="Labelled images", columns=4, height=220, interactive=False, elem_id="gallery")
    with gradio.Row():
        budget = gradio.Dropdown(
            _BUDGETS,
            value="none",
            allow_custom_value=True,
            label="Budget",
            info="a share of the cheapest source's MACs, or as 25M, or 2M parameters",
            elem_id="budget",
        )
        composing = gradio.Button("Compose", variant="primary", elem_id="compose")
    verdict = gradio.Markdown("Nothing composed yet.", min_height=90, elem_id="verdict")
    picture = gradio.Plot(show_label=False, visible=False, elem_id="picture")
    words = gradio.Code(language=None, show_label=False, visible=False)
    download = gradio.DownloadButton("Download the classifier", interactive=False, elem_id="download")
    gradio.Markdown("## Try it")
    _predicting_page(gradio, lambda found: found, model)
    adding.click(add, [name, files, held], [held, gallery, name, files, counted])
    clearing.click(clear, None, [held, gallery, counted])
    composing.click(run, [held, budget], [model, verdict, picture, words, download], show_progress_on=verdict)


class _Told:
    """A search's stages as Gradio's progress shows them."""

    def __init__(self, progress: Any) -> None:
        self._progress = progress

    def start(self, stage: str, total: int | None) -> None:
        """Name the stage."""
        place = list(_STAGES).index(stage) if stage in _STAGES else 0
        self._progress((place + 0.5) / len(_STAGES), desc=_STAGES.get(stage, stage))

    def advance(self, steps: int) -> None:
        """Stages are short: nothing is shown within one."""


def _verdict(model: StitchedClassifier, labels: Sequence[str]) -> str:
    result = model.result
    assert result is not None
    assert model.network is not None
    scores, cost = result.best.scores, result.best.candidate.cost
    parts = []
    if "loo_accuracy" in scores:
        right, commonest = scores["loo_accuracy"], max(map(list(labels).count, labels)) / len(labels)
        parts.append(
            f"**Right on {right:.0%} of your {len(labels)} images**, each left out of the head that classified it "
            f"(always guessing the commonest class: {commonest:.0%}). New images alone tell how good it is."
        )
        if right <= commonest:
            parts.append("That is no better than guessing: more images would help, or clearer classes.")
    seconds = ", ".join(f"{stage} {taken:.1f} s" for stage, taken in result.seconds.items())
    parts += [_plain(result.summary()), f"{cost}. {seconds}."]
    return "\n\n".join(parts)


def _archive(model: StitchedClassifier) -> str:
    """The classifier's folder as a zip file, in a place that Gradio may serve."""
    from gradio.utils import get_upload_folder

    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=uploads))
    model.save_pretrained(folder / "classifier", name="classifier")
    model.report(folder / "classifier")
    archive = shutil.make_archive(str(folder / "classifier"), "zip", folder / "classifier")
    shutil.rmtree(folder / "classifier")
    return archive


def _in_words(gradio: Any, ask: Callable[[], Any]) -> Any:
    """What is asked for; this library's errors are shown on the page."""
    try:
        return ask()
    except StitchError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _plain(words: str) -> str:
    """Words that Markdown leaves as they are."""
    return "".join(f"\\{letter}" if letter in r"\`*_{}[]<>#|~" else letter for letter in words)
