"""The encoder and decoder of dynamic prior knowledge."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kd_dense.connectors.dpk import Block, PriorReconstruction, mixed, position_code
from kd_dense.errors import ConfigError


def maps(student=3, teacher=5, size=(6, 8)):
    return torch.randn(2, student, *size), torch.randn(2, teacher, *size)


def chosen(connector, size, share=0.5):
    rows, columns = connector.grid(size)
    return torch.rand(2, rows * columns) < share


def test_parameters_of_a_block():
    assert sum(p.numel() for p in Block(256, 8).parameters()) == 789_760
    assert sum(p.numel() for p in Block(16, 2).parameters()) == 12 * 16**2 + 13 * 16


def test_parameters_of_all():
    connector = PriorReconstruction(3, 5, patch=2, width=16, depth=(1, 2), heads=2)
    norms, embeddings = 2 * (3 + 5), 4 * 16 * (3 + 5)
    blocks, out = 3 * (12 * 16**2 + 13 * 16), 2 * 16 + 16 * 20 + 20
    assert sum(p.numel() for p in connector.parameters()) == norms + embeddings + blocks + out
    both = PriorReconstruction(3, 5, patch=2, width=16, depth=(1, 2), heads=2, stitch='after_encoder')
    added = sum(p.numel() for p in both.parameters()) - sum(p.numel() for p in connector.parameters())
    assert added == 12 * 16**2 + 13 * 16


def test_initialisation():
    connector = PriorReconstruction(64, 64, 1, 64, (1, 1), 4)
    for name, parameter in connector.named_parameters():
        if 'ln' in name:
            assert (parameter == (1 if name.endswith('weight') else 0)).all(), name
        elif name.endswith('bias'):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
    # custom_keys of MMEngine's configs match parts of names
    assert not any(word in name for name, _ in connector.named_parameters() for word in ('norm', 'head', 'pos_block'))


@pytest.mark.parametrize('stitch', ['before_encoder', 'after_encoder'])
@pytest.mark.parametrize(('patch', 'size'), [(1, (6, 8)), (2, (6, 8)), (4, (6, 9)), (8, (3, 5))])
def test_gives_the_size_of_the_map(patch, size, stitch):
    connector = PriorReconstruction(3, 5, patch, 16, (1, 1), 2, stitch)
    student, teacher = maps(size=size)
    assert connector.grid(size) == (math.ceil(size[0] / patch), math.ceil(size[1] / patch))
    replaced = chosen(connector, size)
    replaced[:, 0] = torch.tensor([True, False])  # both sides give some, where there is one token only as well
    out = connector(student, teacher, replaced)
    assert out.shape == teacher.shape
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in connector.named_parameters())


def test_tokens_are_the_patches_they_stand_for():
    """Cells of a patch go into its token, and come out of it again at their places."""
    connector = PriorReconstruction(3, 5, 2, 20, (0, 0), 2)
    student, teacher = maps()
    own, their = connector.tokens(student, teacher)
    code = position_code(3, 4, 20).numpy()

    def token(x, ln, embed, n):
        block = x[0, :, 2 * (n // 4) : 2 * (n // 4) + 2, 2 * (n % 4) : 2 * (n % 4) + 2].numpy()
        block = (block - block.mean(0)) / np.sqrt(block.var(0) + ln.eps)
        return np.einsum('dcij,cij->d', embed.weight.detach().numpy(), block) + code[n]

    for n in (0, 3, 5, 11):
        for tokens, x, side in ((own, student, 'student'), (their, teacher, 'teacher')):
            ln, embed = getattr(connector, f'ln_{side}'), getattr(connector, f'embed_{side}')
            np.testing.assert_allclose(tokens[0, n].detach().numpy(), token(x, ln, embed, n), rtol=1e-4, atol=1e-5)
    # a linear layer that copies the token: channel c, row i, column j of a patch is element 4 c + 2 i + j
    connector.ln_out, connector.output = nn.Identity(), nn.Identity()
    out = connector(student, teacher, chosen(connector, (6, 8), 0))
    np.testing.assert_allclose(out[0, 3, 2 + 1, 4 + 0].item(), own[0, 4 + 2, 4 * 3 + 2].item())


def test_the_mixture_is_exact():
    own, their = torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    replaced = torch.rand(2, 12) < 0.4
    mixture = mixed(own, their, replaced)
    assert torch.equal(mixture[replaced], their[replaced]) and torch.equal(mixture[~replaced], own[~replaced])
    connector = PriorReconstruction(3, 5, 1, 8, (0, 1), 2)
    assert torch.equal(connector.hybrid(own, their, replaced), mixture)
    connector = PriorReconstruction(3, 5, 1, 8, (1, 1), 2)
    assert torch.equal(connector.hybrid(own, their, replaced), connector.encoder[0](mixture))
    connector = PriorReconstruction(3, 5, 1, 8, (1, 1), 2, 'after_encoder')
    encoded = connector.hybrid(own, their, replaced)
    assert torch.equal(encoded[replaced], connector.encoder_teacher[0](their)[replaced])
    assert torch.equal(encoded[~replaced], connector.encoder[0](own)[~replaced])


def test_masked_tokens_are_not_looked_at():
    connector = PriorReconstruction(3, 5, 2, 16, (1, 1), 2)
    student, teacher = maps()
    replaced = chosen(connector, (6, 8))
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2:] = False
    out = connector(student, teacher, replaced, mask.flatten(1))
    student[1, :, 4:], teacher[1, :, 4:] = 7.0, torch.randn(5, 2, 8)
    again = connector(student, teacher, replaced, mask.flatten(1))
    assert torch.equal(again[0], out[0]) and torch.equal(again[1, :, :4], out[1, :, :4])
    assert not torch.equal(connector(student, teacher, replaced)[1, :, :4], out[1, :, :4])
    mask[0] = False  # an image without any token that counts
    assert connector(student, teacher, replaced, mask.flatten(1)).isfinite().all()


def test_position_code():
    code = position_code(5, 7, 16).reshape(5, 7, 16)
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    for y, x in ((0, 0), (2, 6), (4, 3)):
        row, column = ([f(n * w) for f in (math.sin, math.cos) for w in frequencies] for n in (y, x))
        np.testing.assert_allclose(code[y, x].numpy(), row + column, rtol=1e-5, atol=1e-6)
    assert len({tuple(row) for row in code.flatten(0, 1).tolist()}) == 35


def test_wrong_options():
    for width, heads in ((18, 2), (20, 8)):
        with pytest.raises(ConfigError, match=f'width: {width} must be a multiple of 4 and of the {heads} heads'):
            PriorReconstruction(3, 5, width=width, heads=heads)
    with pytest.raises(ConfigError, match="stitch must be one of .*'before_encoder'.*not 'between'"):
        PriorReconstruction(3, 5, stitch='between')
