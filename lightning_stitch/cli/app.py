"""`lightning-stitch app MODEL` or `SOURCE...`: an app in the browser."""

from __future__ import annotations


def app(what: list[str], image_size: int | None = None, host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve a page: of a classifier one that predicts; of sources one that composes a network for a few images.

    Args:
        what: A checkpoint, saved folder or hf-hub:ORG/NAME of a classifier; or sources, as compose takes them.
        image_size: Of sources: images are resized to a square of so many pixels; null is what the first was trained on.
        host: The address to serve at; 0.0.0.0 is every one of this machine.
        port: The port.

    Raises:
        StitchError: If a model or source cannot be used, Gradio is missing, or the port is taken.
    """
    from lightning_stitch.app import demo_of, serve
    from lightning_stitch.composing import Pool
    from lightning_stitch.errors import StitchError
    from lightning_stitch.sources import load_sources
    from lightning_stitch.training import open_classifier

    if len(what) == 1 and _is_classifier(what[0]):
        demo = demo_of(open_classifier(what[0]))
    else:
        demo = demo_of(Pool.prepare(load_sources(what), image_size))
    print(f"The app is at http://{host}:{port} (Ctrl-C ends it).")
    try:
        serve(demo, server_name=host, server_port=port)
    except OSError as error:
        raise StitchError(f"The app cannot be served at {host}:{port}: {error}") from error


def _is_classifier(name: str) -> bool:
    """Whether a name is that of a saved classifier or a checkpoint, not of a source."""
    from pathlib import Path

    from lightning_stitch.errors import StitchError
    from lightning_stitch.hub import open_pretrained

    if Path(name).is_file():
        return True
    if not Path(name).is_dir() and not name.startswith(("hf-hub:", "local-dir:")):
        return False
    try:
        return open_pretrained(name, weights=False).kind == "classifier"
    except StitchError:
        return False  # loading it as a source then says what is wrong with it
