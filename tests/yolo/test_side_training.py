"""What a distiller may do beside giving losses, inside Ultralytics' trainer: show the student a view, train a judge."""

import torch
from torch import nn

from kd_dense.distillers import Distiller, TapPair
from kd_dense.distillers.adversary import Adversary, TokenDiscriminator
from kd_dense.registry import DISTILLERS
from tests.yolo.test_checkpoints import run

SEEN: dict[str, list] = {'view': [], 'lr': []}


@DISTILLERS.register_module()
class _Judged(Distiller):
    """Shows the student darker images, and has a discriminator between the necks."""

    def __init__(self):
        super().__init__()
        self.taps = {'x': TapPair(('neck:0',), ('neck:0',))}

    def setup(self, student, teacher):
        width = teacher.shapes['x'][0][1]
        self.connector = nn.Conv2d(student.shapes['x'][0][1], width, 1)
        self.adversary = Adversary(TokenDiscriminator(width), interval=1, lr_mult=10.0)
        self.normalization = student.normalization

    def view(self, images, context):
        SEEN['view'].append((images, context.iteration))
        return images * 0.5

    def after_step(self, lr):
        SEEN['lr'].append(lr)
        self.adversary.after_step(lr)

    def forward(self, student, teacher, context):
        own, theirs = (x.flatten(2).transpose(1, 2) for x in (self.connector(student['x'][0]), teacher['x'][0]))
        assert torch.equal(context.image, SEEN['view'][-1][0] * 0.5)
        return {'loss': self.adversary(theirs, own, None, context.iteration)}


def test_view_and_discriminator__and_a_resumed_run_ends_like_one_that_was_not_interrupted(
    write_config, student_yaml, data, tmp_path
):
    config = write_config(distillers={'judged': {'type': '_Judged'}})
    arguments = {'epochs': 2, 'close_mosaic': 0}
    SEEN['view'].clear(), SEEN['lr'].clear()
    whole = run(config, tmp_path / 'whole', student_yaml(), data, **arguments)
    assert [iteration for _, iteration in SEEN['view']] == [0, 1, 2, 3] and len(SEEN['lr']) == 4
    assert SEEN['lr'][0] == 0.01  # that of the weights
    method = whole.distillation.distillers.methods['judged']
    assert method.normalization.std == (255.0,) * 3  # the images are 0..1
    judge = {id(p) for p in method.adversary.discriminator.module.parameters()}
    assert judge and not judge & {id(p) for group in whole.optimizer.param_groups for p in group['params']}

    run(config, tmp_path / 'part', student_yaml(), data, stop_before=1, **arguments)
    last = tmp_path / 'part' / 'weights' / 'last.pt'
    saved = torch.load(last, weights_only=False)['kd_dense']['distillers']
    resumed = run(config, tmp_path / 'part', student_yaml(), data, resume=str(last))
    for part in ('student_model', 'distillers'):
        wanted = getattr(whole.distillation, part).state_dict()
        found = getattr(resumed.distillation, part).state_dict()
        assert wanted.keys() == found.keys()
        for name, value in found.items():
            assert torch.equal(value, wanted[name]), f'{part}.{name}'
    key = next(k for k in saved if 'discriminator.module' in k and k.endswith('weight'))
    assert not torch.equal(saved[key], found[key])  # and it learnt in the second epoch
    assert any('discriminator.optimizer' in k for k in found)
