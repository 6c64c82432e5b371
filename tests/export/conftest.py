"""Tiny students that answer to their image, with a config and a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kd_dense.models.build import build_model
from tests.helpers import tiny


def lively(config: dict) -> torch.nn.Module:
    """Random weights under which outputs depend on the image, and scores are spread out, as after training."""
    torch.manual_seed(1)
    model = build_model(config, 'model').train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # statistics of real activations
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                fan_in = parameter[0].numel()
                torch.nn.init.normal_(parameter, std=fan_in**-0.5)
            elif name.endswith('bias'):
                torch.nn.init.normal_(parameter, std=0.1)
        features = model.extract_feat(torch.randn(4, 3, 64, 64))
        if hasattr(model, 'decode_head'):
            model.decode_head(features)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


@pytest.fixture(scope='session')
def scenes(tmp_path_factory) -> Path:
    return tiny.scenes(tmp_path_factory.mktemp('export_data') / 'scenes')


@pytest.fixture
def saved(scenes, tmp_path) -> Callable[[dict], tuple[Config, str, torch.nn.Module]]:
    """Model config -> training config, checkpoint as of a distillation, and the student in it."""

    def save(model: dict) -> tuple[Config, str, torch.nn.Module]:
        run = tiny.segmentation_run if model['_scope_'] == 'mmseg' else tiny.detection_run
        cfg = run(model, scenes)
        student = lively(model)
        content = {
            'state_dict': student.state_dict(),
            'meta': {'dataset_meta': {'classes': ('a', 'b'), 'palette': [(1, 2, 3), (4, 5, 6)]}, 'iter': 7},
            'optimizer': {'state': {0: torch.ones(3)}},
            'kd_dense': {'distillers': {'connectors.0.weight': torch.ones(3)}},
        }
        path = tmp_path / 'iter_7.pth'
        torch.save(content, path)
        return cfg, str(path), student

    return save
