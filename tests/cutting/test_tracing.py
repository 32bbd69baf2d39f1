from __future__ import annotations

import pytest
from torch import nn

from lightning_stitch.cutting.tracing import in_eval_mode


def test_every_module_is_put_back_into_its_own_mode_whatever_happens() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    network[1][1].eval()
    before = [module.training for module in network.modules()]
    with in_eval_mode(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before
    with pytest.raises(KeyError), in_eval_mode(network):
        raise KeyError
    assert [module.training for module in network.modules()] == before == [True, True, True, True, False]
