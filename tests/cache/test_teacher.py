"""What a cache remembers of the teacher's description."""

import json
from pathlib import Path

import pytest
import torch

from kd_dense import ConfigError
from kd_dense.cache.store import Manifest, StoredCache
from kd_dense.cache.teacher import CachedTeacher, write_description
from kd_dense.description import Boxes, Logits, Queries
from kd_dense.models.build import build_model
from kd_dense.models.describe import describe
from tests.helpers import tiny


def remembered(description, shapes, canvas=(64, 96)):
    facts = json.loads(json.dumps(write_description(description, ('a', 'b'), shapes, canvas)))
    manifest = Manifest(1, 1, 0, 1, {name: len(s) for name, s in shapes.items()}, {}, {}, facts)
    return CachedTeacher(StoredCache(Path('folder'), manifest))


@pytest.mark.parametrize(
    'model, kinds',
    [
        (tiny.segmentor(), (Logits, str, str)),
        (tiny.detector('GFL'), (Logits, str, Boxes)),
        (tiny.detector('RetinaNet'), (Logits, str, Boxes)),
        (tiny.deformable_detr(), (Logits, Queries, str)),
    ],
    ids=['segmentor', 'GFL', 'RetinaNet', 'DETR'],
)
def test_description__comes_back_equal(model, kinds):
    before = describe(build_model(model, 'model'))
    after = remembered(before, {'neck': [torch.Size([1, 3, 4, 6])]}).description()
    assert (type(before.logits), type(before.queries), type(before.boxes)) == kinds
    for name in ('logits', 'queries', 'boxes', 'normalization', 'absent'):
        assert getattr(after, name) == getattr(before, name)
    assert after.rois.startswith('a cached teacher has no RoI head')


def test_dry_forward__gives_the_shapes_or_names_what_is_missing():
    description = describe(build_model(tiny.detector('GFL'), 'model'))
    shapes = {'neck': [torch.Size([1, 3, 8, 12]), torch.Size([1, 3, 4, 6])], 'logits': [torch.Size([1, 6, 8, 12])]}
    teacher = remembered(description, shapes)
    values, canvas = teacher.description().recorded(['logits', 'neck'])
    assert canvas == (64, 96) and {n: [t.shape for t in ts] for n, ts in values.items()} == shapes
    with pytest.raises(
        ConfigError, match=r"folder has nothing of the tap 'boxes', only of neck, logits; write it again"
    ):
        teacher.description().recorded(['boxes'])
    assert teacher.meta == {'dataset_meta': {'classes': ['a', 'b']}}
