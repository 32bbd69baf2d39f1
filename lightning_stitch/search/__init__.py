"""Space, strategies, ranking, results.

In reading order:

- `space.py`: which fragment may follow which, how well they match, what that costs
- `scoring.py`: a running network against all receivers of a step at once
- `costs.py`: what any composition costs, and the least that one can cost, in arrays, before anything is run
- `strategies.py`: `Beam`, networks of every size class from one search; `DepthFirst`, the StitchNet paper's search
- `paths.py`: compositions along a given path: sources, self-stitched or not, early exits, what a user names
- `evaluation.py`: many candidates over the same images at once, what they begin with alike run once
- `ranks.py`: processes that search together: each runs its share of the images and judges its share of the candidates
- `rounds.py`: the worse half of the stitched ones stops after a quarter of the images, and again after half
- `ranking.py`: the order of candidates by what they gave on the selection images, from Gram matrices of readouts
- `sides.py`: compositions side by side with one joint head, by greedy forward selection
- `staging.py`: compositions that stop when they are sure, their thresholds by leave-one-out
- `final_ranking.py`: all of that: candidates, and what is composed of them
- `results.py`: `SearchResult`: what was found, under which budget, and whether it was worth it
- `latency.py`: how long one image takes, measured where the networks are to run
- `stopping.py`: when a search stops composing before its strategy is through
- `identity.py`: what a search depends on: where two differ, one's journal is not the other's

Parameters and MACs of a composition are sums over its pieces and stitches: a way that cannot be completed within
the budget is not walked. Activation bytes and latencies are measured of assembled networks, and only what keeps the
limits is returned. A journal (`lightning_stitch.io.journal`) remembers the answers that a search got (CKAs, fitted
stitches, features, latencies), not where its strategy stood, so that it serves a strategy of your own, too, if that is
deterministic. `max_candidates`, `time_limit` and the ranking may change when a search goes on with it.

Example:
    >>> import torch
    >>> from lightning_stitch import Budget, Pool, load_sources
    >>> images = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> pool = Pool(load_sources([{"spec": "test_resnet", "pretrained": False}]), (3, 64, 64))
    >>> result = pool.search([images[:16]], [images[16:]], max_candidates=4)
    >>> cheap = result.within(Budget(max_macs=result.best_source.candidate.cost.macs / 2))
    >>> cheap.candidate.kind
    'early exit'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
