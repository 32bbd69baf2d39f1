"""`lightning-stitch compose FOLDER SOURCE...`: a classifier for a folder of images."""

from __future__ import annotations


def compose(
    folder: str,
    sources: list[str],
    output: str = "composed",
    budget: str | None = None,
    image_size: int | None = None,
    overwrite: bool = False,
    seed: int = 0,
) -> None:
    """Compose a classifier for a folder of images, without back-propagation, and say whether it was worth it.

    A fifth of the images are kept apart to tell how good it is, beside the sources with heads of their own. `fit` does
    the same by a configuration, with all options.

    Args:
        folder: Class folders of images, or train, val and test with class folders.
        sources: What to compose from: timm names, hf-hub:ORG/NAME, local-dir:PATH, ...
        output: A folder for the classifier, which predict, export and publish take.
        budget: Limits, such as 25M or 50% (multiply-accumulates; % of the cheapest source's), "mean 10M", "5M
            parameters", "20 ms", "8 MB"; several with commas.
        image_size: Images are resized to a square of so many pixels; null is the largest a source was trained on.
        overwrite: Replace a classifier that is in the folder.
        seed: Of the split and the search.

    Raises:
        StitchError: If images, sources, budget or output cannot be used.
    """
    from lightning_stitch.baselines import quiet_trainers
    from lightning_stitch.training import compose as compose_classifier

    with quiet_trainers():
        model = compose_classifier(
            sources, folder, budget=budget, image_size=image_size, output=output, overwrite=overwrite, seed=seed
        )
    assert model.network is not None
    print(model.network.describe())
    print(f"The classifier is in {output}: lightning-stitch predict {output} IMAGES...")
