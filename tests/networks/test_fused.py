from __future__ import annotations

from pathlib import Path

import torch
from doubles.small_sources import donor
from doubles.tensors import digits
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_stitch import Beam, CalibrationSettings, Pool, StitchedClassifier, StitchedNetwork

IMAGES, LABELS = digits(48, 32, classes=3)


def networks() -> list[StitchedNetwork]:
    pool = Pool([donor("test_resnet"), donor("test_efficientnet")], (3, 32, 32), settings=CalibrationSettings("stages"))
    result = pool.search([IMAGES[:24]], [(IMAGES[24:], LABELS[24:])], strategy=Beam(width=2, max_fragments=2))
    kinds = {ranked.candidate.kind: ranked.candidate for ranked in result.ranked}
    assert {"source", "stitched"} <= set(kinds)
    return [pool.assemble(candidate) for candidate in kinds.values()]


def test_a_fused_network_gives_what_the_network_gives_and_leaves_it_alone() -> None:
    for network in networks():
        before = {name: x.clone() for name, x in network.state_dict().items()}
        fused = network.fused()
        with torch.inference_mode():
            torch.testing.assert_close(fused(IMAGES[:8]), network(IMAGES[:8]), atol=1e-4, rtol=1e-4)
        assert not any(isinstance(layer, nn.BatchNorm2d) for fragment in fused.fragments for layer in called(fragment))
        assert fused.recipe == network.recipe
        for name, x in network.state_dict().items():
            assert torch.equal(x, before[name])


def called(fragment: nn.Module) -> list[nn.Module]:
    return [fragment.get_submodule(str(n.target)) for n in fragment.graph.nodes if n.op == "call_module"]


def test_a_trainer_predicts_with_the_fused_network_and_with_nothing_else_afterwards(tmp_path: Path) -> None:
    network = networks()[0]
    model = StitchedClassifier(num_classes=3)
    model.install(network, nn.Linear(network.num_features, 3))
    plain = model.eval()(IMAGES[:8]).softmax(1)
    seen: list[bool] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        seen.append(model._fused[0] is module)

    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: look(module, inputs) if isinstance(module, StitchedNetwork) else None
    )
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    predicted = trainer.predict(model, DataLoader([*IMAGES[:8]], batch_size=4))
    handle.remove()
    assert seen == [True, True]
    assert isinstance(predicted, list)
    torch.testing.assert_close(torch.cat([*predicted]), plain, atol=1e-4, rtol=1e-4)
    assert not model._fused
    assert set(model.state_dict()) == {f"network.{key}" for key in network.state_dict()} | {"head.weight", "head.bias"}


def test_a_network_that_trains_goes_on_training_when_a_fused_copy_is_made() -> None:
    network = networks()[0].train()
    modes = {name: module.training for name, module in network.named_modules()}
    fused = network.fused()
    assert {name: module.training for name, module in network.named_modules()} == modes
    assert not any(module.training for module in fused.modules())
    assert not {p.data_ptr() for p in fused.parameters()} & {p.data_ptr() for p in network.parameters()}
