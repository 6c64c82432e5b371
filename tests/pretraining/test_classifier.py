"""Any classifier as a teacher."""

import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision

from kd_dense import ConfigError
from kd_dense.pretraining import Classifier
from tests.pretraining import teachers

MODULE = 'tests.pretraining.teachers'
IMAGES = torch.randint(0, 256, (2, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    return teachers.saved(tmp_path_factory.mktemp('classifier') / 'small.pth')


def logits(classifier, images=IMAGES):
    return classifier(classifier.prepared(images))


def expected(weights, images=IMAGES, mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375), flip=True):
    model = teachers.small()
    model.load_state_dict(torch.load(weights))
    x = (images.flip(1) if flip else images).float()
    with torch.no_grad():
        return model((x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None])


def test_images__are_normalised_as_the_teacher_wants_them(weights):
    found = Classifier(config=f'{MODULE}:small', checkpoint=weights)
    assert torch.allclose(logits(found), expected(weights), atol=1e-4) and found.num_classes == 150
    other = dict(mean=[100, 110, 120], std=[50, 60, 70], order='bgr')
    found = Classifier(config=f'{MODULE}:small', checkpoint=weights, **other)
    assert torch.allclose(logits(found), expected(weights, flip=False, mean=other['mean'], std=other['std']), atol=1e-4)
    assert not any(p.requires_grad for p in found.model.parameters()) and not found.model.training


def test_scale__enlarges_what_it_sees(weights):
    found = Classifier(config=f'{MODULE}:small', checkpoint=weights, scale=2.0)
    assert found.prepared(IMAGES).shape == (2, 3, 64, 80)


def test_model_of_torchvision(tmp_path):
    model = torchvision.models.squeezenet1_1(num_classes=5)
    torch.save(model.state_dict(), tmp_path / 'm.pth')
    arguments = dict(config='torchvision.models:squeezenet1_1', arguments=dict(num_classes=5))
    assert logits(Classifier(**arguments, checkpoint=str(tmp_path / 'm.pth'))).shape == (2, 5)


def test_program(weights, tmp_path):
    model = teachers.small()
    model.load_state_dict(torch.load(weights))
    path = str(tmp_path / 'program.pt')
    torch.jit.save(torch.jit.trace(model.eval(), torch.zeros(1, 3, 32, 40)), path)
    assert torch.allclose(logits(Classifier(checkpoint=path)), expected(weights), atol=1e-4)
    with pytest.raises(ConfigError, match=r'can not be loaded as a TorchScript program .* give teacher\.config if'):
        Classifier(checkpoint=weights)
    with pytest.raises(ConfigError, match=r'teacher\.checkpoint: .* can not be loaded as a TorchScript program'):
        Classifier(checkpoint='nowhere.pt')


@pytest.mark.parametrize(
    'options, sentence',
    [
        (dict(config=f'{MODULE}:maps'), r'gives \[2, 150, 2\] for 2 images and must give logits \[B, C\]'),
        (dict(config=f'{MODULE}:smal'), r"teachers has no 'smal'; did you mean 'small'"),
        (dict(config='nowhere.models:small'), r'nowhere\.models can not be imported'),
        (dict(config='torchvision::resnet50'), r"must be 'module:function', such as 'torchvision\.models:resnet50'"),
        (dict(config=f'{MODULE}:number'), r'number returns int, and must return a torch\.nn\.Module'),
        (dict(config=f'{MODULE}:broken'), r'broken can not be built: no such variant'),
        (dict(config=f'{MODULE}:small', arguments=dict(classes=7)), r'does not fit the teacher config'),
        (dict(config=f'{MODULE}:small', checkpoint=None), r'teacher\.checkpoint: none is given'),
        (dict(config=f'{MODULE}:small', checkpoint='no.pth'), r'teacher\.checkpoint: .*no\.pth'),
        (dict(config=f'{MODULE}:small', order='xyz'), r"teacher\.order: must be 'rgb' or 'bgr'"),
        (dict(config=f'{MODULE}:small', scale=0), r'teacher\.scale: must be a number above 0'),
        (
            dict(config=f'{MODULE}:small', means=[1, 2, 3]),
            r"model\.teacher: has no option 'means'; did you mean 'mean'",
        ),
    ],
)
def test_what_can_not_work__is_one_sentence(weights, options, sentence):
    if options['config'] == f'{MODULE}:maps':
        weights = str(Path(weights).with_name('maps.pth'))
        torch.save(teachers.maps().state_dict(), weights)
    with pytest.raises(ConfigError, match=sentence) as error:
        logits(Classifier(**{'checkpoint': weights, **options}))
    assert '\n' not in str(error.value)


def test_more_classes_than_can_be_numbered__one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'many', types.SimpleNamespace(model=lambda: teachers.small(40000)))
    torch.save(teachers.small(40000).state_dict(), tmp_path / 'many.pth')
    with pytest.raises(ConfigError, match='has 40000 classes and a cache can number 32768'):
        logits(Classifier(config='many:model', checkpoint=str(tmp_path / 'many.pth')))
