"""Cross-entropy to the top K of a teacher, against the dense target in float64."""

import pytest
import torch

from kd_dense.losses.sparse import sparse_cross_entropy, sparse_entropy

B, C, K = 5, 40, 7


def kept(teacher, k=K):
    """What a cache keeps of logits."""
    values, classes = teacher.softmax(1).topk(k, 1)
    return values.half(), classes.to(torch.uint8)


def dense(values, classes, num_classes=C):
    """The target as the paper writes it, float64: the rest of the probability is spread over the other classes."""
    target = torch.empty(len(values), num_classes, dtype=torch.float64)
    for row, value, index in zip(target, values.double(), classes.long(), strict=True):
        missing = num_classes - len(index)
        row[:] = max(1 - float(value.sum()), 0.0) / missing if missing else 0.0
        row[index] = value
        row /= row.sum()
    return target


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return 3 * torch.randn(B, C), 3 * torch.randn(B, C)


@pytest.mark.parametrize('k', [1, K, C - 1, C])
def test_value_and_gradient__are_those_of_the_dense_target(logits, k):
    student, teacher = logits
    values, classes = kept(teacher, k)
    target = dense(values, classes)
    student.requires_grad_(True)
    loss = sparse_cross_entropy(student, values, classes)
    expected = -(target * student.detach().double().log_softmax(1)).sum(1).mean()
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), abs=1e-5)
    loss.backward()
    gradient = (student.detach().double().softmax(1) - target) / B
    assert torch.allclose(student.grad.double(), gradient, atol=1e-6)
    entropy = -torch.xlogy(target, target).sum(1).mean()
    assert float(sparse_entropy(values, C)) == pytest.approx(float(entropy), abs=1e-5)


def test_student_that_says_what_the_teacher_says__reaches_the_entropy(logits):
    values, classes = kept(logits[1])
    student = dense(values, classes).log().float() + 2.5
    least = sparse_entropy(values, C)
    assert float(sparse_cross_entropy(student, values, classes)) == pytest.approx(float(least), abs=1e-5)
    assert sparse_cross_entropy(student + torch.randn(B, C), values, classes) > least + 0.01


def test_teacher_that_knows_k_classes__nothing_is_lost(logits):
    student, teacher = logits
    teacher = teacher.where(teacher >= teacher.topk(K, 1).values[:, -1:], -torch.inf)
    expected = -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()
    assert float(sparse_cross_entropy(student, *kept(teacher))) == pytest.approx(float(expected), abs=1e-3)


def test_sum_above_one__leaves_no_negative_probability(logits):
    student = logits[0].requires_grad_(True)
    values = torch.tensor([[0.75, 0.2505]] * B).half()  # 1.0005 in fp16
    classes = torch.tensor([[3, 1]] * B)
    assert float(values.float().sum(1)[0]) > 1
    sparse_cross_entropy(student, values, classes).backward()
    target = student.detach().softmax(1) - B * student.grad
    assert torch.allclose(target.sum(1), torch.ones(B), atol=1e-5) and target.min() > -1e-6


def test_half_logits__are_reduced_in_fp32(logits):
    values, classes = kept(logits[1])
    found = sparse_cross_entropy(logits[0].bfloat16(), values, classes)
    expected = sparse_cross_entropy(logits[0].bfloat16().float(), values, classes)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
