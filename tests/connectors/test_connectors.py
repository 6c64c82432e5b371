"""Connectors and the rule by which sizes are brought together."""

import pytest
import torch
from torch import nn

from kd_dense.connectors import Conv1x1, ConvReLUConv, as_map, build_connector, match_size
from kd_dense.errors import ConfigError
from tests.helpers.toys import convolved, resized


def test_conv1x1_is_a_sum_over_channels():
    connector, x = Conv1x1(3, 5).double(), torch.randn(2, 3, 4, 6).double()
    torch.testing.assert_close(connector(x), torch.tensor(convolved(x, connector)))
    assert sum(p.numel() for p in connector.parameters()) == 3 * 5 + 5


def test_conv_relu_conv():
    connector, x = ConvReLUConv(3, 5).double(), torch.randn(2, 3, 4, 6).double()
    first, last = connector[0], connector[2]
    hidden = torch.tensor(convolved(x, first)).clamp(min=0)
    torch.testing.assert_close(connector(x), torch.tensor(convolved(hidden, last)))
    assert sum(p.numel() for p in connector.parameters()) == (3 * 5 + 5) + (5 * 5 + 5)


def test_default_connector():
    assert type(build_connector(None, 4, 4, 'connector')) is nn.Identity
    wide = build_connector(None, 3, 4, 'connector')
    assert type(wide) is Conv1x1 and wide.bias is not None
    assert build_connector(None, 3, 4, 'connector', bias=False).bias is None
    # asked for by name, it is there even where the widths agree
    assert type(build_connector('Conv1x1', 4, 4, 'connector')) is Conv1x1


def test_as_map():
    tokens = torch.randn(2, 6, 5)
    view = as_map(tokens)
    assert view.shape == (2, 5, 6, 1) and view.data_ptr() == tokens.data_ptr()
    assert view[1, 3, 4, 0] == tokens[1, 4, 3]
    assert as_map(torch.zeros(2, 5)).shape == (2, 5, 1, 1)
    maps = torch.zeros(2, 5, 3, 4)
    assert as_map(maps) is maps
    for shape in ((5,), (1, 2, 3, 4, 5)):
        with pytest.raises(ConfigError, match='2, 3 or 4 dimensions, not the shape'):
            as_map(torch.zeros(shape))


@pytest.mark.parametrize('size', [(8, 12), (3, 5), (4, 6), (2, 3), (7, 6)])
def test_match_size_equals_the_textbook(size):
    teacher = torch.randn(2, 3, 4, 6)
    result = match_size(teacher, torch.zeros(2, 7, *size))
    expected = resized(teacher.double().numpy(), size)
    torch.testing.assert_close(result, torch.tensor(expected).float())
    assert (result is teacher) == (size == (4, 6))


def test_match_size_worked():
    teacher = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    assert match_size(teacher, torch.zeros(1, 1, 1, 4)).flatten().tolist() == [0, 1, 3, 4]


def test_match_size_of_half_precision_is_in_fp32():
    assert match_size(torch.zeros(1, 1, 2, 2).half(), torch.zeros(1, 1, 4, 4)).dtype == torch.float32
