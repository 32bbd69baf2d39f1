"""Sources that timm builds: names of its registry, folders and hub repositories in its layout."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_stitch.errors import SourceError, first_lines, nearest
from lightning_stitch.io import (
    CONFIG,
    LARGEST_CONFIG,
    WEIGHTS,
    WeightFile,
    check_content,
    download_of,
    find_hub_file,
    hub_file,
    split_repository,
)
from lightning_stitch.sources.blueprint import Blueprint, preprocessing_from
from lightning_stitch.sources.spec import SourceSpec

# Fetches weights when called and says, in the words of timm's pretrained_cfg, where they are: a file or a URL.
Weights = Callable[[], Mapping[str, Any]]
UNSAFE_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def find_in_registry(spec: SourceSpec, name: str) -> Blueprint:
    """A timm name such as "resnet50.a1_in1k", also an old one; its weights come from the hub, pinned to a commit."""
    import timm
    from timm.models import PretrainedCfg, get_pretrained_cfg

    written, name = name, current_name(name)
    check_architecture(name)
    architecture = name.partition(".")[0]
    try:
        registered = get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:
        tagged = ", ".join(repr(name) for name in timm.list_pretrained(f"{architecture}.*"))
        raise SourceError(
            f"timm has no such tag for {architecture!r}; weights exist for: {tagged or 'none'}."
        ) from error
    # custom_load is for foreign files; what the hub holds is in timm's own form
    config = registered.to_dict(remove_source=True) | {"custom_load": False}
    weights: Weights | None = None
    file: WeightFile | None = None
    if spec.pretrained:
        if registered.hf_hub_id:
            file = find_hub_file(registered.hf_hub_id, WEIGHTS)
            weights = partial(_hub_weights, file, registered.hf_hub_id)
        elif registered.url and isinstance(registered.url, str):
            file = download_of(registered.url)
            weights = partial(dict, url=registered.url)
        else:
            raise SourceError("timm has no pre-trained weights for it. Take pretrained=False for random weights.")
    return _blueprint(
        spec=written,
        name=written,
        # with the tag: another version of timm may have another default
        architecture=f"{architecture}.{config['tag']}" if config.get("tag") else architecture,
        config=config,
        arguments=spec.plain_arguments("timm"),
        weights=weights,
        file=file,
        revision=commit_of(file),
    )


def find_in_folder(spec: SourceSpec, path: str) -> Blueprint:
    """A folder in timm's layout: config.json and model.safetensors."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise SourceError(f"there is no folder {path!r}. Expected one that holds {CONFIG} and {WEIGHTS}.")
    if not (folder / CONFIG).is_file():
        raise SourceError(f"the folder holds no {CONFIG}, but {_contents(folder)}. timm.models.save_for_hf writes one.")
    if spec.pretrained and not (folder / WEIGHTS).is_file():
        pickled = [file.name for file in folder.iterdir() if file.suffix in UNSAFE_SUFFIXES]
        advice = (
            f"Reading {pickled[0]} could run code that it carries, so only safetensors are read. If you trust it, "
            f'convert it once: timm.models.save_for_hf(timm.create_model("{spec.spec}", pretrained=True), "{path}", '
            f"safe_serialization=True)"
            if pickled
            else "Take pretrained=False for random weights"
        )
        raise SourceError(f"the folder holds no {WEIGHTS}, but {_contents(folder)}. {advice}.")
    for file in (CONFIG, WEIGHTS)[: 1 + spec.pretrained]:
        check_content(folder / file)
    architecture, config, saved = _read_config(folder / CONFIG)
    return _blueprint(
        spec=f"local-dir:{path}",
        name=folder.resolve().name,
        architecture=architecture,
        config=config,
        arguments=spec.plain_arguments("timm", saved),
        weights=partial(dict, file=str(folder / WEIGHTS)) if spec.pretrained else None,
        file=WeightFile(folder / WEIGHTS, folder, (folder / WEIGHTS).stat().st_size) if spec.pretrained else None,
    )


def find_on_hub(spec: SourceSpec, repository: str) -> Blueprint:
    """A hub repository in timm's layout, "ORG/NAME" or "ORG/NAME@REVISION", pinned to the commit that was found."""
    if (place := split_repository(repository)) is None:
        raise SourceError("expected 'hf-hub:ORG/NAME' or 'hf-hub:ORG/NAME@REVISION'.")
    repo, wanted = place
    beside = (WEIGHTS,) if spec.pretrained else ()
    config_file = hub_file(repo, CONFIG, revision=wanted, beside=beside, most=LARGEST_CONFIG)
    revision = config_file.parent.name
    architecture, config, saved = _read_config(config_file)
    file = find_hub_file(repo, WEIGHTS, revision=revision) if spec.pretrained else None
    return _blueprint(
        spec=f"hf-hub:{repository}",
        name=repo.partition("/")[2],
        architecture=architecture,
        config=config,
        arguments=spec.plain_arguments("timm", saved),
        weights=partial(_hub_weights, file, repo, revision) if file else None,
        file=file,
        revision=revision,
    )


def hub_repository(architecture: str) -> str | None:
    """The hub repository that timm takes an architecture's weights from; None where it knows none."""
    import timm

    try:
        config = timm.get_pretrained_cfg(architecture)
    except RuntimeError:  # a tag of another version of timm
        return None
    return config.hf_hub_id if config is not None and config.hf_hub_id else None


