"""The authors' package's side of reference_package.py, which runs this file in the package's own environment.

Only the standard library is imported at the top: the other side takes the timing from here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Job = dict[str, Any]
Figures = dict[str, Any]

IMAGE_SIZE = 224
SPAN, THRESHOLD, MAX_FRAGMENTS, MAX_PATHS = 2, 0.5, 10, 20
# What the package imports for data sets and accuracies that are not used here.
STAND_INS = {"transformers": "AutoProcessor", "datasets": "load_dataset", "evaluate": "evaluator"}


def peak_gigabytes() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage gives begins with what the parent held.
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, with what each call takes added to a list."""

    def call(*arguments: Any, **options: Any) -> Any:
        begun = time.perf_counter()
        result = function(*arguments, **options)
        seconds.append(time.perf_counter() - begun)
        return result

    return call


def first_network(follow: Callable[[int], Any], seeds: Iterator[int]) -> tuple[Any, float]:
    """What the first random path that ends in a network gives, and its seconds."""
    for seed in itertools.islice(seeds, MAX_PATHS):
        seconds: list[float] = []
        found = timed(follow, seconds)(seed)
        if found is not None:
            return found, seconds[0]
    raise SystemExit(f"None of {MAX_PATHS} random paths ended in a network.")


def work(stage: Callable[[Job], Figures], job: Job) -> None:
    """A stage in this process, on so many cores; its figures are the last line on stdout."""
    if hasattr(os, "sched_setaffinity"):
        # onnxruntime takes the number of its threads from no variable.
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    with contextlib.redirect_stdout(sys.stderr):
        figures = stage(job)
    print(json.dumps(figures))


def export(folder: Path, file: Path) -> tuple[list[float], list[float]]:
    """Write a source as ONNX; gives the mean and the standard deviation that its images are normalised with."""
    import timm
    import torch
    from safetensors.torch import load_file
    from timm.layers import padding

    config = json.loads((folder / "config.json").read_text())
    network = timm.create_model(config["architecture"], pretrained=False)
    network.load_state_dict(load_file(folder / "model.safetensors"))
    # Padding computed from the image's size gives operators with an empty input, on which the package fails.
    computed = padding.get_same_padding
    padding.get_same_padding = lambda size, *others: computed(int(size), *others)
    torch.onnx.export(network.eval(), torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE), str(file), opset_version=13)
    padding.get_same_padding = computed
    return config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]


def theirs(job: Job) -> Figures:
    """Cut the sources, follow random paths on `images`, score what follows the start fragments on `step_images`."""
    for module, name in STAND_INS.items():
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], name, None)
    import numpy
    import timm  # noqa: F401 - exporting needs it; its memory is told apart from the search's
    import torch
    from stitchnet.stitchonnx import utils

    imports = peak_gigabytes()
    files = [Path(job["scratch"]) / f"{index}.onnx" for index in range(len(job["sources"]))]
    normalisations = [export(Path(folder), file) for folder, file in zip(job["sources"], files)]  # noqa: B905
    mean, std = normalisations[0]
    if normalisations != [(mean, std)] * len(files):
        raise SystemExit("The package takes one array of images for all networks, but these normalise differently.")

    def images(name: str) -> Any:
        found = (numpy.load(job[name]) - numpy.reshape(mean, (3, 1, 1))) / numpy.reshape(std, (3, 1, 1))
        return found.astype(numpy.float32)

    def cut() -> list[Any]:
        networks = []
        for index, file in enumerate(files):
            model = utils.load_onnx_model(str(file))
            utils.change_input_dim(model)
            example = numpy.zeros((1, 3, IMAGE_SIZE, IMAGE_SIZE), numpy.float32)
            networks.append(utils.Net(utils.get_fragments(model, example, 1), index))
        return networks

    cutting: list[float] = []
    steps: list[float] = []
    networks, few = timed(cut, cutting)(), images("images")

    def run_sources(x: Any) -> Any:
        """All sources over the images, which the package keeps; so that no scoring step has to."""
        for network in networks:
            network.results.clear()
            network.evaluate(x)
        mapper = utils.ScoreMapper(networks, x)
        mapper.score = timed(mapper.score, steps)
        return mapper

    def follow(seed: int) -> Any:
        steps.clear()
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        options = {"threshold": THRESHOLD, "totalThreshold": THRESHOLD, "maxDepth": MAX_FRAGMENTS, "K": SPAN}
        return next(utils.generate_networks(networks, run_sources(few), few, sample=True, **options), None)

    runs, peak, seeds = [], 0.0, itertools.count()
    for _ in range(job["reference_runs"]):
        (_, network), seconds = first_network(follow, seeds)
        path = [[int(index) for index in fragment] for fragment in network.id]
        runs.append({"seconds": seconds, "steps": list(steps), "path": path})
        peak = peak or peak_gigabytes()
    outputs = [network.get_outputs(few)[-1][0].tolist() for network in networks]
    many = images("step_images")
    mapper = run_sources(many)
    steps.clear()
    num_candidates = [len(mapper.score(network[0].get_output(many), 1)) for network in networks]
    return {
        "torch": torch.__version__,
        "imports": imports,
        "cutting": cutting[0],
        "runs": runs,
        "peak": peak,
        "outputs": outputs,
        "starts": steps,
        "num_candidates": num_candidates,
    }


if __name__ == "__main__":
    work(theirs, json.loads(sys.argv[1]))
