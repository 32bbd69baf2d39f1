"""Saved folders, their cards, and repositories on the hub.

In reading order:

- `folder.py`: config.json, which may come from a stranger or from a newer version
- `saving.py`: write config.json and model.safetensors
- `loading.py`: read them, from whomever they come
- `card.py`: README.md with metadata that the hub reads; `CardDetails` is what the author says
- `picture.py`: the composition drawn, with matplotlib
- `repository.py`: a hub repository to write to: what is there, one commit, errors in words that help
- `publishing.py`: `publish`: check, write, load again and compare, then upload

`StitchedNetwork` and `StitchedClassifier` have `save_pretrained` and `from_pretrained`, of a folder, "ORG/NAME" or
"ORG/NAME@REVISION", and `publish` takes both. `lightning-stitch predict hf-hub:ORG/NAME images/` needs nothing else.

**What is written.** Only the fragments that are used, shared weights once, head, task and class names, and a card:
sources with revisions, licences and weight hashes, the composition as a picture, metrics with split and number of
images, the search's table, the recipe as YAML and the Python that composes the network again, limits. Folders of your
machine are left out of it. Metrics come from `CardDetails(metrics=...)`, or from the last validation in
`PublishAfterFit`; the table from a search with `compare: true`.

**What is checked on loading**, whoever wrote it: plain files only, size (before the download) and sha256 of the
weights, and every tensor against the recipe, whose structure is built on the meta device, where tensors have no
memory. Loading is strict: fields that this version does not know and other formats are refused. A `python:` source
needs `trust_factory=True`, which runs its code; a live module cannot be saved, and the error offers `torch.export`. A
stranger's recipe can still take long to build, say with thousands of layers; Ctrl-C ends it.

**What is checked before uploading**: licences, your credentials, a README.md that is there (`existing_card=`), the
visibility asked for, and that the saved folder gives the same outputs. `PublishAfterFit` checks all but the last
before it trains. What fails on the way leaves the revision as it was; a second call goes on where the first one
stopped.

**Licence**: that of all sources, where they are under the same one. Several become "other", with each source's
listed; unknown ones warn; those that forbid derivatives or sharing refuse unless `CardDetails(licence_override=...)`
gives a reason, which the card shows. It is no legal advice.

Limits: a published network is no source of another search, and strategies that shard weights publish from a
checkpoint. Publishing is tested with the real client against a stand-in for the hub, which fails on purpose (401,
403, 404, 412, 429, 500, cut connections, other bytes); the real hub's own rules, and its Xet storage, were out of
reach.

Example:
    >>> from lightning_stitch.hub import CardDetails
    >>> details = CardDetails(dataset="me/solar-cells", metrics={"accuracy": 0.93}, num_images=512)
    >>> details.split
    'test'
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