def current_name(name: str) -> str:
    """What timm calls a model today, which may have a tag; with timm's own warning where it is renamed.

    Raises:
        SourceError: If timm has removed it.
    """
    from timm.models._registry import _deprecated_models  # has no public home

    architecture, _, tag = name.partition(".")
    if architecture not in _deprecated_models:
        return name
    current = _deprecated_models[architecture]
    if not current:
        raise SourceError(f"timm has removed the model {architecture!r}, with no replacement.")
    if tag:
        current = f"{current.partition('.')[0]}.{tag}"
    warnings.warn(f"Mapping deprecated model name {name} to current {current}.", stacklevel=2)
    return str(current)


def check_architecture(name: str) -> None:
    """Refuse, with a SourceError, an architecture that timm's registry does not know; it may have a tag."""
    import timm

    architecture, names = name.partition(".")[0], timm.list_models()
    if architecture not in names:
        hint = ""
        if any(sign in name for sign in "/\\"):
            hint = f" A hub repository is written 'hf-hub:{name}', a folder 'local-dir:{name}'."
        elif "@" in name:
            hint = " A revision can only be given to 'hf-hub:ORG/NAME@REVISION'."
        raise SourceError(
            f"timm {timm.__version__} knows no model {architecture!r}. Nearest: {nearest(architecture, names)}. "
            f"timm.list_models() lists all.{hint}"
        )


def create_timm(
    architecture: str,
    arguments: Mapping[str, Any],
    *,
    config: Mapping[str, Any] | None = None,
    weights: Weights | None = None,
) -> nn.Module:
    """Let timm build the network and, where weights are given, load them strictly.

    Raises:
        SourceError: If timm does not take the arguments, or the weights do not fit.
    """
    import timm

    check_architecture(architecture)  # `timm.create_model` itself would follow "hf-hub:" and "local-dir:"
    location = weights() if weights else {}
    try:
        return timm.create_model(
            architecture,
            pretrained=bool(location),
            pretrained_cfg={**config, **location} if config else None,
            **arguments,
        )
    except Exception as error:  # timm and its readers raise whatever they meet; here it gets the user's words
        what = f"load {location.get('file') or location.get('url') or 'its weights'} into" if location else "build"
        raise SourceError(
            f"timm could not {what} {architecture!r} with arguments {dict(arguments)}: {first_lines(error)}"
        ) from error


def _blueprint(
    *,
    spec: str,
    name: str,
    architecture: str,
    config: dict[str, Any],
    arguments: dict[str, Any],
    weights: Weights | None,
    file: WeightFile | None,
    revision: str | None = None,
) -> Blueprint:
    """Put the parts together, provided that the arguments leave the weights whole."""
    if weights and arguments.get("num_classes", config["num_classes"]) != config["num_classes"]:
        raise SourceError(
            f"the pre-trained weights have {config['num_classes']} classes; arguments ask for "
            f"{arguments['num_classes']}. Leave num_classes out: a stitched network gets a head of its own."
        )
    size = list(config["input_size"])
    size[0] = arguments.get("in_chans", size[0])
    if (grid := arguments.get("img_size")) is not None:
        size[1:] = list(grid) if isinstance(grid, list) else [grid, grid]
    flexible = arguments.get("dynamic_img_size", False) or not arguments.get("strict_img_size", True)
    fixed = config.get("fixed_input_size", False) and not flexible
    return Blueprint(
        spec=spec,
        name=name,
        builder="timm",
        architecture=architecture,
        build=partial(create_timm, architecture, arguments, config=config, weights=weights),
        arguments=arguments,
        preprocessing=preprocessing_from({**config, "input_size": size, "fixed_input_size": fixed}),
        licence=config.get("license"),
        revision=revision,
        weights=file,
        outline=lambda tensors: create_timm(
            architecture, arguments, config=config, weights=partial(dict, state_dict=tensors) if tensors else None
        ),
    )


def _read_config(file: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """A folder's architecture, its pretrained_cfg, and the arguments that rebuild it."""
    from timm.models import PretrainedCfg, get_pretrained_cfg

    fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
        architecture = str(whole["architecture"])
        saved = whole.get("pretrained_cfg", whole)  # older files hold both in one dict
        declared = PretrainedCfg(**{key: value for key, value in saved.items() if key in fields})
        channels, *grid = declared.input_size
        arguments = {"num_classes": whole.get("num_classes", declared.num_classes), **(whole.get("model_args") or {})}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            f"its {CONFIG} is not in timm's layout, a dict with 'architecture' and 'pretrained_cfg' "
            f"({type(error).__name__}: {error}). timm.models.save_for_hf writes one."
        ) from error
    if architecture == "lightning_stitch":
        raise SourceError("it is a stitched network, which cannot be a source of another search.")
    architecture = current_name(architecture).partition(".")[0]
    check_architecture(architecture)
    config = declared.to_dict(remove_source=True)
    config |= {"architecture": architecture, "num_classes": arguments["num_classes"], "custom_load": False}
    # The rebuilt architecture gets timm's own pretrained_cfg: what differs from that must stand in the arguments.
    default = get_pretrained_cfg(architecture) or PretrainedCfg()
    if channels != default.input_size[0]:
        arguments.setdefault("in_chans", channels)
    if declared.fixed_input_size and grid != list(default.input_size[1:]):
        arguments.setdefault("img_size", grid)
    return architecture, config, arguments


def commit_of(file: WeightFile | None) -> str | None:
    """The commit of a hub's file; None for others."""
    return file.hub[2] if file and file.hub else None


def _contents(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir())
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "nothing at all"


def _hub_weights(file: WeightFile, repo: str, revision: str | None = None) -> dict[str, str]:
    """Where timm finds the weights that were found, after the download."""
    if file.file is not None:
        return {"file": str(file.file)}
    path, commit = hub_file(repo, WEIGHTS, revision=revision), commit_of(file)
    if path.parent.name != commit:  # the default branch has moved on since
        path = hub_file(repo, WEIGHTS, revision=commit)
    return {"file": str(path)}
