"""Which levels of two pyramids go together."""

import pytest
import torch
from torch import nn

from kd_dense import Distillation, Distiller
from kd_dense.context import Context
from kd_dense.description import Description
from kd_dense.distillation import Distillers
from kd_dense.distillers import TapPair
from kd_dense.distillers.base import matched_levels, paired_shapes
from kd_dense.errors import ConfigError
from kd_dense.registry import DISTILLERS
from tests.helpers import tiny
from tests.helpers.toys import probe

ROLE = 'features'


def pyramid(*strides, canvas=(256, 320)):
    """The probe of maps that have these strides; coarse ones are rounded up to whole cells, as convolutions do."""
    shapes = [(1, 8, -(-canvas[0] // s), -(-canvas[1] // s)) for s in strides]
    return probe(ROLE, *shapes, canvas=canvas)


@pytest.mark.parametrize(
    'student, teacher, expected',
    [
        ((8, 16, 32), (8, 16, 32), None),  # nothing to change
        ((8, 16, 32), (4, 8, 16, 32, 64), [1, 2, 3]),
        ((16,), (4, 8, 16, 32), [2]),
        ((32, 8), (8, 16, 32), [2, 0]),  # the student's order
        ((8, 16, 32, 64, 128), (4, 8, 16, 32, 64), None),  # 128 is missing: no partial match
        ((8, 8), (4, 8, 8), None),  # not decidable
        ((8, 8, 16), (4, 8, 16, 32), None),
        ((32,), (8,), None),  # one map each: resized
    ],
)
def test_matched_levels(student, teacher, expected):
    assert matched_levels(pyramid(*student), pyramid(*teacher), ROLE) == expected


def test_matched_levels__take_rounded_strides_for_equal():
    # 200 / 128 cells are 2: stride 100 on one side, 128 on the other
    student, teacher = pyramid(64, 128, canvas=(200, 200)), pyramid(32, 64, 128, canvas=(512, 512))
    assert student.strides(ROLE)[1] == 100
    assert matched_levels(student, teacher, ROLE) == [1, 2]


def test_matched_levels__leave_tokens_alone():
    tokens = probe(ROLE, (1, 20, 8), (1, 5, 8))
    assert matched_levels(tokens, pyramid(8, 16, 32), ROLE) is None


def test_levels_of_other_strides__are_an_error_with_both_lists():
    student, teacher = pyramid(8, 16, 32, 64, 128), pyramid(4, 8, 16, 32, 64)
    with pytest.raises(ConfigError) as caught:
        paired_shapes(student, teacher, ROLE)
    text = str(caught.value)
    assert 'the student gives 5 tensors' in text and 'but the teacher 5' in text
    assert text.index('stride 128') < text.index('stride 4;')
    assert 'nothing of the teacher has stride 128; choose levels of equal stride' in text


@pytest.mark.parametrize('student, teacher', [((32,), (8,)), ((16, 32), (8, 8)), ((8, 16), (8, 32))])
def test_levels_of_strides_that_the_teacher_has_not_at_all__are_resized(student, teacher):
    assert len(paired_shapes(pyramid(*student), pyramid(*teacher), ROLE)) == len(student)


class Pyramid(nn.Module):
    """Maps of constants: level ``i`` has stride ``strides[i]`` and the value ``strides[i]``."""

    def __init__(self, *strides: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.strides = strides
        self.neck = nn.Identity()

    def forward(self, images: torch.Tensor) -> None:
        h, w = images.shape[2:]
        self.neck([self.scale * torch.full((1, 2, h // s, w // s), float(s)) for s in self.strides])

    def describe(self, size: int = 64) -> Description:
        def run() -> tuple[int, int]:
            self(torch.zeros(1, 3, size, size))
            return size, size

        return Description(self, run)


@pytest.fixture
def compared():
    """A distiller that notes what it is given."""

    class Compared(Distiller):
        seen: list = []

        def __init__(self):
            super().__init__()
            self.taps = {ROLE: TapPair.parse('neck')}

        def setup(self, student, teacher):
            self.shapes = paired_shapes(student, teacher, ROLE)

        def forward(self, student, teacher, context):
            pairs = list(zip(student[ROLE], teacher[ROLE], strict=True))
            self.seen += [(s.detach().mean().item(), t.mean().item()) for s, t in pairs]
            return {'loss': sum(s.mean() for s, _ in pairs)}

    DISTILLERS.register_module(module=Compared)
    yield Compared
    DISTILLERS.module_dict.pop('Compared')


def test_a_distiller__is_given_the_levels_that_match(compared):
    student, teacher = Pyramid(8, 16), Pyramid(4, 8, 16, 32)
    distillers = Distillers({'one': dict(type='Compared')})
    distillers.setup(student.describe(), teacher.describe())
    assert [t[2] for _, t in distillers.methods['one'].shapes] == [8, 4]
    row = distillers.table[0]
    assert [t.stride for t in row.teacher_tensors] == [8, 16]
    assert 'stride 4' not in row.teacher
    active = distillers.active(0.0)
    values = []
    for model, side in ((student, 'student'), (teacher, 'teacher')):
        with distillers.taps(side, active).record() as taps:
            model(torch.zeros(1, 3, 64, 64))
        values.append(taps.take())
    distillers(*values, Context(canvas=(64, 64)), lambda: torch.ones(()))
    assert compared.seen == [(8, 8), (16, 16)]


def test_a_two_stage_teacher_of_a_one_stage_student(tmp_path):
    """FPN levels of stride 8 to 64 are common to Faster R-CNN and RetinaNet; 128 has to be left out."""
    teacher = tiny.detector('FasterRCNN', width=8)
    file = tiny.saved(teacher, tmp_path / 'teacher.pth')

    def build(taps):
        return Distillation(
            tiny.detector('RetinaNet'),
            dict(config=teacher, checkpoint=file),
            dict(neck=dict(type='NFD', taps=taps)),
            probe_size=(256, 256),
        )

    with pytest.raises(ConfigError, match='nothing of the teacher has stride 128'):
        build('neck')
    model = build(dict(student=['neck:0', 'neck:1', 'neck:2', 'neck:3'], teacher='neck'))
    row = model.distillers.table[0]
    strides = [[t.stride for t in tensors] for tensors in (row.student_tensors, row.teacher_tensors)]
    assert strides == [[8, 16, 32, 64]] * 2
