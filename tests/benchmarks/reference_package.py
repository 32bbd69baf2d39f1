"""The search against the StitchNet authors' own package, and against the forward passes that it cannot do without.

    python examples/prepare_solar_cells.py
    python tests/benchmarks/reference_package.py --python python3.10

It takes a Python 3.10, with which the package gets a virtual environment of its own the first time (`--reference-env`:
2.6 GB, up to nine minutes). Where that cannot be had, the benchmark says so and stops with exit code 1. Theirs takes
minutes for a network on 8 images, eleven on 32 (`--images`). Run it on an otherwise idle machine.

Both sides get the same three EfficientNet-Lites, images and threads, and the paper's settings: K = 2, thresholds 0.5,
at most 10 fragments, cuts by the authors' rule. Each runs in a process of its own. The first table compares:

- cutting the three networks;
- a scoring step: CKA of a running network, its activation given, with every fragment that may follow. The running
  networks are the same: the start fragments, and those along the path that theirs took. Ours leaves out the fragments
  used already. Theirs samples up to ten rows for each channel, ours up to 32 of each image;
- a network: from the images until it can be run, first the same one, then one at the end of a random path each. Paths
  that end in nothing do not count;
- peak memory of the process up to its first network.

The second table gives our searches (one random path as above; `Beam` with the default settings and the references that
every search has), from the images until a network can be run; the forward passes that they needed, alone (each source
once over the images, then each fragment that was carried on once, in the same portions: no stitch, no CKA, no fit, no
disk); and the one as a multiple of the other. Our figures are medians of `--runs`, theirs of `--reference-runs`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy
import timm  # noqa: F401 - loading the sources imports it; its memory is told apart from theirs
import torch
from reference_side import (
    IMAGE_SIZE,
    MAX_FRAGMENTS,
    SPAN,
    THRESHOLD,
    Figures,
    Job,
    first_network,
    peak_gigabytes,
    timed,
    work,
)
from torch import Tensor, nn

from lightning_stitch import Beam, CalibrationSettings, DepthFirst, Pool, load_sources
from lightning_stitch.search.costs import CompositionCosts
from lightning_stitch.search.paths import self_stitched, unmodified
from lightning_stitch.search.space import Filters, SearchSpace, State
from lightning_stitch.stitching.candidates import Candidate
from lightning_stitch.stitching.segments import chunks

# The package's seaborn needs the older matplotlib; timm writes the sources for it.
REQUIREMENTS = ("stitchnet==0.2.2", "matplotlib<3.9", "timm==1.0.31")
REFUSAL = "The authors' package cannot be had"


# -- our side --------------------------------------------------------------------------------------------------------


def ours(job: Job) -> Figures:
    """Search on `images`; with a `path`, also follow that, and score what follows the starts on `step_images`."""
    imports, paper, cutting = peak_gigabytes(), job["strategy"] == "paper", []
    settings = CalibrationSettings(granularity="reference", estimator="biased", until="output") if paper else None
    sources = load_sources([f"local-dir:{folder}" for folder in job["sources"]])
    pool = timed(Pool, cutting)(sources, (3, IMAGE_SIZE, IMAGE_SIZE), settings=settings)
    images = torch.from_numpy(numpy.load(job["images"]))
    figures = {"imports": imports, "cutting": cutting[0], **searches(pool, images, job)}
    if "path" in job:
        figures["same"] = [along(pool, images, job["path"]) for _ in range(job["runs"])]
        figures["starts"] = starts(pool, torch.from_numpy(numpy.load(job["step_images"])), job["runs"])
        with torch.inference_mode():
            figures["outputs"] = [part.source.module(part.preprocess(images[:1]))[0].tolist() for part in pool.parts]
    return figures


def calibrated_space(pool: Pool, images: Tensor, *, paper: bool = True) -> SearchSpace:
    pool.calibrate([images])
    costs = CompositionCosts(pool.parts, bias=not paper, max_fragments=MAX_FRAGMENTS if paper else Beam().max_fragments)
    return SearchSpace(pool.calibration.sources, pool.settings, costs=costs, ridge=0.0 if paper else 1e-3)


def searches(pool: Pool, images: Tensor, job: Job) -> Figures:
    """Searches from the images until a network can be run, each followed by the forward passes that it needed."""
    paper = job["strategy"] == "paper"

    def search(seed: int) -> tuple[SearchSpace, list[tuple[int, int]], list[Candidate]] | None:
        space = calibrated_space(pool, images, paper=paper)
        ran = record_passes(space)
        if paper:
            candidates = [*DepthFirst(SPAN, THRESHOLD, THRESHOLD, MAX_FRAGMENTS, sample=True, seed=seed)(space)]
        else:
            candidates = [*[*unmodified(space), *self_stitched(space)], *Beam()(space)]
        if not candidates:
            return None
        pool.assemble(candidates[-1])
        return space, ran, candidates

    runs, peak, seeds = [], 0.0, itertools.count()
    for _ in range(job["runs"]):
        (space, ran, candidates), seconds = first_network(search, seeds)
        peak = peak or peak_gigabytes()
        passes = bare_passes(space, images, ran)
        fragments = len(candidates[-1].recipe.fragments)
        runs.append({"seconds": seconds, "passes": passes, "networks": len(candidates), "fragments": fragments})
    return {"searches": runs, "peak": peak, "num_images": len(images)}


def record_passes(space: SearchSpace) -> list[tuple[int, int]]:
    """A list that gets the (source, piece) of every fragment that is carried on from now."""
    ran: list[tuple[int, int]] = []
    walk = space.walk

    def recorded(state: State) -> Iterator[Any]:
        for index, activation in walk(state):
            # From the image nothing runs: these activations were kept when the source ran.
            if state.activation is not None:
                ran.append((state.source, index))
            yield index, activation

    space.walk = recorded  # type: ignore[method-assign]
    return ran


def bare_passes(space: SearchSpace, images: Tensor, ran: Sequence[tuple[int, int]]) -> float:
    """Seconds of every source over the images, and of every carried fragment over what its own source has there."""
    seconds: list[float] = []
    with torch.inference_mode():
        for source in space.sources:
            whole = nn.Sequential(source.parts.preprocess, *source.parts.pieces)
            for chunk in chunks(images, source.parts.images_at_once):
                timed(whole, seconds)(chunk)
        for index, piece in ran:
            source = space.sources[index]
            for portion in source.activations[piece - 1]:
                timed(source.parts.pieces[piece], seconds)(portion)
    return sum(seconds)


def along(pool: Pool, images: Tensor, path: Sequence[tuple[int, int]]) -> Figures:
    """The network of these (source, fragment) pairs, every step of which is scored with all that may follow."""
    steps: list[float] = []
    num_candidates: list[int] = []

    def follow() -> None:
        space = calibrated_space(pool, images)
        state = space.starts()[path[0][0]]
        for source, piece in path[1:]:
            cut, activation = next(iter(space.walk(state)))
            edges = timed(space.edges, steps)(state, cut, activation, Filters(single_pieces=True))
            num_candidates.append(len(edges))
            chosen = next(edge for edge in edges if (edge.source, edge.receiver + 1) == (source, piece))
            state = space.enter(chosen, activation)
        pool.assemble(space.complete(state))

    seconds: list[float] = []
    timed(follow, seconds)()
    return {"seconds": seconds[0], "steps": steps, "num_candidates": num_candidates}


def starts(pool: Pool, images: Tensor, runs: int) -> list[list[float]]:
    """Seconds to score what may follow each start fragment, of each run."""
    space = calibrated_space(pool, images)
    found = []
    for _ in range(runs):
        steps: list[float] = []
        for state in space.starts():
            timed(space.edges, steps)(state, 0, space.sources[state.source].activations[0], Filters(single_pieces=True))
        found.append(steps)
    return found


# -- the comparison --------------------------------------------------------------------------------------------------


def reference_python(environment: Path, python: str) -> str:
    """The Python of an environment that holds the package; made where it is missing."""
    interpreter = str(environment / "bin" / "python")
    check = "from importlib.metadata import version; version('stitchnet'), version('timm')"
    try:
        if not Path(interpreter).exists():
            if shutil.which(python) is None:
                raise SystemExit(f"{REFUSAL}: there is no {python}. Name a Python 3.10 with --python.")
            subprocess.run([python, "-m", "venv", environment], check=True, capture_output=True, text=True)
        if subprocess.run([interpreter, "-c", check], capture_output=True).returncode:
            print(f"Installing {' '.join(REQUIREMENTS)} into {environment} ...", file=sys.stderr)
            install = [interpreter, "-m", "pip", "install", "--quiet", *REQUIREMENTS]
            subprocess.run(install, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise SystemExit(f"{REFUSAL}: {next((x for x in lines if x.startswith('ERROR')), lines[0])}") from error
    return interpreter


def run(script: str, python: str, *arguments: str, threads: int) -> Figures:
    """A stage in a process of its own."""
    variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(variables, str(threads))}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def write_images(folder: Path, count: int, file: Path) -> str:
    # Imported here: searches without a Trainer do not hold Lightning in memory.
    from lightning_stitch import CalibrationDataModule

    data = CalibrationDataModule(image_folder=str(folder), image_size=IMAGE_SIZE, calibration_samples=count)
    numpy.save(file, torch.cat([images for images, _ in data.calibration_dataloader()]).numpy())
    return str(file)


def compare(options: argparse.Namespace, scratch: Path) -> None:
    python = reference_python(options.reference_env, options.python)
    threads = options.threads
    job = {
        "threads": threads,
        "runs": options.runs,
        "reference_runs": options.reference_runs,
        "sources": [str((options.solar_cells / f"efficientnet_lite{k}").resolve()) for k in range(3)],
        "images": write_images(options.solar_cells / "images", options.images, scratch / "images.npy"),
        "step_images": write_images(options.solar_cells / "images", options.step_images, scratch / "step_images.npy"),
        "scratch": str(scratch),
        "strategy": "paper",
    }
    reference = run("reference_side.py", python, json.dumps(job), threads=threads)
    path = reference["runs"][0]["path"]

    def our_side(**changes: Any) -> Figures:
        arguments = ("--stage", json.dumps({**job, **changes}))
        return run("reference_package.py", sys.executable, *arguments, threads=threads)

    own = our_side(path=path)
    for theirs, ours in zip(reference["outputs"], own["outputs"], strict=True):
        if not numpy.allclose(theirs, ours, atol=1e-3 * max(map(abs, ours))):
            raise SystemExit("The two sides do not have the same networks: their outputs differ.")
    print_comparison(reference, own, options)
    many = {"images": job["step_images"]}
    print_limits({"a random path": [own, our_side(**many)], "Beam, defaults": [our_side(strategy="beam", **many)]})


def print_comparison(theirs: Figures, ours: Figures, options: argparse.Namespace) -> None:
    first, same, few, many = theirs["runs"][0], ours["same"], options.images, options.step_images
    starts, path = medians(ours["starts"]), medians([run["steps"] for run in same])
    rows = [
        ("cutting, s", theirs["cutting"], ours["cutting"]),
        (f"a scoring step, {many} images, after a start fragment, s", mean(theirs["starts"]), mean(starts)),
        (f"a scoring step, {few} images, along one path, s", mean(first["steps"]), mean(path)),
        (f"the network of that path, {few} images, s", first["seconds"], typical(same)),
        (f"a network of a random path each, {few} images, s", typical(theirs["runs"]), typical(ours["searches"])),
        ("peak memory, GB", theirs["peak"], ours["peak"]),
        ("of that, imported packages, GB", theirs["imports"], ours["imports"]),
    ]
    print(f"stitchnet 0.2.2 with torch {theirs['torch']}, lightning_stitch with torch {torch.__version__}")
    print(f"{IMAGE_SIZE} pixels, {options.threads} threads\n\n{'':<58}{'theirs':>10}{'ours':>10}{'ratio':>8}")
    for name, a, b in rows:
        print(f"{name:<58}{a:>10.2f}{b:>10.3f}{a / b:>8.1f}")
    ratios = [a / b for a, b in zip(first["steps"], path, strict=True)]
    counts, lengths = same[0]["num_candidates"], {run["fragments"] for run in ours["searches"]}
    print(f"\ncandidates of a step: theirs {theirs['num_candidates'][0]}, ours {min(counts)} to {max(counts)}")
    print(f"fragments: {len(first['path'])} on that path, {', '.join(map(str, sorted(lengths)))} on our random ones")
    print(f"ratios of the steps along that path: {', '.join(f'{ratio:.0f}' for ratio in ratios)}")


def print_limits(searches: dict[str, Sequence[Figures]]) -> None:
    header = ("images", "networks", "search, s", "passes, s", "multiple", "peak, GB")
    print(f"\n{'our searches':<24}" + "".join(f"{name:>11}" for name in header))
    for name, found in searches.items():
        for figures in found:
            runs = figures["searches"]
            multiple = median(run["seconds"] / run["passes"] for run in runs)
            passes = median(run["passes"] for run in runs)
            print(
                f"{name:<24}{figures['num_images']:>11}{runs[0]['networks']:>11}{typical(runs):>11.2f}{passes:>11.2f}"
                f"{multiple:>11.2f}{figures['peak']:>11.2f}"
            )


def typical(runs: Sequence[Figures]) -> float:
    return median(run["seconds"] for run in runs)


def medians(runs: Sequence[Sequence[float]]) -> list[float]:
    return [median(seconds) for seconds in zip(*runs, strict=True)]


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(description="Compare the search with the StitchNet authors' package.")
    parser.add_argument("--solar-cells", type=Path, default=Path("solar_cells"), help="what the example prepared")
    parser.add_argument("--images", type=int, default=8, help="that both sides make networks on")
    parser.add_argument("--step-images", type=int, default=32, help="that steps are scored on after a start fragment")
    parser.add_argument("--runs", type=int, default=3, help="of each of our figures")
    parser.add_argument("--reference-runs", type=int, default=1, help="networks of theirs")
    parser.add_argument("--threads", type=int, default=cores)
    parser.add_argument("--python", default="python3.10", help="makes the environment where it is missing")
    parser.add_argument("--reference-env", type=Path, default=Path(".venv-reference"), help="with the package")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        work(ours, json.loads(options.stage))
        return
    with tempfile.TemporaryDirectory() as scratch:
        compare(options, Path(scratch))


if __name__ == "__main__":
    main()
